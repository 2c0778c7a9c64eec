"""What stands beside the pixels of an image: profile, transparency, orientation, and what is odd or broken."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms

from transfusion.data.images.decode import decode, decode_to
from transfusion.data.images.probe import probe
from transfusion.data.shards.sample import SampleError
from transfusion.sequence.sizes import Size

SIDE = 16
RED, GREEN = (200, 40, 40), (40, 200, 40)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def plain(colour: object, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (SIDE, SIDE), colour)  # type: ignore[arg-type]


def means(data: bytes, channels: int = 3) -> list[float]:
    probe(data)
    return [
        round(float(each), 1) for each in decode(data, channels=channels, image_size=SIDE).mean(axis=(1, 2))
    ]


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(bits: int, kind: int, lines: list[list[int]], *more: bytes) -> bytes:
    """A PNG of these values, line by line. more: chunks before the pixels."""
    raw = b""
    for line in lines:
        digits = "".join(format(value, f"0{bits}b") for value in line)
        digits += "0" * (-len(digits) % 8)
        raw += b"\0" + int(digits, 2).to_bytes(len(digits) // 8)
    width = len(lines[0]) // {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind]
    head = struct.pack(">IIBBBBB", width, len(lines), bits, kind, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(raw))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(more) + pixels + chunk(b"IEND", b"")


# ---- profiles ------------------------------------------------------------------------------------------


def srgb() -> bytes:
    return bytes(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())


def exchanging() -> bytes:
    """sRGB, but red stands where green does and the other way round."""
    return srgb().replace(b"rXYZ", b"????", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"????", b"gXYZ", 1)


def linear_grey() -> bytes:
    """A profile of grey in proportion to light."""
    white = b"XYZ \0\0\0\0" + struct.pack(">iii", round(0.9642 * 65536), 65536, round(0.8249 * 65536))
    curve = b"curv\0\0\0\0" + struct.pack(">I", 0)
    table = struct.pack(">I", 2)
    table += (
        b"wtpt" + struct.pack(">II", 128 + 28, len(white)) + b"kTRC" + struct.pack(">II", 128 + 28 + 20, 12)
    )
    size = 128 + len(table) + len(white) + len(curve)
    head = struct.pack(">I4sI", size, b"lcms", 0x04300000) + b"mntrGRAYXYZ "
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28)
    head += struct.pack(">iii", round(0.9642 * 65536), 65536, round(0.8249 * 65536))
    return head.ljust(128, b"\0") + table + white + curve


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_colours_are_those_that_the_profile_means(kind: str) -> None:
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {"lossless": True}
    data = encoded(plain(RED), kind, icc_profile=exchanging(), **options)
    assert means(data) == pytest.approx(GREEN, abs=3)


def test_a_profile_beside_transparency() -> None:
    for image in (plain((*RED, 255), "RGBA"), plain(RED).quantize(4)):
        assert means(encoded(image, "PNG", icc_profile=exchanging())) == pytest.approx(GREEN, abs=3)
    assert means(encoded(plain((*RED, 0), "RGBA"), "PNG", icc_profile=exchanging())) == [255, 255, 255]
    half = means(encoded(plain((*RED, 51), "RGBA"), "PNG", icc_profile=exchanging()))
    assert half == pytest.approx([255 - (255 - value) / 5 for value in GREEN], abs=2)
    of_one_colour = encoded(plain(RED), "PNG", icc_profile=exchanging(), transparency=RED)
    assert means(of_one_colour) == [255, 255, 255]


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_a_profile_of_grey(mode: str) -> None:
    light = 0.5
    shown = 255 * (1.055 * light ** (1 / 2.4) - 0.055)
    colour = round(255 * light) if mode == "L" else (round(255 * light), 255)
    data = encoded(plain(colour, mode), "PNG", icc_profile=linear_grey())
    assert means(data) == pytest.approx([shown] * 3, abs=2)
    assert means(data, channels=1) == pytest.approx([shown], abs=2)


@pytest.mark.parametrize("profile", [srgb(), b"no profile", bytes(200), exchanging()[:300]])
def test_a_profile_that_says_nothing_new_or_nothing_at_all_changes_no_bit(profile: bytes) -> None:
    values = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    image = Image.fromarray(values)
    with_profile, without = encoded(image, "PNG", icc_profile=profile), encoded(image, "PNG")
    assert np.array_equal(
        decode(with_profile, channels=3, image_size=SIDE), decode(without, channels=3, image_size=SIDE)
    )


def test_a_profile_of_colour_beside_grey_pixels_is_passed_over() -> None:
    assert means(encoded(plain(77, "L"), "PNG", icc_profile=exchanging())) == [77, 77, 77]


# ---- transparency --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_transparent_grey_is_white_whatever_the_bits(bits: int) -> None:
    highest = (1 << bits) - 1
    for transparent in {0, 1, highest // 2, highest}:
        levels = [min(transparent, highest), (transparent + 1) & highest] * (SIDE // 2)
        data = png(bits, 0, [levels] * SIDE, chunk(b"tRNS", struct.pack(">H", transparent)))
        wanted = [
            255 if level == transparent else (level >> 8 if bits == 16 else level * 255 // highest)
            for level in levels
        ]
        for channels in (1, 3):
            found = decode(data, channels=channels, image_size=SIDE)
            assert found[0, 0].tolist() == wanted and (found == found[0, 0]).all()


def test_bits_of_a_transparent_colour_beyond_those_of_a_pixel_say_nothing() -> None:
    dark = png(1, 0, [[0] * SIDE] * SIDE, chunk(b"tRNS", struct.pack(">H", 2)))
    assert means(dark) == [255, 255, 255]
    data = png(8, 0, [[7] * SIDE] * SIDE, chunk(b"tRNS", struct.pack(">H", 0x0107)))
    assert means(data) == [255, 255, 255]


def test_a_transparent_colour_is_white() -> None:
    transparent, other = [10, 20, 30], [10, 20, 31]
    more = chunk(b"tRNS", struct.pack(">3H", *transparent))
    found = decode(png(8, 2, [(transparent + other) * (SIDE // 2)] * SIDE, more), channels=3, image_size=SIDE)
    assert found[:, 0, 0].tolist() == [255, 255, 255] and found[:, 0, 1].tolist() == [10, 20, 31]


def test_a_transparent_colour_that_only_lower_bits_tell_is_refused_by_name() -> None:
    data = png(16, 2, [[300, 700, 900] * SIDE] * SIDE, chunk(b"tRNS", struct.pack(">3H", 300, 700, 900)))
    with pytest.raises(SampleError, match="image_transparency"):
        probe(data)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_transparent_entry_of_a_palette_is_white(bits: int) -> None:
    data = png(
        bits,
        3,
        [[0, 1] * (SIDE // 2)] * SIDE,
        chunk(b"PLTE", bytes((9, 8, 7, 6, 5, 4))),
        chunk(b"tRNS", b"\0"),
    )
    found = decode(data, channels=3, image_size=SIDE)
    assert found[:, 0, 0].tolist() == [255, 255, 255] and found[:, 0, 1].tolist() == [6, 5, 4]


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("kind", [4, 6])
def test_alpha_is_blended_with_white(kind: int, bits: int) -> None:
    highest = (1 << bits) - 1
    colours = [0] if kind == 4 else [0, 0, 0]
    data = png(bits, kind, [[*colours, 0, *colours, highest] * (SIDE // 2)] * SIDE)
    found = decode(data, channels=3, image_size=SIDE)
    assert found[0, 0].tolist() == [255, 0] * (SIDE // 2)


# ---- orientation and broken metadata -------------------------------------------------------------------


def corner(data: bytes) -> NDArray[np.uint8]:
    """One light corner of an image twice as wide as high, by rows of its quarters."""
    values = decode_to(data, Size(SIDE, 2 * SIDE), turned=Size(2 * SIDE, SIDE), channels=1)[0]
    high, wide = (side // 2 for side in values.shape)
    return (values.reshape(2, high, 2, wide).mean(axis=(1, 3)) > 128).astype(np.uint8)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_every_orientation(kind: str) -> None:
    image = Image.new("L", (2 * SIDE, SIDE))
    image.paste(255, (0, 0, SIDE, SIDE // 2))
    stored = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}
    for orientation, place in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        found = corner(encoded(image.convert("RGB"), kind, exif=exif))
        assert found[place] == 1 and found.sum() == 1, orientation


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_turns_nothing(value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    assert means(encoded(plain(RED), "PNG", exif=exif)) == list(RED)


def test_an_orientation_beside_a_tag_that_cannot_be_written_still_counts() -> None:
    image = Image.new("L", (2 * SIDE, SIDE))
    image.paste(255, (0, 0, SIDE, SIDE // 2))
    # Orientation 6, then a tag whose text lies beyond the end.
    tags = (
        struct.pack("<H", 2)
        + struct.pack("<HHII", 0x0112, 3, 1, 6)
        + struct.pack("<HHII", 0x010F, 2, 999, 9999)
    )
    exif = b"Exif\0\0II*\0" + struct.pack("<I", 8) + tags + bytes(4)
    found = corner(encoded(image.convert("RGB"), "JPEG", exif=exif))
    assert found[0, 1] == 1 and found.sum() == 1


TEXTS = {
    "the repr of bytes": b"Raw profile type exif\0\nexif\n      12\nb'Exif\\x00\\x00MM'",
    "no digits": b"Raw profile type exif\0\nexif\n      12\nzzzz",
    "nothing": b"Raw profile type exif\0",
    "torn XMP": b"XML:com.adobe.xmp\0<x tiff:Orientation=",
    "an orientation of letters": b'XML:com.adobe.xmp\0<x tiff:Orientation="six"/>',
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_text_that_only_seems_to_turn_an_image(text: bytes) -> None:
    data = png(8, 2, [list(RED) * SIDE] * SIDE, chunk(b"tEXt", text))
    assert means(data) == list(RED)


@pytest.mark.parametrize(
    "exif", [b"", b"Exif\0\0", b"Exif\0\0II*\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"?" * 100]
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_torn_exif_turns_nothing(kind: str, exif: bytes) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(plain(RED), kind, exif=exif, **options)
    assert means(data) == pytest.approx(RED, abs=3)


BROKEN_CHUNKS = {
    "a text compressed in an unknown way": chunk(b"zTXt", b"Comment\0\1\7\xf2"),
    "a text without a name": chunk(b"zTXt", b"\0\1\7\xf2"),
    "a short density": chunk(b"pHYs", b"\0\0"),
    "a short gamma": chunk(b"gAMA", b"\0"),
    "a short profile": chunk(b"iCCP", b"x\0\1"),
}


@pytest.mark.parametrize("broken", BROKEN_CHUNKS.values(), ids=BROKEN_CHUNKS)
def test_a_broken_chunk_beside_good_pixels_changes_nothing(broken: bytes) -> None:
    assert means(png(8, 2, [list(RED) * SIDE] * SIDE, broken)) == list(RED)
    profile = chunk(b"iCCP", b"x\0\0" + zlib.compress(exchanging()))
    if b"iCCP" not in broken:
        assert means(png(8, 2, [list(RED) * SIDE] * SIDE, profile, broken)) == pytest.approx(GREEN, abs=2)


@pytest.mark.parametrize("junk", [b"\0\0", b"\x12\x34\x56", b"\xff\0\xff\0", b"\xff" * 9, b"text between"])
def test_junk_between_the_markers_of_a_jpeg_is_passed_over(junk: bytes) -> None:
    data = encoded(plain(RED), "JPEG")
    length = int.from_bytes(data[4:6])
    odd = data[: 4 + length] + junk + data[4 + length :]
    assert means(odd) == means(data)


def test_a_jpeg_of_markers_alone_is_no_image() -> None:
    for data in (
        b"\xff\xd8\xff" + bytes(1 << 20),
        b"\xff\xd8" + b"\xff" * (1 << 20),
        b"\xff\xd8" + b"\xff\0" * (1 << 19),
    ):
        with pytest.raises(SampleError, match=r"image_(truncated|corrupt)"):
            probe(data)
