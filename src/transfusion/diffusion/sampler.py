"""Samplers under the cosine schedule: from the network's answer at one timestep to the latents of the next.

I images, C channels, H/W latent height and width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from transfusion.diffusion.noise import counter_normal
from transfusion.diffusion.schedule import CosineSchedule

# The network under guidance: its answer to latents [I, C, H, W] at one timestep, which may lie between two of training.
Denoiser = Callable[[Tensor, float], Tensor]

# Streams of the counter-based noise: 0 is the start, 1 + i the noise added by step i.
START_STREAM = 0
# Below this alpha_bar (a hundredth of the image's scale) a predicted noise says nothing of an image that has no bound:
# its error would be divided by next to nothing.
MIN_ALPHA_BAR = 1e-4


class Question(NamedTuple):
    """What a sampler asks the network.

    Attributes:
        latent_ICHW: Noisy latents.
        timestep: Theirs. It may lie between two of training.
        clean_ICHW: The clean latents as the answer before let them be predicted, None at first.
    """

    latent_ICHW: Tensor
    timestep: float
    clean_ICHW: Tensor | None


# From question to answer, the network's output for the latents asked about. Returns the clean latents.
Denoising = Generator[Question, Tensor, Tensor]


class Sampler(Protocol):
    """A way from pure noise to an image."""

    def denoise(self, latent_ICHW: Tensor, key_I: Tensor) -> Denoising:
        """Ask for what leads from start noise to clean latents. Noise on the way is drawn from the keys."""


def sample(sampler: Sampler, latent_ICHW: Tensor, network: Denoiser, key_I: Tensor) -> Tensor:
    """Clean latents from start noise, each question answered by the network at once."""
    denoising = sampler.denoise(latent_ICHW, key_I)
    question = next(denoising)
    while True:
        try:
            question = denoising.send(network(question.latent_ICHW, question.timestep))
        except StopIteration as finished:
            clean_ICHW: Tensor = finished.value
            return clean_ICHW


def spaced_timesteps(train_steps: int, steps: int) -> list[int]:
    """`steps` timesteps from T - 1 down, evenly spaced and ending above 0 ("trailing" spacing)."""
    return [round(train_steps - i * train_steps / steps) - 1 for i in range(steps)]


class SpacedSampler:
    """What the samplers share: timesteps, and the image and noise that an answer means."""

    def __init__(
        self,
        schedule: CosineSchedule,
        steps: int,
        *,
        predicts: Literal["epsilon", "v"] = "epsilon",
        clip: float | None = None,
        min_alpha_bar: float = 0.0,
    ) -> None:
        """clip: bound of the clean latents at each step, for latents with a known range such as pixels.

        min_alpha_bar: below it a predicted noise is not asked for the image, which is taken for the mean, 0; with 0,
        the sampler of the papers.
        """
        if not 1 <= steps <= schedule.steps:
            raise ValueError(f"steps must lie in [1, {schedule.steps}], got {steps}")
        self.timesteps = spaced_timesteps(schedule.steps, steps)
        self.predicts, self.clip, self.min_alpha_bar = predicts, clip, min_alpha_bar
        self._alpha_bar_T = schedule.alpha_bar_T

    def denoise(self, latent_ICHW: Tensor, key_I: Tensor) -> Denoising:
        clean_ICHW = None
        for index, timestep in enumerate(self.timesteps):
            output_ICHW = yield Question(latent_ICHW, timestep, clean_ICHW)
            latent_ICHW, clean_ICHW = self.step(index, latent_ICHW, output_ICHW, key_I)
        return latent_ICHW

    def step(
        self, index: int, latent_ICHW: Tensor, output_ICHW: Tensor, key_I: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Latents after step `index`, from those before it and the network's answer, and the clean ones it means."""
        raise NotImplementedError

    @property
    def levels(self) -> list[tuple[float, float]]:
        """The factors of the image and of the noise at each timestep, and after the last."""
        alpha_bars = [float(self._alpha_bar_T[timestep]) for timestep in self.timesteps] + [1.0]
        return [(math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)) for alpha_bar in alpha_bars]

    def clean(self, index: int, latent_ICHW: Tensor, output_ICHW: Tensor) -> Tensor | None:
        """The clean latents that the network's answer at step `index` means, None where it tells nothing of them."""
        here, following = self._alpha_bars(index)
        return (
            None
            if self._is_blind(here, following)
            else self._clean(latent_ICHW, output_ICHW, here, following)
        )

    def _is_blind(self, alpha_bar: Tensor, following: Tensor) -> bool:
        return self.predicts == "epsilon" and bool(alpha_bar < self.min_alpha_bar and following < 1)

    def _alpha_bars(self, index: int) -> tuple[Tensor, Tensor]:
        """alpha_bar of this step's timestep and of the next one's; 1 after the last."""
        here = self._alpha_bar_T[self.timesteps[index]]
        last = index + 1 == len(self.timesteps)
        return here, torch.ones(()) if last else self._alpha_bar_T[self.timesteps[index + 1]]

    def _clean(self, latent: Tensor, output: Tensor, alpha_bar: Tensor, following: Tensor) -> Tensor:
        if self.predicts == "v":
            clean = alpha_bar.sqrt() * latent - (1 - alpha_bar).sqrt() * output
        elif self._is_blind(alpha_bar, following):
            clean = torch.zeros_like(latent)
        else:
            clean = (latent - (1 - alpha_bar).sqrt() * output) / alpha_bar.sqrt()
        return clean if self.clip is None else clean.clamp(-self.clip, self.clip)

    def _noise(self, latent: Tensor, output: Tensor, clean: Tensor, alpha_bar: Tensor) -> Tensor:
        if self.clip is not None:
            return (latent - alpha_bar.sqrt() * clean) / (1 - alpha_bar).sqrt()
        if self.predicts == "v":
            return alpha_bar.sqrt() * output + (1 - alpha_bar).sqrt() * latent
        return output


class DDPM(SpacedSampler):
    """Ancestral sampling with the posterior variance (Ho et al., 2020, eq. 6 and 7)."""

    def step(
        self, index: int, latent_ICHW: Tensor, output_ICHW: Tensor, key_I: Tensor
    ) -> tuple[Tensor, Tensor]:
        here, following = self._alpha_bars(index)
        alpha = here / following
        beta = 1 - alpha
        clean_ICHW = self._clean(latent_ICHW, output_ICHW, here, following)
        of_clean, of_latent = following.sqrt() * beta, alpha.sqrt() * (1 - following)
        mean = of_clean / (1 - here) * clean_ICHW + of_latent / (1 - here) * latent_ICHW
        if index + 1 == len(self.timesteps):
            return mean, clean_ICHW
        variance = (1 - following) / (1 - here) * beta
        fresh = counter_normal(key_I, latent_ICHW.shape[1:], stream=1 + index)
        return mean + variance.clamp(min=1e-20).sqrt() * fresh, clean_ICHW


class DDIM(SpacedSampler):
    """Deterministic sampling (Song et al., 2021, eq. 12 with sigma = 0)."""

    def step(
        self, index: int, latent_ICHW: Tensor, output_ICHW: Tensor, key_I: Tensor
    ) -> tuple[Tensor, Tensor]:
        here, following = self._alpha_bars(index)
        clean_ICHW = self._clean(latent_ICHW, output_ICHW, here, following)
        noise = self._noise(latent_ICHW, output_ICHW, clean_ICHW, here)
        return following.sqrt() * clean_ICHW + (1 - following).sqrt() * noise, clean_ICHW


def start_noise(key_I: Tensor, shape: tuple[int, ...]) -> Tensor:
    """x_T for each key, fp32 [I, *shape]."""
    return counter_normal(key_I, shape, stream=START_STREAM)


def guide(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance (Ho and Salimans, 2022); scale 1 is the conditional prediction."""
    return unconditional + scale * (conditional - unconditional)


def rescale(guided_ICHW: Tensor, conditional_ICHW: Tensor, share: float) -> Tensor:
    """A guided prediction drawn towards the deviation of the conditional one, image by image (Lin et al., 2023, 3.4).

    share: 0 leaves it as it is, 1 gives it that deviation.
    """
    deviation, goal = (x.std(dim=(1, 2, 3), keepdim=True) for x in (guided_ICHW, conditional_ICHW))
    return (1 - share) * guided_ICHW + share * guided_ICHW * (goal / deviation)
