"""What shape the latents of an image have, known before it is encoded."""

from __future__ import annotations

import math

from transfusion.config import CodecConfig
from transfusion.schema import MediaGroup


def latent_shape(group: MediaGroup, codec: CodecConfig | None) -> tuple[int, int, int]:
    """[C, H, W] of the latents of each image of the group, known before it is encoded; codec None: pixels."""
    if group.kind == "tokens":
        # Their codec knows how deep its codes are; nothing here asks.
        return 1, *group.values.shape[1:]
    _, channels, height, width = group.values.shape
    if codec is not None and group.kind == "pixels":
        return codec.latent_shape(height, width)
    return channels, height, width


def image_elements(group: MediaGroup, codec: CodecConfig | None) -> int:
    """What each image of the group has of the image loss: numbers of its latents, or tokens."""
    shape = latent_shape(group, codec)
    return math.prod(shape[1:]) if codec is not None and codec.makes == "tokens" else math.prod(shape)
