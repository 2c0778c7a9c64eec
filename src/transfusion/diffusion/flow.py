"""Samplers of a rectified flow: along dx / d sigma, from noise (sigma 1) to an image (0).

I images, C channels, H/W latent height and width.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from transfusion.diffusion.sampler import Denoising, Question
from transfusion.sequence.timesteps import shifted


class Euler:
    """Steps of the first order (Liu et al., 2023); one call of the network each."""

    def __init__(
        self,
        train_steps: int,
        steps: int,
        *,
        predicts: Literal["flow", "x"] = "flow",
        shift: float = 1.0,
        clip: float | None = None,
    ) -> None:
        """`steps` noise levels, evenly spaced and then shifted as in training (Esser et al., 2024, eq. 23).

        clip: bound of the clean latents at each call, for latents with a known range such as pixels.
        """
        if not 1 <= steps <= train_steps:
            raise ValueError(f"steps must lie in [1, {train_steps}], got {steps}")
        self.predicts, self.clip = predicts, clip
        self.sigmas = [shifted(1 - index / steps, shift) for index in range(steps + 1)]
        # Level (t + 1) / train_steps belongs to timestep t; levels between those of training are asked for as such.
        self.timesteps = [max(0.0, sigma * train_steps - 1) for sigma in self.sigmas[:-1]]

    def denoise(self, latent_ICHW: Tensor, key_I: Tensor) -> Denoising:
        """As in `Sampler`. No noise is drawn on the way."""
        clean_ICHW = None
        for index, timestep in enumerate(self.timesteps):
            output_ICHW = yield Question(latent_ICHW, timestep, clean_ICHW)
            velocity_ICHW = self._velocity(index, latent_ICHW, output_ICHW)
            clean_ICHW = latent_ICHW - self.sigmas[index] * velocity_ICHW
            velocity_ICHW = yield from self._corrected(index, latent_ICHW, velocity_ICHW, clean_ICHW)
            latent_ICHW = latent_ICHW + self._width(index) * velocity_ICHW
        return latent_ICHW

    @property
    def levels(self) -> list[tuple[float, float]]:
        """The factors of the image and of the noise at each level, and after the last."""
        return [(1 - sigma, sigma) for sigma in self.sigmas]

    def clean(self, index: int, latent_ICHW: Tensor, output_ICHW: Tensor) -> Tensor:
        """The clean latents that the network's answer at step `index` means."""
        return latent_ICHW - self.sigmas[index] * self._velocity(index, latent_ICHW, output_ICHW)

    def _corrected(
        self, index: int, latent_ICHW: Tensor, velocity_ICHW: Tensor, clean_ICHW: Tensor
    ) -> Denoising:
        """The velocity to go by, from that at the beginning of a step. Here it is that."""
        yield from ()
        return velocity_ICHW

    def _width(self, index: int) -> float:
        return self.sigmas[index + 1] - self.sigmas[index]

    def _velocity(self, index: int, latent_ICHW: Tensor, output_ICHW: Tensor) -> Tensor:
        """What the network's answer at a noise level means, with the clean latents within their bound."""
        if self.predicts == "flow" and self.clip is None:
            return output_ICHW
        sigma = self.sigmas[index]
        clean_ICHW = output_ICHW if self.predicts == "x" else latent_ICHW - sigma * output_ICHW
        if self.clip is not None:
            clean_ICHW = clean_ICHW.clamp(-self.clip, self.clip)
        return (latent_ICHW - clean_ICHW) / sigma


class Heun(Euler):
    """Steps of the second order (Karras et al., 2022, algorithm 1): two calls each, one in the last."""

    def _corrected(
        self, index: int, latent_ICHW: Tensor, velocity_ICHW: Tensor, clean_ICHW: Tensor
    ) -> Denoising:
        """The mean of the velocities at both ends of a step."""
        if index + 1 == len(self.timesteps):
            return velocity_ICHW
        reached_ICHW = latent_ICHW + self._width(index) * velocity_ICHW
        output_ICHW = yield Question(reached_ICHW, self.timesteps[index + 1], clean_ICHW)
        return (velocity_ICHW + self._velocity(index + 1, reached_ICHW, output_ICHW)) / 2
