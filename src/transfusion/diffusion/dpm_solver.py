"""DPM-Solver++(2M): two answers of the network in each step, one of them from the step before.

I images, C channels, H/W latent height and width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from transfusion.diffusion.sampler import Denoising, Question


class Levels(Protocol):
    """What a sampler of the first order knows: its noise levels, and the image that an answer means.

    Attributes:
        timesteps: What the network is asked at.
        levels: The factors of the image and of the noise at each of them, and after the last.
    """

    @property
    def timesteps(self) -> Sequence[float]: ...

    @property
    def levels(self) -> Sequence[tuple[float, float]]: ...

    def clean(self, index: int, latent_ICHW: Tensor, output_ICHW: Tensor) -> Tensor | None:
        """The clean latents that the network's answer at step `index` means, None where it tells nothing of them."""


class DPMSolver:
    """Steps of the second order with one call of the network each (Lu et al., 2022, algorithm 2).

    The first step and the last are of the first order.

    Args:
        base: Noise levels and the meaning of answers, for the cosine schedule or for a flow.
    """

    def __init__(self, base: Levels) -> None:
        self._base = base
        self.timesteps = base.timesteps

    def denoise(self, latent_ICHW: Tensor, key_I: Tensor) -> Denoising:
        """As in `Sampler`. No noise is drawn on the way."""
        levels = self._base.levels
        shown_ICHW: Tensor | None = None
        before_ICHW, width_before = None, 0.0
        for index, timestep in enumerate(self.timesteps):
            output_ICHW = yield Question(latent_ICHW, timestep, shown_ICHW)
            (signal, noise), (next_signal, next_noise) = levels[index], levels[index + 1]
            clean_ICHW = self._base.clean(index, latent_ICHW, output_ICHW)
            width = _log_ratio(next_signal, next_noise) - _log_ratio(signal, noise)
            target_ICHW = shown_ICHW = torch.zeros_like(latent_ICHW) if clean_ICHW is None else clean_ICHW
            if clean_ICHW is not None and before_ICHW is not None and math.isfinite(width):
                target_ICHW = clean_ICHW + width / (2 * width_before) * (clean_ICHW - before_ICHW)
            before_ICHW, width_before = clean_ICHW, width
            # alpha' (1 - exp(-h)), without the difference of what is nearly equal.
            of_target = -next_signal * math.expm1(-width)
            latent_ICHW = next_noise / noise * latent_ICHW + of_target * target_ICHW
        return latent_ICHW


def _log_ratio(signal: float, noise: float) -> float:
    """lambda, half the logarithm of the signal-to-noise ratio."""
    if noise == 0:
        return math.inf
    return math.log(signal / noise) if signal else -math.inf
