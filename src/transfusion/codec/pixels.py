"""Pixels as latents: scaled to [-1, 1] and otherwise untouched.

I images, C channels, H/W height and width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def encode(pixels_ICHW: Tensor) -> Tensor:
    """uint8 pixels to fp32 latents in [-1, 1]."""
    return pixels_ICHW.float() / 127.5 - 1.0


def decode(latent_ICHW: Tensor) -> Tensor:
    """Latents to uint8 pixels; values outside the range are clipped."""
    return ((latent_ICHW.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


class PixelCodec:
    """See `interface.Codec`. Drawn latents are read again as the image that they became."""

    codebook_size, bound = 0, 1.0
    encode = staticmethod(encode)
    decode = preview = staticmethod(decode)

    @staticmethod
    def as_context(latent_ICHW: Tensor) -> Tensor:
        """The latents of the rounded pixels."""
        return encode(decode(latent_ICHW))
