"""What people look at before a training: rows with sounds and arrays, what is counted, and what it will cost."""

from __future__ import annotations

import base64
import html
import json
import re
import wave
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sounds import npy, samples, sound
from typer.testing import CliRunner

from transfusion.cli.doctor_run import look_at_run
from transfusion.cli.main import app
from transfusion.codec import open_media_codecs
from transfusion.config import Config
from transfusion.config.yaml_files import dump
from transfusion.data.shards.webdataset import write_shards
from transfusion.data.sounds.files import as_wav
from transfusion.data.viewing.commands import describe_stats, stats_config
from transfusion.observe.flops import ImageLoad
from transfusion.plan import make_plan, report
from transfusion.plan.workload import DocumentMix

Make = Callable[..., Config]
MEL = {
    "name": "sound", "kind": "mel", "shapes": ["1x4096", "1x2048"], "patch": "1x1024", "scale": 0.3, "shift": -6.0,
    "diffusion": {"prediction": "flow"},
}  # fmt: skip


@pytest.fixture
def spoken(config: Make, tmp_path: Path) -> Config:
    """Sounds of two lengths, and nothing else."""
    pytest.importorskip("soundfile", reason="soundfile is not installed (extra: audio)")
    tones = [np.sin(np.arange(1500 + 2000 * (number % 2)) / 9, dtype=np.float32) for number in range(10)]
    write_shards([{"wav": as_wav(tone), "txt": b"a sound"} for tone in tones], tmp_path / "spoken")
    return config("spoken", modalities=[MEL])


def shown(config: Config, out: Path, *options: str) -> str:
    """What `data show` writes."""
    dump(config, out.with_suffix(".yaml"))
    done = CliRunner().invoke(
        app, ["data", "show", str(out.with_suffix(".yaml")), "--out", str(out), *options]
    )
    assert done.exit_code == 0, done.output
    return out.read_text(encoding="utf-8") if out.suffix == ".html" else ""


def test_rows_show_sounds_by_name_as_spectrograms_that_can_be_heard(spoken: Config, tmp_path: Path) -> None:
    text = shown(spoken, tmp_path / "rows.html", "--rows", "2")
    named = re.findall(r"<small>sound, (\d) patches, noise level \d+</small>", text)
    assert set(named) == {"4", "2"} and f"0 images, {len(named) // 2} of sound" in text
    assert {">sound 1x4096</b>", ">sound 1x2048</b>"} <= set(re.findall(r">sound 1x\d+</b>", text))
    pictures = re.findall(r'<img class="image" src="data:image/png;base64,([^"]+)"', text)
    sizes = {Image.open(BytesIO(base64.b64decode(picture))).size for picture in pictures}
    assert sizes == {(16, 80), (8, 80)} and len(pictures) == len(named)
    players = re.findall(r'<audio controls src="data:audio/wav;base64,([^"]+)"', text)
    with wave.open(BytesIO(base64.b64decode(players[0]))) as heard:
        assert heard.getframerate() == 16_000 and heard.getnframes() in (4096, 2048)
    assert not re.search(r'(src|href)="(?!data:)|https?://[^<]*"|<script', text)


def test_of_a_row_only_the_first_sounds_are_heard(spoken: Config, tmp_path: Path) -> None:
    data = spoken.data.model_copy(update={"sequence_length": 400})
    text = shown(spoken.model_copy(update={"data": data}), tmp_path / "rows.html", "--rows", "1")
    assert text.count("<audio") == 12 < text.count('<span class="media">')


def test_rows_show_arrays_as_what_they_are_and_images_as_before(config: Make, tmp_path: Path) -> None:
    text = shown(config(), tmp_path / "rows.html", "--rows", "4")
    assert "<audio" not in text and text.count('<span class="media">') > 3
    sizes = [
        Image.open(BytesIO(base64.b64decode(picture))).size
        for picture in re.findall(r'<img class="image" src="data:image/png;base64,([^"]+)"', text)
    ]
    # Images of 8 x 8, and three channels of 8 or 16 values one below another.
    assert set(sizes) == {(8, 8), (8, 3), (16, 6)}
    told = re.findall(r"(\d+) images(?:, (\d+) of sound)?, [\d,]+ of 96 positions", text)
    assert sum(int(images) + int(sounds or 0) for images, sounds in told) == len(sizes)
    assert ">BOI</b>" in text and "sound</span>" in text


def test_the_overview_shows_them_too(config: Make, tmp_path: Path) -> None:
    shown(config(), tmp_path / "rows.png", "--rows", "4")
    with Image.open(tmp_path / "rows.png") as image:
        colours = image.convert("RGB").getcolors(1 << 24)
    assert colours is not None
    shares = {colour: count for count, colour in colours}
    assert shares[0x4F, 0x9D, 0x69] > 100 and shares[0xE0, 0x8E, 0x45] > 100


def test_a_fault_is_told_as_of_images(config: Make, tmp_path: Path) -> None:
    odd = np.where(np.arange(16) == 3, np.nan, sound(1))
    write_shards([{"sound.npy": npy(odd), "txt": b"a sound"}, *samples(4)], tmp_path / "odd")
    text = html.unescape(shown(config("odd"), tmp_path / "rows.html"))
    assert '<p class="fault">000000000: latent_not_finite</p>' in text


def test_statistics_count_sounds_as_sounds_and_cut_away_none_of_their_pixels(spoken: Config) -> None:
    found = stats_config(spoken, steps=4)
    each = found["sources"]["all"]
    assert each["pairs"] == 10 and each["texts"] == 0 and found["images_cut"] == 0
    assert each["image_sizes"] == {"8x8": 0, "sound 1x4096": 5, "sound 1x2048": 5} and each["cut_away"] == ""
    told = describe_stats(found)
    assert "all: 0 images of 8x8\nall: 5 of sound 1x4096\nall: 5 of sound 1x2048\nno faults" in told


def test_statistics_of_arrays_among_images(config: Make) -> None:
    found = stats_config(config(), steps=16)
    each = found["sources"]["all"]
    assert each["image_sizes"] == {"8x8": 24, "sound 1x16": 18, "sound 1x8": 18}
    assert (each["pairs"], each["interleaved"], each["texts"], each["faults"]) == (24, 12, 12, {})


def test_a_plan_assumes_as_many_of_each_size_and_counts_each_as_what_it_is(config: Make) -> None:
    made = config(data={"sequence_length": 96})
    load = DocumentMix(text_tokens=48, caption_tokens=8).workload(made, rows=50)
    assert [each.shape for each in load.images] == [(1, 8, 8), (12, 1, 4), (12, 1, 2)]
    counts = [each.real for each in load.images]
    assert max(counts) - min(counts) <= 1
    pairs = [patches + 8 + 4 for patches in (4, 4, 2)]
    assert sum(counts) == round(3 * 50 * 96 / 2 / sum(pairs))
    # Of each modality one is carried, where there is none.
    texts = DocumentMix(pair_share=0.0).workload(made, rows=4)
    assert texts.images == (
        ImageLoad((1, 8, 8), 0, 1),
        ImageLoad((12, 1, 4), 0, 1, "sound"),
    )


def test_a_plan_of_sounds_leaves_their_codec_as_it_was(spoken: Config) -> None:
    made = spoken.model_copy(update={"train": spoken.train.model_copy(update={"engine": "local"})})
    plan = make_plan(made, 1)
    assert plan.network.parts["media"] > 0 and plan.memory.activations > 0 and plan.work.exact.products > 0
    assert "in pairs with image or sound, as many of each size (captions of 32 tokens)" in report(plan)
    assert json.loads(json.dumps(plan.as_dict()))["micro_batch_of_a_rank"]["images"][1][3] == "sound"
    (codec,) = open_media_codecs(made.modalities).values()
    assert type(codec.encode(torch.zeros(1, 1, 1, 4096))) is torch.Tensor


def test_the_doctor_finds_nothing_missing(spoken: Config) -> None:
    assert {finding.state for finding in look_at_run(spoken)} <= {"good", "note"}
