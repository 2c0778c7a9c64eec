"""Samplers: from predicted noise at one timestep to the latents of the next.

I images, C channels, H/W latent height and width.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from transfusion.diffusion.noise import counter_normal
from transfusion.diffusion.schedule import CosineSchedule

# Streams of the counter-based noise: 0 is the start, 1 + i the noise added by step i.
START_STREAM = 0


class Sampler(Protocol):
    """A fixed list of timesteps and the update between two of them."""

    timesteps: list[int]

    def step(self, index: int, latent_ICHW: Tensor, noise_ICHW: Tensor, key_I: Tensor) -> Tensor:
        """Latents after step `index`, from those before it and the predicted noise."""


def spaced_timesteps(train_steps: int, steps: int) -> list[int]:
    """`steps` timesteps from T - 1 down, evenly spaced and ending above 0 ("trailing" spacing)."""
    return [round(train_steps - i * train_steps / steps) - 1 for i in range(steps)]


class _Spaced:
    def __init__(self, schedule: CosineSchedule, steps: int) -> None:
        if not 1 <= steps <= schedule.steps:
            raise ValueError(f"steps must lie in [1, {schedule.steps}], got {steps}")
        self.timesteps = spaced_timesteps(schedule.steps, steps)
        self._alpha_bar_T = schedule.alpha_bar_T

    def _alpha_bars(self, index: int) -> tuple[Tensor, Tensor]:
        """alpha_bar of this step's timestep and of the next one's; 1 after the last."""
        here = self._alpha_bar_T[self.timesteps[index]]
        last = index + 1 == len(self.timesteps)
        return here, torch.ones(()) if last else self._alpha_bar_T[self.timesteps[index + 1]]

    @staticmethod
    def _clean(latent: Tensor, noise: Tensor, alpha_bar: Tensor, clip: float | None) -> Tensor:
        clean = (latent - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()
        return clean if clip is None else clean.clamp(-clip, clip)


class DDPM(_Spaced):
    """Ancestral sampling with the posterior variance (Ho et al., 2020, eq. 6 and 7)."""

    def __init__(self, schedule: CosineSchedule, steps: int, *, clip: float | None = None) -> None:
        """clip: bound of the clean latents at each step, for latents with a known range such as pixels."""
        super().__init__(schedule, steps)
        self.clip = clip

    def step(self, index: int, latent_ICHW: Tensor, noise_ICHW: Tensor, key_I: Tensor) -> Tensor:
        here, following = self._alpha_bars(index)
        alpha = here / following
        beta = 1 - alpha
        clean = self._clean(latent_ICHW, noise_ICHW, here, self.clip)
        of_clean, of_latent = following.sqrt() * beta, alpha.sqrt() * (1 - following)
        mean = of_clean / (1 - here) * clean + of_latent / (1 - here) * latent_ICHW
        if index + 1 == len(self.timesteps):
            return mean
        variance = (1 - following) / (1 - here) * beta
        fresh = counter_normal(key_I, latent_ICHW.shape[1:], stream=1 + index)
        return mean + variance.clamp(min=1e-20).sqrt() * fresh


class DDIM(_Spaced):
    """Deterministic sampling (Song et al., 2021, eq. 12 with sigma = 0)."""

    def __init__(self, schedule: CosineSchedule, steps: int, *, clip: float | None = None) -> None:
        super().__init__(schedule, steps)
        self.clip = clip

    def step(self, index: int, latent_ICHW: Tensor, noise_ICHW: Tensor, key_I: Tensor) -> Tensor:
        here, following = self._alpha_bars(index)
        clean = self._clean(latent_ICHW, noise_ICHW, here, self.clip)
        if self.clip is not None:
            noise_ICHW = (latent_ICHW - here.sqrt() * clean) / (1 - here).sqrt()
        return following.sqrt() * clean + (1 - following).sqrt() * noise_ICHW


def start_noise(key_I: Tensor, shape: tuple[int, ...]) -> Tensor:
    """x_T for each key, fp32 [I, *shape]."""
    return counter_normal(key_I, shape, stream=START_STREAM)
