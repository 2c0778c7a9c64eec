"""Images as the networks take them: in colour, on a device, and of one side, as TensorFlow 1 resized them.

I images, C channels, H/W image height and width, S the side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def resized(images: Sequence[Tensor], side: int, device: torch.device) -> Tensor:
    """float32 [I, 3, S, S], values from 0 to 255, of uint8 images [C, H, W] of any sizes, grey or in colour."""
    colour = (image.expand(3, -1, -1).to(device).float() for image in images)
    return torch.cat([resize_like_tensorflow1(each[None], side) for each in colour])


def resize_like_tensorflow1(pixels_ICHW: Tensor, side: int) -> Tensor:
    """float [I, C, S, S]: bilinear, with corners not aligned, and pixels that stand at their left upper corner.

    That is `tf.image.resize_bilinear` of TensorFlow 1, under which Inception's weights were fitted for FID. No value is
    averaged where an image shrinks.
    """
    for dimension in (3, 2):
        size = pixels_ICHW.shape[dimension]
        scale = torch.tensor(size / side, dtype=torch.float32, device=pixels_ICHW.device)
        place_S = torch.arange(side, dtype=torch.float32, device=pixels_ICHW.device) * scale
        before_S = place_S.long()
        after_S = (before_S + 1).clamp(max=size - 1)
        part_S = (place_S - before_S).view([side if each == dimension else 1 for each in range(4)])
        low_ICHW = pixels_ICHW.index_select(dimension, before_S)
        high_ICHW = pixels_ICHW.index_select(dimension, after_S)
        pixels_ICHW = low_ICHW + (high_ICHW - low_ICHW) * part_S
    return pixels_ICHW
