"""Files of sound: what is read of them, what is refused and why, and the spectrograms that the network learns."""

from __future__ import annotations

import io
import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from transfusion import train
from transfusion.codec import open_media_codecs
from transfusion.codec.mel import MelCodec, bands
from transfusion.config import Config, ModalityConfig
from transfusion.data.index.source_index import build_indexes
from transfusion.data.loading.loader import Loader
from transfusion.data.loading.validation import EvaluationLoader
from transfusion.data.prepare.prepare import prepare
from transfusion.data.shards.sample import SampleError
from transfusion.data.shards.webdataset import write_shards
from transfusion.data.sounds.files import decode_to, probe
from transfusion.observe.metrics import read_metrics
from transfusion.sequence.sizes import Size
from transfusion.sequence.tokenizer import Tokenizer

soundfile = pytest.importorskip("soundfile", reason="soundfile is not installed (extra: audio)")
pytest.importorskip("soxr", reason="soxr is not installed (extra: audio)")

MEL = {
    "name": "sound", "kind": "mel", "shapes": ["1x8192", "1x4096"], "patch": "1x1024", "scale": 0.3, "shift": -6.0,
    "diffusion": {"prediction": "flow"},
}  # fmt: skip


def tone(samples: int, hertz: float = 440.0, rate: int = 16_000) -> NDArray[np.float32]:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(samples) / rate)).astype(np.float32)


def written(values: NDArray[Any], rate: int = 16_000, kind: str = "WAV", subtype: str = "PCM_16") -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, values, rate, format=kind, subtype=subtype)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("kind", "subtype", "near"),
    [
        ("WAV", "PCM_16", 1e-4),
        ("WAV", "PCM_U8", 1e-2),
        ("WAV", "FLOAT", 0),
        ("FLAC", "PCM_24", 1e-6),
        ("RF64", "PCM_16", 1e-4),
    ],
)
def test_any_depth_is_read_and_silence_fills_up(kind: str, subtype: str, near: float) -> None:
    data = written(tone(3000), kind=kind, subtype=subtype)
    assert probe(data).samples == 3000
    values = decode_to(data, 4096)
    assert values.shape == (1, 1, 4096) and values.dtype == np.float32
    assert np.abs(values[0, 0, :3000] - tone(3000)).max() <= near and not values[0, 0, 3000:].any()


@pytest.mark.parametrize("rate", [8_000, 22_050, 96_000])
def test_any_rate_becomes_16_kilohertz(rate: int) -> None:
    data = written(tone(rate // 4, rate=rate), rate)
    assert probe(data).samples == math.ceil(rate // 4 * 16_000 / rate)
    values = decode_to(data, 4096)[0, 0]
    assert np.abs(values[400:3600] - tone(4096)[400:3600]).max() < 0.02


def test_many_channels_become_their_mean() -> None:
    channels = np.stack([tone(1000, 100.0 * (1 + number)) for number in range(24)], axis=1)
    values = decode_to(written(channels, subtype="FLOAT"), 1000)[0, 0]
    np.testing.assert_allclose(values, channels.mean(axis=1), atol=1e-6)


def _nan() -> bytes:
    values = tone(500)
    values[7] = np.nan
    return written(values, subtype="FLOAT")


def _lasting(hours: int, rate: int = 16_000) -> bytes:
    """A FLAC of a few bytes that says so, as a decompression bomb would."""
    data = bytearray(written(tone(4096), rate, kind="FLAC"))
    # The number of samples is the last 36 of 64 bits behind the sizes of blocks and frames.
    packed = int.from_bytes(data[18:26], "big")
    data[18:26] = (packed >> 36 << 36 | hours * 3600 * rate).to_bytes(8, "big")
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "sound_empty"),
        (written(tone(0)), "sound_empty"),
        (written(tone(2000))[:-1000], "sound_truncated"),
        (written(tone(2000))[:30], "sound_corrupt"),
        (written(tone(20000), kind="FLAC")[:-3000], "sound_truncated|sound_corrupt"),
        (_nan(), "sound_not_finite"),
        (_lasting(10), "sound_too_long"),
        # Few samples, until they are brought to 16 kHz.
        (_lasting(2, rate=1_000), "sound_too_long"),
        (b"ID3" + b"\0" * 500, "sound_corrupt"),
        (written(tone(2000), kind="AIFF"), "sound_corrupt"),
        (written(tone(2000), rate=500), "sound_rate"),
        (b"RIFF" + struct.pack("<I", 36) + b"WAVE" + b"\xff" * 28, "sound_corrupt"),
    ],
)
def test_what_is_no_sound_has_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(SampleError) as error:
        probe(data)
    assert str(error.value) in reason.split("|")


def test_every_cut_of_a_file_is_told(tmp_path: Path) -> None:
    whole = written(tone(300))
    for end in range(0, len(whole), 7):
        with pytest.raises(SampleError):
            probe(whole[:end])


def test_the_bands_are_those_of_transformers() -> None:
    audio = pytest.importorskip(
        "transformers.audio_utils", reason="transformers is not installed (extra: oracles)"
    )
    wanted = audio.mel_filter_bank(513, 80, 0, 8000, 16_000, norm=None, mel_scale="htk")
    np.testing.assert_allclose(bands(torch.device("cpu")).numpy(), wanted.T, atol=1e-6)


def test_a_spectrogram_is_that_of_its_formula_and_sounds_as_before() -> None:
    modality = ModalityConfig.model_validate(MEL)
    (codec,) = open_media_codecs([modality]).values()
    assert isinstance(codec, MelCodec)
    sound = torch.from_numpy(tone(8192) + 0.3 * tone(8192, 1500.0))[None, None, None]
    latents = codec.encode(sound)
    assert latents.shape == (1, *modality.latent_shape(Size(1, 8192, "sound"))) == (1, 320, 1, 8)
    # The tenth frame, by hand: samples around its middle, and the third latent has the frames 8 to 11.
    window = torch.hann_window(1024) * sound[0, 0, 0, 10 * 256 - 512 : 10 * 256 + 512]
    frame = ((bands(torch.device("cpu")) @ torch.fft.rfft(window).abs()).clamp(min=1e-5).log() + 6) * 0.3
    torch.testing.assert_close(latents[0, :, 0, 2].view(80, 4)[:, 2], frame, atol=1e-4, rtol=1e-4)
    heard = codec.decode(latents)
    assert heard.shape == sound.shape and torch.equal(heard, codec.decode(latents))
    spectrum_F = torch.fft.rfft(heard[0, 0, 0, 2048:6144]).abs()
    hertz_F = torch.arange(len(spectrum_F)) * 16_000 / 4096
    for wanted, low, high in ((440, 0, 1000), (1500, 1000, 3000)):
        among = spectrum_F * ((hertz_F >= low) & (hertz_F < high))
        assert abs(float(hertz_F[among.argmax()]) - wanted) < 0.05 * wanted
    # Silence between the tones is filled a little. What is loud stays.
    off, is_loud = (codec.encode(heard) - latents).abs(), latents > 6 * MEL["scale"]
    assert is_loud.sum() > 100 and off[is_loud].mean() < 0.2


def speech(folder: Path) -> Path:
    """Tones of two lengths with captions, as a user has them."""
    folder.mkdir()
    for number in range(12):
        name = f"tone{number:02d}"
        data = written(
            tone(3000 if number % 2 else 7000, 200.0 * (1 + number % 3)), kind="FLAC" if number % 4 else "WAV"
        )
        (folder / f"{name}.{'flac' if number % 4 else 'wav'}").write_bytes(data)
        (folder / f"{name}.txt").write_text(f"a tone, the {('low', 'middle', 'high')[number % 3]} one")
    (folder / "broken.wav").write_bytes(written(tone(2000))[:-900])
    (folder / "broken.txt").write_text("a broken one")
    (folder / "alone.wav").write_bytes(written(tone(2000)))
    return folder


@pytest.fixture
def heard(config: Callable[..., Config], tmp_path: Path) -> Callable[..., Config]:
    prepared = prepare(str(speech(tmp_path / "speech")), tmp_path / "sounds", validation=0.0)
    assert prepared.train == 12 and prepared.skipped == {"sound_truncated": 1, "caption_missing": 1}
    assert "modalities=[{name: sound, kind: mel, shapes: [1x8192], patch: 1x1024}]" in prepared.notes[0]
    return lambda **sections: config("sounds/train", **{"modalities": [MEL]} | sections)


def test_a_folder_becomes_shards_and_each_sound_the_shape_that_holds_it(
    heard: Callable[..., Config], tokenizer: Tokenizer
) -> None:
    made = heard()
    (index,) = build_indexes(made, made.data.sources, tokenizer)
    assert len(index) == 12 and index.images_by_size() == {"8x8": 0, "sound 1x8192": 6, "sound 1x4096": 6}
    assert {index.modality(sample) for sample in range(12)} == {"sound"}
    with Loader(made, made.data.sources, tokenizer, rank=0, world_size=1) as loader:
        (batch,) = loader.next_step()
    groups = [group for group in batch.media if group.modality == "sound"]
    assert {group.values.shape[1:] for group in groups} <= {(1, 1, 8192), (1, 1, 4096)}
    assert {group.patch_slot_IP.shape[1] for group in groups} <= {8, 4}


def test_a_sound_that_no_shape_holds_is_left_out(heard: Callable[..., Config], tokenizer: Tokenizer) -> None:
    made = heard(modalities=[MEL | {"shapes": ["1x4096"]}])
    (index,) = build_indexes(made, made.data.sources, tokenizer)
    assert len(index) == 6 and {fault.reason for fault in index.faults} == {"sound_too_long"}


def test_documents_hold_sounds_among_texts(
    config: Callable[..., Config], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    elements = [
        {"type": "text", "text": "hear"},
        {"type": "sound", "sound": "sound0.wav"},
        {"type": "text", "text": "!"},
    ]
    good = {"json": json.dumps({"elements": elements}).encode(), "sound0.wav": written(tone(4000))}
    both = {"wav": written(tone(4000)), "flac": written(tone(4000), kind="FLAC"), "txt": b"two"}
    write_shards([good, both, good | {"sound0.wav": b"none"}], tmp_path / "mixed")
    made = config("mixed", modalities=[MEL])
    (index,) = build_indexes(made, made.data.sources, tokenizer)
    assert len(index) == 1 and sorted(fault.reason for fault in index.faults) == [
        "ambiguous_media",
        "sound_corrupt",
    ]


def test_files_of_sound_are_faults_where_the_modality_has_other_arrays(
    heard: Callable[..., Config], tokenizer: Tokenizer
) -> None:
    other = {"name": "sound", "channels": 3, "shapes": ["1x8192"], "patch": "1x1024"}
    made = heard(modalities=[other])
    found = [batch.counts for batch in EvaluationLoader(made, made.data.sources, tokenizer, rows=1)]
    assert sum(count.faults for count in found) == 12 and not sum(count.images for count in found)


def test_it_is_learned(heard: Callable[..., Config], tmp_path: Path) -> None:
    assert train(heard(train={"precision": "fp32", "steps": 40, "threads": 1})) == 0
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    begun, ended = (sum(line["sound_loss"] for line in some) for some in (lines[:8], lines[-8:]))
    assert ended < 0.8 * begun
