"""Images judged without decoding: whole, cut, lying, too large, too small, and those that explode."""

from __future__ import annotations

import io
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from transfusion.data.images.probe import ImageFacts, probe
from transfusion.data.shards.sample import SampleError


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *more: bytes) -> bytes:
    """A PNG of this claimed size, with more chunks before its pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes(min((width + 1) * height, 1000))))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + data + chunk(b"IEND", b"")


def reason(data: bytes) -> str:
    with pytest.raises(SampleError) as told:
        probe(data)
    return str(told.value)


def encoded(kind: str, **options: object) -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, kind, **options)
    return stream.getvalue()


KINDS = {
    "png": encoded("PNG"),
    "jpeg": encoded("JPEG"),
    "progressive": encoded("JPEG", progressive=True),
    "webp": encoded("WEBP"),
    "lossless": encoded("WEBP", lossless=True),
    "extended": encoded("WEBP", exif=b"Exif\0\0" + b"x" * 21),
}


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_and_cuts(kind: str) -> None:
    data = KINDS[kind]
    assert probe(data) == ImageFacts(64, 48)
    # Four kilobytes of something else behind the end do no harm.
    assert probe(data + b"x" * 4096) == ImageFacts(64, 48)
    for length in range(len(data)):
        if length % 7 == 0 or length < 60 or length > len(data) - 4:
            told = reason(data[:length])
            assert told in ("image_empty", "image_corrupt", "image_truncated")
            assert told == "image_truncated" or length < 40


def test_a_damaged_chunk_of_a_png() -> None:
    data = bytearray(KINDS["png"])
    data[len(data) // 2] ^= 1
    assert reason(bytes(data)) == "image_corrupt"


@pytest.mark.parametrize(
    ("size", "told"),
    [
        ((1, 1), "image_too_small"),
        ((4096, 1), "image_too_small"),
        ((2000, 40), "image_aspect"),
        ((161, 8), "image_aspect"),
        ((60_000, 60_000), "image_too_large"),
        ((2**31 - 1, 2**31 - 1), "image_too_large"),
        ((0, 0), "image_corrupt"),
    ],
)
def test_sizes_outside_the_limits(size: tuple[int, int], told: str) -> None:
    assert reason(png(*size)) == told
    width, height = (min(side, 65_535) for side in size)
    jpeg = bytearray(KINDS["jpeg"])
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    assert reason(bytes(jpeg)) == told


def test_limits_themselves_are_inside() -> None:
    assert probe(png(160, 8)).width == 160
    assert probe(png(10_000, 5_000)).height == 5_000
    assert reason(png(10_000, 5_001)) == "image_too_large"
    webp = bytearray(KINDS["extended"])
    webp[24:30] = (16_383).to_bytes(3, "little") * 2
    assert reason(bytes(webp)) == "image_too_large"


@pytest.mark.parametrize(
    "bomb",
    [
        chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(1 << 21))),
        chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(1 << 21))),
        chunk(b"iTXt", b"Comment\0\1\0en\0words\0" + zlib.compress(bytes(1 << 21))),
    ],
)
def test_metadata_that_explode(bomb: bytes) -> None:
    assert reason(png(8, 8, bomb)) == "image_metadata_bomb"


def test_metadata_that_do_not() -> None:
    harmless = [
        chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(1000))),
        chunk(b"zTXt", b"Comment\0\0no deflate stream"),
        chunk(b"iTXt", b"Comment\0\0\0en\0words\0plain"),
    ]
    assert probe(png(8, 8, *harmless)) == ImageFacts(8, 8)


def test_animations_are_told() -> None:
    frames = [Image.new("RGB", (8, 8), (40 * n, 0, 0)) for n in range(3)]
    for kind in ("PNG", "WEBP"):
        stream = io.BytesIO()
        frames[0].save(stream, kind, save_all=True, append_images=frames[1:])
        assert probe(stream.getvalue()) == ImageFacts(8, 8, animated=True)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM"])
def test_other_formats_are_refused_by_content(kind: str) -> None:
    assert reason(encoded(kind)) == "image_corrupt"


def test_the_pixels_of_a_png_may_not_be_missing() -> None:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0))
    assert reason(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IEND", b"")) == "image_corrupt"


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xd8\xff" + b"\xff" * (8 << 20),
        b"\xff\xd8"
        + b"\xff\xc0\x00\x0b\x08\x00\x10\x00\x10\x01\x01\x11\x00"
        + b"\xff\xe0\x00\x02" * (1 << 20),
        png(16, 16, chunk(b"aaaa", b"") * (1 << 19)),
        b"RIFF" + struct.pack("<I", 1 << 23) + b"WEBP" + b"AAAA\0\0\0\0" * (1 << 20),
    ],
    ids=["a run of FF", "segments", "chunks", "chunks of WebP"],
)
def test_no_file_takes_long(data: bytes) -> None:
    """A server looks at what anybody sends. Eight megabytes of nothing once took six seconds."""
    begin = time.process_time()
    with pytest.raises(SampleError):
        probe(data)
    assert time.process_time() - begin < 1.0
