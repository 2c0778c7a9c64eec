"""Draws images with whichever model there is: by diffusion of latents, or token by token.

I images, C channels, H/W image height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from transfusion.codec import TokenCodec
from transfusion.config import DiffusionConfig
from transfusion.generate import image_diffusion
from transfusion.generate.cache import KeyValueCache
from transfusion.generate.image_diffusion import ImageSampling
from transfusion.generate.image_tokens import draw_tokens
from transfusion.generate.runner import ModelRunner


class Drawn(NamedTuple):
    """pixels_ICHW: uint8. as_context: the same images as the reader takes them again."""

    pixels_ICHW: Tensor
    as_context: Tensor


def draw_images(
    runner: ModelRunner,
    prefixes: KeyValueCache,
    rows: Sequence[int],
    keys: Sequence[int],
    sampling: ImageSampling,
    config: DiffusionConfig,
) -> Drawn:
    """Image i continues row rows[i] of `prefixes`, from the random numbers of keys[i]; `prefixes` stays as it is."""
    codec = runner.codec
    if isinstance(codec, TokenCodec):
        token_Ihw = draw_tokens(runner, prefixes, rows, keys, sampling)
        return Drawn(codec.decode(token_Ihw), token_Ihw)
    latent_ICHW = image_diffusion.draw(runner, prefixes, rows, keys, sampling, config)
    return Drawn(codec.decode(latent_ICHW), codec.as_context(latent_ICHW))
