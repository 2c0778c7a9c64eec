"""Bytes of a picture to uint8 values [C, H, W], or the reason why not. C channels, H height, W width."""

from __future__ import annotations

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps

from transfusion.data.probe import GREATEST_PIXELS

# By content, never by name; everything else Pillow can open is refused.
FORMATS = ("JPEG", "PNG", "WEBP")

Picture = NDArray[np.uint8]


class DecodeFault(Exception):  # noqa: N818  (no mistake of the program: one bad sample)
    """A picture that cannot be used; the message is the reason, short enough to count by."""


def decode(data: bytes, *, channels: int, image_size: int) -> Picture:
    """The picture as uint8 [channels, image_size, image_size]: upright, on white, centre square, bicubic.

    A picture of that size already is not resampled. channels: 1 grey, 3 colour. Raises DecodeFault.
    """
    with _open(data) as picture:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                picture.load()
                upright = ImageOps.exif_transpose(picture)
        except Exception:
            raise DecodeFault("image_corrupt") from None
        try:
            return _to_values(upright, channels, image_size)
        except (OSError, ValueError):
            raise DecodeFault("image_corrupt") from None


def _open(data: bytes) -> Image.Image:
    # Another library in the process may have switched this on; half a picture is not a sample.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception:
        raise DecodeFault("image_corrupt") from None
    if picture.width * picture.height > GREATEST_PIXELS:
        raise DecodeFault("image_too_large")
    return picture


def _to_values(picture: Image.Image, channels: int, image_size: int) -> Picture:
    mode = "L" if channels == 1 else "RGB"
    flat = _on_white(_eight_bit(picture)).convert(mode)
    if flat.size != (image_size, image_size):
        flat = _centre_square(flat).resize((image_size, image_size), Image.Resampling.BICUBIC)
    values = np.asarray(flat, dtype=np.uint8)
    return values[None].copy() if channels == 1 else np.ascontiguousarray(values.transpose(2, 0, 1))


def _centre_square(picture: Image.Image) -> Image.Image:
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side))


def _eight_bit(picture: Image.Image) -> Image.Image:
    """16-bit grey scaled down; Pillow's own conversion would clip it to white."""
    if picture.mode.startswith("I"):
        return Image.fromarray((np.asarray(picture).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    return picture


def _on_white(picture: Image.Image) -> Image.Image:
    if not picture.has_transparency_data:
        return picture
    with_alpha = picture.convert("RGBA")
    white = Image.new("RGBA", with_alpha.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, with_alpha)
