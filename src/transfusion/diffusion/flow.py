"""Samplers of a rectified flow: along dx / d sigma, the network's answer, from noise (sigma 1) to an image (0).

I images, C channels, H/W latent height and width.
"""

from __future__ import annotations

from torch import Tensor

from transfusion.diffusion.sampler import Denoiser
from transfusion.sequence.timesteps import shifted


class Euler:
    """Steps of the first order (Liu et al., 2023); one call of the network each."""

    def __init__(
        self, train_steps: int, steps: int, *, shift: float = 1.0, clip: float | None = None
    ) -> None:
        """`steps` noise levels, evenly spaced and then shifted as in training (Esser et al., 2024, eq. 23).

        clip: bound of the clean latents at each call, for latents with a known range such as pixels.
        """
        if not 1 <= steps <= train_steps:
            raise ValueError(f"steps must lie in [1, {train_steps}], got {steps}")
        self.clip = clip
        self.sigmas = [shifted(1 - index / steps, shift) for index in range(steps + 1)]
        # Level (t + 1) / train_steps belongs to timestep t; levels between those of training are asked for as such.
        self.timesteps = [max(0.0, sigma * train_steps - 1) for sigma in self.sigmas[:-1]]

    def sample(self, latent_ICHW: Tensor, denoise: Denoiser, key_I: Tensor) -> Tensor:
        """Clean latents from start noise; no noise is drawn on the way."""
        for index in range(len(self.timesteps)):
            latent_ICHW = self.step(index, latent_ICHW, denoise)
        return latent_ICHW

    def step(self, index: int, latent_ICHW: Tensor, denoise: Denoiser) -> Tensor:
        """Latents at sigma `index` + 1 from those at sigma `index`."""
        return latent_ICHW + self._width(index) * self._velocity(index, latent_ICHW, denoise)

    def _width(self, index: int) -> float:
        return self.sigmas[index + 1] - self.sigmas[index]

    def _velocity(self, index: int, latent_ICHW: Tensor, denoise: Denoiser) -> Tensor:
        velocity = denoise(latent_ICHW, self.timesteps[index])
        if self.clip is None:
            return velocity
        sigma = self.sigmas[index]
        clean = (latent_ICHW - sigma * velocity).clamp(-self.clip, self.clip)
        return (latent_ICHW - clean) / sigma


class Heun(Euler):
    """Steps of the second order (Karras et al., 2022, algorithm 1): two calls each, one in the last."""

    def step(self, index: int, latent_ICHW: Tensor, denoise: Denoiser) -> Tensor:
        width, first = self._width(index), self._velocity(index, latent_ICHW, denoise)
        reached = latent_ICHW + width * first
        if index + 1 == len(self.timesteps):
            return reached
        second = self._velocity(index + 1, reached, denoise)
        return latent_ICHW + width * (first + second) / 2
