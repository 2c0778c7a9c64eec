"""Images as Pillow has them, to the pixels that the network takes and back.

C channels, H/W image height and width.
"""

from __future__ import annotations

import io

import torch
from PIL import Image
from torch import Tensor

from transfusion.config import Config
from transfusion.data.images.decode import decode_fitting
from transfusion.data.images.probe import MAX_PIXELS, MIN_SIDE
from transfusion.data.shards.sample import SampleError
from transfusion.errors import UserError
from transfusion.sequence.sizes import MAX_ASPECT

# What a user is told of an image that is whole, and yet none for a model.
_UNFIT = {
    "image_aspect": f"it is more than {MAX_ASPECT} times as long as wide; cut it",
    "image_too_small": f"a side has fewer than {MIN_SIDE} pixels; give a larger one",
    "image_too_large": f"it has more than {MAX_PIXELS // 10**6} million pixels; give a smaller one",
}


def read_image(data: bytes, config: Config, name: str) -> Tensor:
    """The bytes of a JPEG, PNG or WebP file as uint8 [C, H, W] of the size that it takes, as in training.

    Raises:
        UserError: For what is no image for this model. It begins with the name.
    """
    try:
        values = decode_fitting(data, config.media_sizes, channels=config.codec.channels)
    except SampleError as error:
        unread = "it is no image that can be read; give a JPEG, PNG or WebP file"
        raise UserError(f"{name}: {_UNFIT.get(str(error), unread)}") from None
    return torch.from_numpy(values)


def from_image(image: Image.Image, config: Config) -> Tensor:
    """An image of any size and mode as `read_image` gives it.

    Raises:
        UserError: For what is no image for this model.
    """
    stream = io.BytesIO()
    known = image.mode in ("1", "L", "LA", "I;16", "P", "RGB", "RGBA")
    try:
        (image if known else image.convert("RGB")).save(stream, "PNG", exif=image.getexif(), compress_level=0)
    except (OSError, ValueError, SystemError) as error:
        raise UserError(
            f"an image of mode {image.mode} and size {image.size} cannot be read: {error}"
        ) from None
    return read_image(stream.getvalue(), config, "an image")


def to_image(pixels_CHW: Tensor) -> Image.Image:
    """uint8 [C, H, W] as a grey or colour image."""
    values = pixels_CHW.cpu().numpy()
    return Image.fromarray(values[0] if values.shape[0] == 1 else values.transpose(1, 2, 0))
