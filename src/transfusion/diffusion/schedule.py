"""The cosine schedule (Nichol and Dhariwal, 2021), as the paper uses it: T steps, betas capped at 0.999."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

OFFSET = 0.008
LARGEST_BETA = 0.999


class CosineSchedule:
    """alpha_bar of each timestep: t in [0, steps) is the noise after t + 1 steps of the forward process."""

    def __init__(self, steps: int = 1000) -> None:
        self.steps = steps
        self.alpha_bar_T = _alpha_bar(steps)

    def signal_and_noise(self, timestep_I: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alpha_bar) and sqrt(1 - alpha_bar), fp32 [I], on the timesteps' device."""
        alpha_bar = self.alpha_bar_T.to(timestep_I.device)[timestep_I]
        return alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt()

    def add_noise(self, clean_ICHW: Tensor, noise_ICHW: Tensor, timestep_I: Tensor) -> Tensor:
        """x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps (paper, eq. 2)."""
        signal, noise = (c[:, None, None, None] for c in self.signal_and_noise(timestep_I))
        return signal * clean_ICHW + noise * noise_ICHW


@lru_cache(maxsize=8)
def _alpha_bar(steps: int) -> Tensor:
    """fp32 [T], accumulated as the oracles do: betas in fp32, then a running product."""

    def survival(time: float) -> float:
        return math.cos((time + OFFSET) / (1 + OFFSET) * math.pi / 2) ** 2

    betas = [min(1 - survival((t + 1) / steps) / survival(t / steps), LARGEST_BETA) for t in range(steps)]
    return torch.cumprod(1.0 - torch.tensor(betas, dtype=torch.float32), dim=0)
