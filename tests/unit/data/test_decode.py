"""Images of every kind to uint8, and what is refused."""

from __future__ import annotations

import collections
import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from transfusion.data.images import decode as module
from transfusion.data.images.decode import decode, decode_to
from transfusion.data.shards.sample import SampleError
from transfusion.sequence.sizes import Size


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def grey(values: object, dtype: str = "uint8") -> Image.Image:
    return Image.fromarray(np.array(values, dtype=dtype))


def test_the_right_size_is_untouched() -> None:
    values = np.arange(64, dtype=np.uint8).reshape(8, 8)
    image = decode(encoded(Image.fromarray(values)), channels=1, image_size=8)
    assert image.shape == (1, 8, 8) and image.dtype == np.uint8
    assert np.array_equal(image[0], values)
    colour = decode(encoded(Image.fromarray(values)), channels=3, image_size=8)
    assert np.array_equal(colour, np.stack([values] * 3))


def test_other_sizes_are_cropped_to_the_centre() -> None:
    values = np.zeros((8, 16), np.uint8)
    values[:, 4:12] = 200
    assert decode(encoded(Image.fromarray(values)), channels=1, image_size=4).min() == 200


def test_all_of_an_image_may_be_kept() -> None:
    """pad: on white, in the middle. fit: stretched. What has the shape already comes out alike in all three."""
    values = np.full((8, 24), 100, np.uint8)
    values[:, 0] = values[:, -1] = 0
    wide = encoded(Image.fromarray(values))
    padded = decode_to(wide, Size(12, 12), channels=1, resize="pad")[0]
    assert (padded[:4] == 255).all() and (padded[8:] == 255).all() and (padded[4:8] < 110).all()
    assert padded[5, 0] < 60 > padded[5, -1]
    fitted = decode_to(wide, Size(12, 12), channels=1, resize="fit")[0]
    assert (fitted < 110).all() and fitted[5, 0] < 60
    assert (decode_to(wide, Size(12, 12), channels=1)[0] > 90).all()
    same = [decode_to(wide, Size(4, 12), channels=1, resize=resize) for resize in ("crop", "pad", "fit")]
    assert np.array_equal(same[0], same[1]) and np.array_equal(same[0], same[2])
    colour = decode_to(wide, Size(24, 24), channels=3, resize="pad")
    assert colour.shape == (3, 24, 24) and (colour[:, :8] == 255).all()


def test_transparency_is_white() -> None:
    image = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert decode(encoded(image), channels=3, image_size=4).min() == 255
    palette = Image.new("P", (4, 4))
    palette.info["transparency"] = 0
    assert decode(encoded(palette, transparency=0), channels=3, image_size=4).min() == 255


def test_sixteen_bits_lose_the_lower_eight() -> None:
    image = decode(encoded(grey([[0, 256], [0x7FFF, 0xFFFF]], "uint16")), channels=1, image_size=2)
    assert image[0].tolist() == [[0, 1], [127, 255]]


def test_orientation_is_applied() -> None:
    image = Image.new("RGB", (4, 4))
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 3
    turned = decode(encoded(image, exif=exif), channels=3, image_size=4)
    assert turned[0, 3, 3] == 255 and turned[0, 0, 0] == 0


def test_formats_go_by_content() -> None:
    image = Image.new("RGB", (4, 4), (200, 0, 0))
    for kind in ("JPEG", "PNG", "WEBP"):
        assert decode(encoded(image, kind), channels=3, image_size=4).shape == (3, 4, 4)
    for kind in ("GIF", "BMP", "TIFF"):
        with pytest.raises(SampleError, match="image_corrupt"):
            decode(encoded(image, kind), channels=3, image_size=4)


def test_damage_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    noise = np.random.default_rng(0).integers(0, 255, (32, 32), dtype=np.uint8)
    data = encoded(Image.fromarray(noise))
    for damaged in (data[: len(data) // 2], b"", b"text", data[:200] + b"?" * 300 + data[500:]):
        with pytest.raises(SampleError):
            decode(damaged, channels=1, image_size=32)


def test_too_many_pixels_are_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PIXELS", 15)
    with pytest.raises(SampleError, match="image_too_large"):
        decode(encoded(Image.new("L", (4, 4))), channels=1, image_size=4)


def test_on_white_is_exact() -> None:
    """Every value under every alpha, rounded to the nearest."""
    value, alpha = np.meshgrid(np.arange(256), np.arange(256))
    image = np.stack([value, value, value, alpha], -1).astype(np.uint8)
    wanted = np.rint((value * alpha + 255 * (255 - alpha)) / 255)
    assert np.array_equal(decode(encoded(Image.fromarray(image)), channels=3, image_size=256)[1], wanted)
    assert np.array_equal(decode(encoded(Image.fromarray(image)), channels=1, image_size=256)[0], wanted)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


ADAM7 = (
    (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2),
)  # fmt: skip


def random_png(chance: random.Random) -> bytes:
    """Of up to eight bits: any kind of pixel, any filters, with or without transparency, whole or damaged."""
    kind, width, height = chance.choice([0, 2, 3, 3, 4, 6]), chance.randint(8, 24), chance.randint(8, 24)
    bits = chance.choice([1, 2, 4, 8]) if kind in (0, 3) else 8
    depth, interlaced = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind], chance.random() < 0.3
    # Of each pass the first column and line, and how far apart its columns and lines stand.
    passes = ADAM7 if interlaced else ((0, 0, 1, 1),)
    lines = [
        bytes([chance.randrange(5)])
        + chance.randbytes(-(-len(range(left, width, across)) * bits // 8) * depth)
        for left, top, across, down in passes
        for _ in range(top, height, down)
        if left < width
    ]
    chunks = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, interlaced))]
    if kind == 3:
        # Also fewer than the numbers of pixels, and more than these can be.
        chunks.append(chunk(b"PLTE", chance.randbytes(3 * chance.randint(1, min(256, 2 << bits)))))
    if kind in (0, 2, 3) and chance.random() < 0.6:
        size = {0: 2, 2: 6, 3: chance.randint(1, min(200, 2 << bits))}[kind]
        chunks.append(chunk(b"tRNS", chance.randbytes(size)))
    if chance.random() < 0.2:
        exif = Image.Exif()
        exif[0x0112] = 3
        chunks.append(chunk(b"eXIf", exif.tobytes()[6:]))
    pixels = zlib.compress(b"".join(lines)[: None if chance.random() < 0.8 else -1 - depth * width])
    chunks += [chunk(b"IDAT", pixels[:40]), chunk(b"IDAT", pixels[40:]), chunk(b"IEND", b"")]
    data = bytearray(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    if chance.random() < 0.5:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(data[: len(data) if chance.random() < 0.8 else chance.randrange(len(data))])


def test_colours_by_number_without_a_table_are_a_fault() -> None:
    lines = zlib.compress((b"\0" + b"\2" * 16) * 16)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 8, 3, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", lines) + chunk(b"IEND", b"")
    for size in (8, 16):
        with pytest.raises(SampleError, match="image_corrupt"):
            decode(data, channels=3, image_size=size)


def test_opencv_gives_what_pillow_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same values, and the same refusals."""
    pytest.importorskip("cv2")
    chance = random.Random(0)

    def outcome(data: bytes, channels: int) -> list[object]:
        try:
            return decode(data, channels=channels, image_size=16).tolist()
        except SampleError as fault:
            return [str(fault)]

    used: collections.Counter[tuple[int, int]] = collections.Counter()
    for number in range(1200):
        data, channels = random_png(chance), 1 if number % 4 == 0 else 3
        if module._by_opencv(data) is not None:
            used[data[24], data[25]] += 1
        by_opencv = outcome(data, channels)
        with monkeypatch.context() as without:
            without.setattr(module, "opencv", None)
            assert outcome(data, channels) == by_opencv
    assert used.keys() == {(1, 3), (2, 3), (4, 3), (8, 2), (8, 3), (8, 4), (8, 6)}
    assert used.total() > 150
