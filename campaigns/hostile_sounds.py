"""Lays down shards of sound files that are odd or damaged, with a manifest of what is to become of each.

`hostile.py --sounds N` reads them. What a file is known to be was decided when it was laid down.
"""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray
from PIL import Image

from transfusion.config.sections import SAMPLE_RATE

IN_A_SHARD = 100
# One sound of so many is long and silent, which takes a second or two.
SELDOM = 200
# Of such a one, while it is decoded, and of the process.
LONG_MIB, MAX_MIB = 400, 500
# What libsndfile writes as WAV and FLAC, and what it reads but nobody asked for.
SUBTYPES = {
    "WAV": ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"),
    "WAVEX": ("PCM_16", "PCM_24", "FLOAT"),
    "RF64": ("PCM_16", "FLOAT"),
    "FLAC": ("PCM_S8", "PCM_16", "PCM_24"),
}
STRANGERS = (
    ("AIFF", "PCM_16"),
    ("OGG", "VORBIS"),
    ("MP3", "MPEG_LAYER_III"),
    ("W64", "PCM_16"),
    ("CAF", "PCM_16"),
)
RATES = (1_000, 8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000, 192_000, 384_000)
CHANNELS = (1, 1, 1, 2, 2, 6, 8)
TEN_HOURS = 10 * 3600
# What a cut or a damaged file may be told as.
CUT = "sound_truncated sound_corrupt sound_empty"
ANY = f"{CUT} sound_not_finite sound_rate sound_length sound_too_long"

# Of a sample: its members by extension, and what the manifest tells of it.
Members = dict[str, bytes]
Laid = tuple[Members, dict[str, Any]]
NOT_WHOLE = {"expect": "drop", "reason": CUT}


def lay_down(folder: Path, files: int, seed: int) -> None:
    """Write about so many files into shards, and manifest.json. The same seed, the same bytes."""
    rng, shards = random.Random(seed), {}
    for first in range(0, files, IN_A_SHARD):
        name, cases = f"{first // IN_A_SHARD:05d}.tar", []
        with tarfile.open(folder / name, "w") as tar:
            for number in range(first, min(first + IN_A_SHARD, files)):
                key = f"{number:06d}"
                case = long_silence if number % SELDOM == SELDOM - 1 else FORMS[number % len(FORMS)]
                members, facts = case(rng)
                for extension, data in members.items():
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                cases.append({"key": key, "case": case.__name__, **facts})
        shards[name] = {"samples": cases}
    manifest = {"max_mib": MAX_MIB, "samples": files, "shards": shards}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def written(
    values: NDArray[Any], rate: int = SAMPLE_RATE, kind: str = "WAV", subtype: str = "PCM_16"
) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, values, rate, format=kind, subtype=subtype)
    return stream.getvalue()


def noise(rng: random.Random, samples: int, channels: int = 1) -> NDArray[np.float32]:
    values = np.random.default_rng(rng.getrandbits(32)).uniform(-0.5, 0.5, (samples, channels))
    return values.astype(np.float32)


def pair(data: bytes, extension: str = "wav") -> Members:
    return {extension: data, "txt": b"a sound"}


def fine(samples: int, rate: int = SAMPLE_RATE) -> dict[str, Any]:
    """Of a sound that is read, as long as its samples at this rate are at 16 kHz."""
    return {"expect": "yield", "text": "a sound", "size": [-(-samples * SAMPLE_RATE // rate), 1]}


def good(rng: random.Random) -> tuple[bytes, int, int]:
    """A sound of any kind: its bytes, samples and rate."""
    kind = rng.choice(list(SUBTYPES))
    samples, rate = rng.randint(1, 5000), rng.choice(RATES)
    data = written(noise(rng, samples, rng.choice(CHANNELS)), rate, kind, rng.choice(SUBTYPES[kind]))
    return data, samples, rate


def any_kind(rng: random.Random) -> Laid:
    data, samples, rate = good(rng)
    # The extension says nothing: WAV and FLAC are told apart by their bytes.
    return pair(data, rng.choice(("wav", "flac", "WAV"))), fine(samples, rate)


def eight_bits(rng: random.Random) -> Laid:
    return pair(written(noise(rng, 3000), subtype="PCM_U8")), fine(3000)


def ninety_six_kilohertz(rng: random.Random) -> Laid:
    return pair(written(noise(rng, 9001, 2), 96_000, subtype="PCM_24")), fine(9001, 96_000)


def many_channels(rng: random.Random) -> Laid:
    channels = rng.choice((24, 24, 255, 1024))
    return pair(written(noise(rng, 500, channels), subtype="FLOAT")), fine(500)


def cut(rng: random.Random) -> Laid:
    data, *_ = good(rng)
    return pair(data[: rng.randrange(len(data))], rng.choice(("wav", "flac"))), NOT_WHOLE


def cut_behind_its_header(rng: random.Random) -> Laid:
    data, *_ = good(rng)
    return pair(data[: rng.randrange(min(len(data) - 1, 200), len(data))]), NOT_WHOLE


def no_samples(rng: random.Random) -> Laid:
    kind = rng.choice(list(SUBTYPES))
    data = written(np.zeros((0, rng.choice(CHANNELS))), kind=kind, subtype="PCM_16")
    # A FLAC without a frame is none to libsndfile.
    return pair(rng.choice((data, data, b""))), {
        "expect": "drop",
        "reason": "sound_empty sound_corrupt sound_length",
    }


def not_finite(rng: random.Random) -> Laid:
    values = noise(rng, 2000, rng.choice(CHANNELS)).astype(np.float64)
    values[rng.randrange(2000), 0] = rng.choice((np.nan, np.inf, -np.inf, 3e38, -1e300))
    with np.errstate(over="ignore"):
        data = written(values, subtype=rng.choice(("FLOAT", "DOUBLE")))
    return pair(data), {"expect": "drop", "reason": "sound_not_finite"}


def another_format(rng: random.Random) -> Laid:
    kind, subtype = rng.choice(STRANGERS)
    image = io.BytesIO()
    Image.new("RGB", (16, 16)).save(image, format=rng.choice(("PNG", "WEBP")))
    data = rng.choice(
        (
            written(noise(rng, 4000), kind=kind, subtype=subtype),
            image.getvalue(),
            b"<html>404</html>",
            rng.randbytes(900),
        )
    )
    return pair(data, rng.choice(("wav", "flac"))), {"expect": "drop", "reason": "sound_corrupt"}


def called_an_image(rng: random.Random) -> Laid:
    data, *_ = good(rng)
    extension = rng.choice(("png", "jpg", "webp"))
    return pair(data, extension), {"expect": "drop", "reason": "image_corrupt image_truncated"}


def claims_ten_hours(rng: random.Random) -> Laid:
    rate = rng.choice((8_000, 16_000, 48_000))
    if rng.random() < 0.5:
        data = bytearray(written(noise(rng, 3000), rate))
        data[40:44] = (2 * rate * TEN_HOURS).to_bytes(4, "little")
        return pair(bytes(data)), {"expect": "drop", "reason": "sound_truncated"}
    return pair(claimed(rng, rate * TEN_HOURS, rate), "flac"), {"expect": "drop", "reason": "sound_too_long"}


def tells_no_length(rng: random.Random) -> Laid:
    return pair(claimed(rng, 0), "flac"), {"expect": "drop", "reason": "sound_length"}


def claimed(rng: random.Random, samples: int, rate: int = SAMPLE_RATE) -> bytes:
    """A FLAC whose header claims so many samples. 0: it tells none."""
    data = bytearray(written(noise(rng, 3000), rate, "FLAC"))
    # The last 36 bits of these 64.
    packed = int.from_bytes(data[18:26], "big")
    data[18:26] = (packed >> 36 << 36 | samples).to_bytes(8, "big")
    return bytes(data)


def odd_rate(rng: random.Random) -> Laid:
    data = bytearray(written(noise(rng, 2000)))
    data[24:28] = rng.choice((0, 1, 999, 384_001, 4_000_000_000)).to_bytes(4, "little")
    return pair(bytes(data)), {"expect": "drop", "reason": "sound_rate sound_corrupt"}


def bits_flipped(rng: random.Random) -> Laid:
    """Of samples nobody can tell; of a header something is told, or it is read as what it says now."""
    data = bytearray(good(rng)[0])
    for _ in range(rng.randint(1, 8)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return pair(bytes(data)), {"expect": "either", "reason": ANY}


def header_overwritten(rng: random.Random) -> Laid:
    data = bytearray(good(rng)[0])
    first = rng.randrange(min(64, len(data)))
    length = rng.choice((1, 2, 4, 8))
    data[first : first + length] = rng.choice((rng.randbytes(length), bytes(length), b"\xff" * length))
    return pair(bytes(data)), {"expect": "either", "reason": ANY}


def two_sounds(rng: random.Random) -> Laid:
    data, *_ = good(rng)
    return pair(data) | {"flac": data}, {"expect": "drop", "reason": "ambiguous_media"}


def no_caption(rng: random.Random) -> Laid:
    return {"wav": good(rng)[0]}, {"expect": "drop", "reason": "caption_missing"}


def document(rng: random.Random) -> Laid:
    """A text between two sounds, of which one may be damaged."""
    elements = [
        {"type": "sound", "sound": "sound0.wav"},
        {"type": "text", "text": "a sound"},
        {"type": "sound", "sound": "sound1.flac"},
    ]
    content = json.dumps({"elements": elements}).encode()
    (one, *_), (other, *_) = good(rng), good(rng)
    is_cut = rng.random() < 0.5
    members = {"json": content, "sound0.wav": one, "sound1.flac": other[:-9] if is_cut else other}
    return members, NOT_WHOLE if is_cut else {"expect": "yield", "text": "a sound", "n_elements": 3}


def long_silence(rng: random.Random) -> Laid:
    """A FLAC of kilobytes that is millions of samples. Those of 1 kHz would be sixteen times as many at 16 kHz."""
    channels, rate, millions = rng.choice((1, 2)), rng.choice((1_000, 16_000, 48_000)), rng.randint(10, 29)
    stream = io.BytesIO()
    with soundfile.SoundFile(stream, "w", rate, channels, format="FLAC", subtype="PCM_16") as file:
        for _ in range(millions * 2 // channels):
            file.write(np.zeros((1_000_000, channels), np.int16))
    samples = millions * 2 // channels * 1_000_000
    return pair(stream.getvalue(), "flac"), {**fine(samples, rate), "max_mem_mb": LONG_MIB}


# In turn, so that a small sample has each.
FORMS: tuple[Callable[[random.Random], Laid], ...] = (
    any_kind, cut, bits_flipped, eight_bits, header_overwritten, not_finite, cut_behind_its_header, another_format,
    ninety_six_kilohertz, bits_flipped, no_samples, claims_ten_hours, many_channels, cut, tells_no_length, document,
    called_an_image, odd_rate, header_overwritten, two_sounds, no_caption,
)  # fmt: skip
