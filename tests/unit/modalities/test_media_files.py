"""Sounds and arrays as files: in prompts, and as what the commands write."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sounds import SOUND, npy, png, sound

from transfusion import Pipeline
from transfusion.cli.main import main
from transfusion.config import Config
from transfusion.errors import UserError
from transfusion.generate import Media
from transfusion.generate.media_files import as_file, read_media
from transfusion.sequence.sizes import Size

soundfile = pytest.importorskip("soundfile", reason="soundfile is not installed (extra: audio)")
pytest.importorskip("soxr", reason="soxr is not installed (extra: audio)")

MEL: dict[str, Any] = {
    "name": "speech", "kind": "mel", "shapes": ["1x4096", "1x2048"], "patch": "1x1024", "scale": 0.3, "shift": -6.0,
    "diffusion": {"prediction": "flow"},
}  # fmt: skip
TRACE: dict[str, Any] = {
    "name": "trace",
    "shapes": ["1x4"],
    "patch": "1x2",
    "diffusion": {"prediction": "flow"},
}


@pytest.fixture
def pipeline(config: Callable[..., Config], untrained: Callable[[Config], Pipeline]) -> Pipeline:
    """Of speech, sounds as arrays, and traces."""
    return untrained(config(modalities=[MEL, SOUND, TRACE]))


def wav(samples: int, rate: int = 16_000, kind: str = "WAV") -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, np.sin(np.arange(samples) / 9).astype(np.float32) / 2, rate, format=kind)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "RF64"])
@pytest.mark.parametrize(
    ("samples", "rate", "length"), [(2000, 16_000, 2048), (2049, 16_000, 4096), (2000, 8_000, 4096)]
)
def test_a_sound_takes_the_shortest_shape_that_holds_it(
    pipeline: Pipeline, kind: str, samples: int, rate: int, length: int
) -> None:
    read = read_media(wav(samples, rate, kind), pipeline.config, "a.bin")
    assert isinstance(read, Media) and read.modality == "speech" and read.values.shape == (1, 1, length)
    assert torch.equal(read.values[..., 2000:], torch.zeros(1, 1, 48)) == (samples == rate / 8)


def test_what_is_written_is_read_again(pipeline: Pipeline) -> None:
    spoken = Media("speech", torch.linspace(-1.5, 1, 4096)[None, None])
    made = as_file(spoken, pipeline.config)
    assert made[:2] == ("wav", "audio/wav")
    again = read_media(made.data, pipeline.config, "x")
    assert isinstance(again, Media)
    torch.testing.assert_close(again.values, spoken.values.clamp(-1, 1), atol=1e-4, rtol=0)
    heard = Media("sound", torch.from_numpy(sound(1)))
    array = as_file(heard, pipeline.config)
    assert array.suffix == "npy"
    found = read_media(array.data, pipeline.config, "0001.sound.npy")
    assert isinstance(found, Media) and found.modality == "sound" and torch.equal(found.values, heard.values)
    image = read_media(png(1), pipeline.config, "x.wav")
    assert isinstance(image, torch.Tensor) and image.shape == (1, 8, 8)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (wav(900)[:-100], "a.wav: it is cut short; give the whole file"),
        (wav(4097), "a.wav: it is longer than 0.26 s; cut it"),
        (wav(0), "a.wav: it holds no sound"),
        (b"RIFF1234", "a.wav: it is no sound that can be read; give a WAV or FLAC file"),
        (b"ID3 of something", "a.wav: it is no image that can be read"),
        (b"", "a.wav: it is no image that can be read"),
        (npy(sound(1)), "a.wav: name the file KEY.MODALITY.npy, with sound or trace as MODALITY"),
    ],
)
def test_what_cannot_be_read_is_told(pipeline: Pipeline, data: bytes, told: str) -> None:
    with pytest.raises(UserError, match=told):
        read_media(data, pipeline.config, "a.wav")


def test_a_model_without_the_modality_says_so(config: Callable[..., Config]) -> None:
    for modalities, data, told in (
        ([TRACE], wav(900), "a is a sound, and this model has no modality of kind mel"),
        ([MEL], npy(sound(1)), "a is an array, and this model has no modality of kind latents"),
    ):
        with pytest.raises(UserError, match=told):
            read_media(data, config(modalities=modalities), "a")
    with pytest.raises(UserError, match="it is no array that can be read"):
        read_media(npy(np.zeros((1, 1, 4), np.int64)), config(modalities=[TRACE]), "a.npy")
    only = read_media(npy(np.zeros((1, 1, 4), np.float16)), config(modalities=[TRACE]), "a.npy")
    assert isinstance(only, Media) and only.modality == "trace"


def test_the_commands_draw_read_and_answer_with_them(
    pipeline: Pipeline,
    begins: Callable[[Pipeline, Size], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(Pipeline, "from_export", lambda *_, **__: pipeline)
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["transfusion", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return (int(ended.value.code or 0), *capsys.readouterr())

    drawn = ("--prompt", "low", "--prompt", "high", "-n", 2, "--steps", 2, "--seed", 3, "--out", "out")
    code, told, _ = call("sample", "m", "--modality", "speech", "--size", "1x2048", *drawn)
    assert code == 0 and told.startswith("out/0000.wav to 0003.wav, and index.jsonl")
    lines = [json.loads(line) for line in Path("out/index.jsonl").read_text().splitlines()]
    assert [(line["prompt"], line["seed"]) for line in lines] == [
        ("low", 3),
        ("low", 4),
        ("high", 5),
        ("high", 6),
    ]
    values, rate = soundfile.read("out/0003.wav", dtype="float32")
    (again,) = pipeline.sample_media("speech", ["high"], seed=6, steps=2, size=(1, 2048))
    assert rate == 16_000 and np.abs(values - again.values.flatten().clamp(-1, 1).numpy()).max() < 1e-3
    # The numbers go on, whatever the files are.
    code, told, _ = call("sample", "m", "--modality", "trace", *drawn)
    assert code == 0 and told.startswith("out/0004.npy to 0007.npy")
    assert np.load("out/0004.npy").shape == (1, 1, 4)

    code, told, _ = call("caption", "m", "--json", "out/0000.wav", "--max-tokens", 3)
    assert code == 0 and set(json.loads(told)) == {"image", "caption"}

    begins(pipeline, pipeline.runner.sizes.first_of("speech"))
    asked = ("--modality", "speech", "--max-tokens", 2, "--max-images", 1, "--steps", 2)
    code, told, _ = call("generate", "m", "@out/0000.wav", "is low", "--json", *asked)
    events = [json.loads(line) for line in told.splitlines()]
    assert code == 0 and (events[0]["event"], events[0]["modality"]) == ("media", "speech")
    assert events[0]["file"] == "generated/0000.wav" and Path("generated/0000.wav").is_file()
    code, told, _ = call("generate", "m", "is low", *asked)
    assert code == 0 and "[generated/0001.wav]" in told

    for wrong, said in (
        (("sample", "m", "--modality", "speech", "--best-of", 2, *drawn[:2], "--out", "x"), "are for images"),
        (("sample", "m", "--modality", "video", *drawn[:2], "--out", "x"), "choose image or"),
        (("generate", "m", "a", "--modality", "video"), "has no modality 'video'"),
        (("generate", "m", "@out/index.jsonl"), "it is no image that can be read"),
    ):
        code, _, error = call(*wrong)
        assert code == 2 and said in error
