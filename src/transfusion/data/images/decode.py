"""Bytes of an image to uint8 values [C, H, W], or the reason why not. C channels, H height, W width."""

from __future__ import annotations

import importlib
import io
import warnings
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, ImageOps

from transfusion.data.images.probe import CHECKSUM, CHUNK, MAX_PIXELS, probe
from transfusion.data.shards.sample import SampleError
from transfusion.sequence.sizes import ImageSizes, Size

try:
    opencv: Any = importlib.import_module("cv2")
except ImportError:
    opencv = None

# By content, never by name; everything else Pillow can open is refused.
FORMATS = ("JPEG", "PNG", "WEBP")

_PNG, _PNG_HEAD, _GREY, _PALETTE = b"\x89PNG\r\n\x1a\n", 33, 0, 3
# Pixels. Compositing would take three times the memory of a larger image, where Pillow is as fast.
_MAX_FOR_OPENCV = 1 << 22
# Values of a pixel that has alpha.
_WITH_ALPHA = 4
# Colours of a palette, and how far each is transparent.
_TABLES = ([b"PLTE"], [b"PLTE", b"tRNS"])
# Where Pillow keeps what may tell how an image is turned.
_ORIENTING = frozenset(("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"))
# Orientations that exchange height and width.
_ON_THEIR_SIDE = (5, 6, 7, 8)
# What of a PNG may tell that it is turned, or moves: chunks, and keywords of texts.
_TURNING_CHUNKS = (b"eXIf", b"acTL")
_TURNING_TEXTS = (b"Raw profile type exif", b"XML:com.adobe.xmp")

PixelArray = NDArray[np.uint8]


def use_one_thread() -> None:
    """For one process of many: OpenCV would start a thread a core, and waiting for them costs more than they gain."""
    if opencv is not None:
        opencv.setNumThreads(1)


def decode(data: bytes, *, channels: int, image_size: int) -> PixelArray:
    """As `decode_to`, to a square."""
    return decode_to(data, Size(image_size, image_size), channels=channels)


def decode_fitting(data: bytes, sizes: ImageSizes, *, channels: int) -> PixelArray:
    """As `decode_to`, to the size that such an image takes."""
    facts = probe(data)
    size = sizes.for_image(facts.height, facts.width)
    return decode_to(data, size, turned=sizes.rotated(size), channels=channels)


def decode_to(data: bytes, size: Size, *, turned: Size | None = None, channels: int) -> PixelArray:
    """The image as uint8 [channels, height, width]: upright, on white, its middle cut to the shape, bicubic.

    An image of that size already is not resampled. turned: the size instead of an image that was stored on its
    side. channels: 1 grey, 3 colour. Raises SampleError. The same bits with and without OpenCV.
    """
    try:
        values = _by_opencv(data)
        image, on_its_side = _by_pillow(data) if values is None else (_as_image(values), False)
        return _to_values(image, channels, turned if turned and on_its_side else size)
    except SampleError:
        raise
    except Exception:
        # Of an image with colours by number and no table of them Pillow finds out last, by an assertion.
        raise SampleError("image_corrupt") from None


def _by_pillow(data: bytes) -> tuple[Image.Image, bool]:
    """Upright, and whether it was stored on its side. Raises whatever a broken image makes Pillow raise."""
    # Another library in the process may have switched this on; half an image is not a sample.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    with warnings.catch_warnings():
        # Pillow's limit on pixels is not ours, and odd metadata are no matter.
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise SampleError("image_too_large")
        image.load()
        on_its_side = False
        # Only now: text that stands behind the pixels of a PNG has been read.
        if not _ORIENTING.isdisjoint(image.info):
            on_its_side = image.getexif().get(ExifTags.Base.Orientation) in _ON_THEIR_SIDE
            ImageOps.exif_transpose(image, in_place=True)
    return image, on_its_side


def _by_opencv(data: bytes) -> PixelArray | None:
    """Values of a plain PNG of eight bits or fewer, faster than by Pillow; None where that is not sure to be the same.

    Of a PNG the width stands at 16, the height at 20, the bits of a value at 24, the kind of pixel at 25.
    """
    if opencv is None or len(data) < _PNG_HEAD or not data.startswith(_PNG):
        return None
    pixels, bits, kind = int.from_bytes(data[16:20]) * int.from_bytes(data[20:24]), data[24], data[25]
    if pixels > _MAX_FOR_OPENCV or kind == _GREY or (bits != 8 and kind != _PALETTE):
        return None
    if not _is_plain(data):
        return None
    values: PixelArray | None = opencv.imdecode(np.frombuffer(data, np.uint8), opencv.IMREAD_UNCHANGED)
    # What OpenCV refuses Pillow judges.
    return None if values is None or values.dtype != np.uint8 or values.ndim != 3 else values


def _as_image(values_HWC: PixelArray) -> Image.Image:
    """Blue, green, red, and alpha if there is one, on white: 255 - (255 - colour) alpha / 255, as Pillow's `paste`."""
    height, width, depth = values_HWC.shape
    order = "BGR"
    if depth == _WITH_ALPHA:
        alpha = opencv.cvtColor(opencv.extractChannel(values_HWC, 3), opencv.COLOR_GRAY2BGRA)
        flat: PixelArray = opencv.bitwise_not(values_HWC)
        opencv.multiply(flat, alpha, flat, 1 / 255)
        opencv.bitwise_not(flat, flat)
        # What the fourth value is now means nothing.
        values_HWC, order = flat, "BGRX"
    return Image.frombuffer("RGB", (width, height), values_HWC, "raw", order, 0, 1)


def _is_plain(data: bytes) -> bool:
    """Whether the chunks of a PNG hold nothing that OpenCV takes in another way than Pillow.

    It passes over what turns an image or lets it move, and takes a damaged or misplaced transparency as it is.
    """
    tables: list[tuple[bytes, int]] = []
    position, pixels, size, read = len(_PNG), False, len(data), CHUNK.unpack_from
    while position + CHUNK.size <= size:
        length, kind = read(data, position)
        end = position + 12 + length
        if kind == b"IEND":
            break
        if end > size:
            return False
        if kind == b"IDAT":
            pixels = True
        elif kind in _TURNING_CHUNKS or data.startswith(_TURNING_TEXTS, position + 8):
            return False
        elif kind in (b"PLTE", b"tRNS"):
            if pixels:
                return False
            tables.append((kind, length // (3 if kind == b"PLTE" else 1)))
        if not pixels and zlib.crc32(data[position + 4 : end - 4]) != CHECKSUM.unpack_from(data, end - 4)[0]:
            return False
        position = end
    else:
        return False
    if data[25] != _PALETTE:
        return pixels and not tables
    if [kind for kind, _ in tables] not in _TABLES:
        return False
    (_, colours), *transparency = tables
    # OpenCV cuts off colours beyond what the bits can tell, and leaves out a transparency longer than what is left.
    return pixels and all(count <= min(colours, 1 << data[24]) for _, count in transparency)


def _to_values(image: Image.Image, channels: int, size: Size) -> PixelArray:
    mode = "L" if channels == 1 else "RGB"
    flat = _on_white(_eight_bit(image))
    if flat.mode != mode:
        flat = flat.convert(mode)
    if flat.size != (size.width, size.height):
        flat = _middle(flat, size).resize((size.width, size.height), Image.Resampling.BICUBIC)
    if channels == 1:
        return np.array(flat)[None]
    # Pillow takes the colours of each line apart; so only whole lines are left to be moved.
    lines_HCW = np.frombuffer(flat.tobytes("raw", "RGB;L"), np.uint8).reshape(
        size.height, channels, size.width
    )
    return np.ascontiguousarray(lines_HCW.swapaxes(0, 1))


def _middle(image: Image.Image, size: Size) -> Image.Image:
    """As much of an image as has the shape of the size, to the nearest pixel."""
    rows = min(image.height, max(1, _rounded(image.width * size.height, size.width)))
    columns = min(image.width, max(1, _rounded(image.height * size.width, size.height)))
    if image.size == (columns, rows):
        return image
    top, left = (image.height - rows) // 2, (image.width - columns) // 2
    return image.crop((left, top, left + columns, top + rows))


def _rounded(dividend: int, divisor: int) -> int:
    return (dividend + divisor // 2) // divisor


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit grey scaled down; Pillow's own conversion would clip it to white."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    return image


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image
    with_alpha = image if image.mode == "RGBA" else image.convert("RGBA")
    flat = Image.new("RGB", image.size, (255, 255, 255))
    flat.paste(with_alpha, mask=with_alpha)
    return flat
