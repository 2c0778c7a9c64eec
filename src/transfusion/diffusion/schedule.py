"""How much of an image and how much noise there is at each timestep: x_t = signal x_0 + noise eps."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import lru_cache

import torch
from torch import Tensor

OFFSET = 0.008
MAX_BETA = 0.999


class Schedule(ABC):
    """Timesteps in [0, steps), from little noise to much."""

    steps: int

    @abstractmethod
    def signal_and_noise(self, timestep_I: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of the image and of the noise, fp32 [I], on the timesteps' device."""

    def add_noise(self, clean_ICHW: Tensor, noise_ICHW: Tensor, timestep_I: Tensor) -> Tensor:
        """x_t of each image (paper, eq. 2)."""
        signal, noise = self.factors(timestep_I)
        return signal * clean_ICHW + noise * noise_ICHW

    def factors(self, timestep_I: Tensor) -> tuple[Tensor, Tensor]:
        """`signal_and_noise` as [I, 1, 1, 1]."""
        signal_I, noise_I = self.signal_and_noise(timestep_I)
        return signal_I[:, None, None, None], noise_I[:, None, None, None]


class CosineSchedule(Schedule):
    """The cosine schedule (Nichol and Dhariwal, 2021), as the paper uses it: betas capped at 0.999.

    Timestep t is the noise after t + 1 steps of the forward process; the factors are sqrt(alpha_bar) and
    sqrt(1 - alpha_bar).
    """

    def __init__(self, steps: int = 1000) -> None:
        self.steps = steps
        self.alpha_bar_T = _alpha_bar(steps)

    def signal_and_noise(self, timestep_I: Tensor) -> tuple[Tensor, Tensor]:
        alpha_bar = self.alpha_bar_T.to(timestep_I.device)[timestep_I]
        return alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt()


class RectifiedFlowSchedule(Schedule):
    """Rectified flow (Liu et al., 2023): 1 - sigma and sigma, with sigma = (t + 1) / steps."""

    def __init__(self, steps: int = 1000) -> None:
        self.steps = steps

    def signal_and_noise(self, timestep_I: Tensor) -> tuple[Tensor, Tensor]:
        sigma_I = (timestep_I + 1).float() / self.steps
        return 1.0 - sigma_I, sigma_I


@lru_cache(maxsize=8)
def _alpha_bar(steps: int) -> Tensor:
    """fp32 [T], accumulated as the oracles do: betas in fp32, then a running product."""

    def survival(time: float) -> float:
        return math.cos((time + OFFSET) / (1 + OFFSET) * math.pi / 2) ** 2

    betas = [min(1 - survival((t + 1) / steps) / survival(t / steps), MAX_BETA) for t in range(steps)]
    return torch.cumprod(1.0 - torch.tensor(betas, dtype=torch.float32), dim=0)
