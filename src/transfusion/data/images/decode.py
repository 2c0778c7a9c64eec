"""Bytes of an image to uint8 values [C, H, W], or the reason why not. C channels, H height, W width."""

from __future__ import annotations

import functools
import importlib
import io
import warnings
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, ImageFile

from transfusion.data.images.probe import CHECKSUM, CHUNK, MAX_PIXELS, probe
from transfusion.data.shards.sample import SampleError
from transfusion.sequence.sizes import MediaSizes, Resize, Size

try:
    opencv: Any = importlib.import_module("cv2")
except ImportError:
    opencv = None

# By content, never by name; everything else Pillow can open is refused.
FORMATS = ("JPEG", "PNG", "WEBP")
# What `as_png` reads besides.
OTHER_FORMATS = ("BMP", "GIF", "TIFF", "AVIF", "PPM", "JPEG2000", "TGA")

_PNG, _PNG_HEAD, _GREY, _PALETTE = b"\x89PNG\r\n\x1a\n", 33, 0, 3
# Pixels. Compositing would take three times the memory of a larger image, where Pillow is as fast.
_MAX_FOR_OPENCV = 1 << 22
# Values of a pixel that has alpha.
_WITH_ALPHA = 4
# Colours of a palette, and how far each is transparent.
_TABLES = ([b"PLTE"], [b"PLTE", b"tRNS"])
# Where a PNG has its bits a value and its kind of pixel.
_BITS_AT, _KIND_AT = 24, 25
# Of a PNG what its pixels need.
_NEEDED = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
# So far, of 255, a profile may differ from sRGB and count as it.
_SAME_COLOUR = 2
# Where Pillow keeps what may tell how an image is turned.
_ORIENTING = frozenset(("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"))
# What turns an image of each orientation upright, and those that exchange height and width.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ON_THEIR_SIDE = (5, 6, 7, 8)
# What of a PNG may tell that it is turned, moves, or has other colours: chunks, and keywords of texts.
_TELLING_CHUNKS = (b"eXIf", b"acTL", b"iCCP")
_TELLING_TEXTS = (b"Raw profile type exif", b"XML:com.adobe.xmp")

PixelArray = NDArray[np.uint8]


def use_one_thread() -> None:
    """For one process of many: OpenCV would start a thread a core, and waiting for them costs more than they gain."""
    if opencv is not None:
        opencv.setNumThreads(1)


def decode(data: bytes, *, channels: int, image_size: int) -> PixelArray:
    """As `decode_to`, to a square."""
    return decode_to(data, Size(image_size, image_size), channels=channels)


def decode_fitting(data: bytes, sizes: MediaSizes, *, channels: int) -> PixelArray:
    """As `decode_to`, to the size that such an image takes."""
    facts = probe(data)
    size = sizes.for_image(facts.height, facts.width)
    return decode_to(data, size, turned=sizes.rotated(size), channels=channels, resize=sizes.resize)


def decode_to(
    data: bytes, size: Size, *, turned: Size | None = None, channels: int, resize: Resize = "crop"
) -> PixelArray:
    """The image as uint8 [channels, height, width]: upright, in sRGB, on white, bicubic.

    An image of that size already is not resampled. turned: the size instead of an image that was stored on its
    side. channels: 1 grey, 3 colour. resize: crop takes its middle, pad all of it on white, fit stretches it. The
    same bits with and without OpenCV. Raises SampleError.
    """
    try:
        values = _by_opencv(data)
        image, on_its_side = _read(data) if values is None else (_as_image(values), False)
        return _to_values(image, channels, turned if turned and on_its_side else size, resize)
    except SampleError:
        raise
    except Exception:
        # Of an image with colours by number and no table of them Pillow finds out last, by an assertion.
        raise SampleError("image_corrupt") from None


def _read(data: bytes) -> tuple[Image.Image, bool]:
    """As `_by_pillow`. Metadata of a PNG that Pillow stumbles over are left out."""
    for kinds in (None, (*_NEEDED, b"iCCP", b"eXIf"), _NEEDED):
        try:
            return _by_pillow(_only(kinds, data) if kinds else data)
        except SampleError:
            raise
        except Exception:
            # Pillow has errors of every kind.
            if not data.startswith(_PNG):
                break
    raise SampleError("image_corrupt")


def as_png(data: bytes) -> bytes:
    """An image of another format than those of shards as a PNG of the same colours: upright, in sRGB, its first frame.

    Raises SampleError where Pillow does not read it, or no PNG holds its values.
    """
    try:
        image, _ = _by_pillow(data, OTHER_FORMATS)
        if image.mode in ("CMYK", "YCbCr", "LAB", "HSV", "RGBX"):
            image = image.convert("RGB")
        stream = io.BytesIO()
        image.save(stream, "PNG", icc_profile=None)
    except SampleError:
        raise
    except Exception:
        # Pillow has errors of every kind for what it does not read or write.
        raise SampleError("format_not_read") from None
    return stream.getvalue()


def _by_pillow(data: bytes, formats: tuple[str, ...] = FORMATS) -> tuple[Image.Image, bool]:
    """Upright, and whether it was stored on its side. Raises whatever a broken image makes Pillow raise."""
    # Another library in the process may have switched this on; half an image is not a sample.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    with warnings.catch_warnings():
        # Pillow's limit on pixels is not ours, and odd metadata are no matter.
        warnings.simplefilter("ignore")
        image: Image.Image = Image.open(io.BytesIO(data), formats=formats)
        if image.width * image.height > MAX_PIXELS:
            raise SampleError("image_too_large")
        image.load()
        if image.format == "PNG" and "transparency" in image.info:
            _scale_transparency(image, data)
        image = _in_srgb(image)
        # Only now: text that stands behind the pixels of a PNG has been read.
        orientation = None if _ORIENTING.isdisjoint(image.info) else _orientation(image)
        if orientation in _UPRIGHT:
            image = image.transpose(_UPRIGHT[orientation])
    return image, orientation in _ON_THEIR_SIDE


def _orientation(image: Image.Image) -> int | None:
    """As its metadata tell, from 1 to 8. What cannot be read turns nothing."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:
        # Pillow has errors of every kind for broken ones.
        return None
    return value if isinstance(value, int) else None


def _scale_transparency(image: Image.Image, data: bytes) -> None:
    """The transparent colour of a PNG in the scale of the pixels; Pillow leaves it in that of the file."""
    bits, (stored, *_) = data[_BITS_AT], [body for kind, body in _chunks(data) if kind == b"tRNS"]
    if data[_KIND_AT] == _GREY and bits <= 8:
        highest = (1 << bits) - 1
        image.info["transparency"] = (int.from_bytes(stored[:2]) & highest) * 255 // highest
    elif image.mode == "RGB":
        image.info["transparency"] = tuple(stored[1:6:2])


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kinds and contents of the chunks of a whole PNG."""
    position = len(_PNG)
    while position + CHUNK.size <= len(data):
        length, kind = CHUNK.unpack_from(data, position)
        yield kind, data[position + 8 : position + 8 + length]
        position += 12 + length


def _only(kinds: Sequence[bytes], data: bytes) -> bytes:
    """A PNG with chunks of these kinds alone."""
    kept = bytearray(_PNG)
    for kind, body in _chunks(data):
        if kind in kinds:
            kept += CHUNK.pack(len(body), kind) + body + CHECKSUM.pack(zlib.crc32(kind + body))
    return bytes(kept)


def _in_srgb(image: Image.Image) -> Image.Image:
    """With the colours that its profile means; as it is without one, or with one that means nothing here."""
    profile = image.info.get("icc_profile")
    if not profile:
        return image
    if image.mode == "P":
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    colours, alpha = (image.convert("L"), image.getchannel("A")) if image.mode == "LA" else (image, None)
    transform = _to_srgb(profile, colours.mode)
    if transform is None:
        return image
    found: Image.Image = transform.apply(colours)
    found.info = {name: value for name, value in image.info.items() if name != "transparency"}
    if "transparency" in image.info:
        alpha = image.convert("RGBA").getchannel("A")
    if alpha is not None:
        found.putalpha(alpha)
    return found


@functools.lru_cache(maxsize=64)
def _to_srgb(profile: bytes, mode: str) -> Any:
    """What makes sRGB of pixels with this profile; None for sRGB itself, a broken one, and one of other modes."""
    if mode not in ("L", "RGB", "RGBA", "CMYK"):
        return None
    try:
        source = ImageCms.getOpenProfile(io.BytesIO(profile))
        goal = "RGBA" if mode == "RGBA" else "RGB"
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, goal)
        # A grid of 9 x 9 x 9 colours.
        axis = np.linspace(0, 255, 9).astype(np.uint8)
        grid = np.stack(np.meshgrid(axis, axis, axis), axis=-1).reshape(1, -1, 3)
        before = Image.fromarray(grid).convert(mode)
        after = transform.apply(before)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    there, here = (np.asarray(image.convert("RGB")).astype(int) for image in (before, after))
    return None if mode != "CMYK" and np.abs(here - there).max() <= _SAME_COLOUR else transform


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
        elif kind in _TELLING_CHUNKS or data.startswith(_TELLING_TEXTS, position + 8):
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


def _to_values(image: Image.Image, channels: int, size: Size, resize: Resize) -> PixelArray:
    mode = "L" if channels == 1 else "RGB"
    flat = _on_white(_eight_bit(image))
    if flat.mode != mode:
        flat = flat.convert(mode)
    if flat.size != (size.width, size.height):
        flat = _resized(flat, size, resize)
    if channels == 1:
        return np.array(flat)[None]
    # Pillow takes the colours of each line apart; so only whole lines are left to be moved.
    lines_HCW = np.frombuffer(flat.tobytes("raw", "RGB;L"), np.uint8).reshape(
        size.height, channels, size.width
    )
    return np.ascontiguousarray(lines_HCW.swapaxes(0, 1))


def _resized(image: Image.Image, size: Size, resize: Resize) -> Image.Image:
    whole = (size.width, size.height)
    if resize == "crop":
        image = _middle(image, size)
    if resize != "pad":
        return image.resize(whole, Image.Resampling.BICUBIC)
    columns = min(size.width, max(1, _rounded(image.width * size.height, image.height)))
    rows = min(size.height, max(1, _rounded(image.height * size.width, image.width)))
    padded = Image.new(image.mode, whole, "white")
    place = (size.width - columns) // 2, (size.height - rows) // 2
    padded.paste(image.resize((columns, rows), Image.Resampling.BICUBIC), place)
    return padded


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
    """16-bit grey scaled down, white where it is transparent; Pillow's own conversion would clip it to white."""
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.int64)
    scaled = (values >> 8).clip(0, 255).astype(np.uint8)
    if "transparency" in image.info:
        scaled[values == image.info["transparency"]] = 255
    return Image.fromarray(scaled)


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image
    with_alpha = image if image.mode == "RGBA" else image.convert("RGBA")
    flat = Image.new("RGB", image.size, (255, 255, 255))
    flat.paste(with_alpha, mask=with_alpha)
    return flat
