"""Noise prediction: what the network sees, what it must answer, and how wrong it was.

I images, C channels, H/W latent height and width, K timestep buckets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from transfusion.config import DiffusionConfig
from transfusion.diffusion.noise import counter_normal
from transfusion.diffusion.schedule import CosineSchedule
from transfusion.schema import TIMESTEP_BUCKETS


class NoisedImages(NamedTuple):
    """noisy and target, fp32 [I, C, H, W]: the corrupted latents and the noise in them."""

    noisy: Tensor
    target: Tensor


@dataclass(frozen=True, slots=True)
class ImageLoss:
    """Squared error summed over elements and their count, in all ([]) and by timestep bucket ([K]); fp32."""

    total: Tensor
    count: Tensor
    bucket_total_K: Tensor
    bucket_count_K: Tensor


class NoiseObjective:
    """Epsilon prediction under a schedule (paper, eq. 3); one timestep an image."""

    def __init__(self, config: DiffusionConfig) -> None:
        self.schedule = CosineSchedule(config.steps)

    def corrupt(self, clean_ICHW: Tensor, timestep_I: Tensor, noise_key_I: Tensor) -> NoisedImages:
        """Noise whole images, before they are cut into patches."""
        clean = clean_ICHW.float()
        noise = counter_normal(noise_key_I, clean.shape[1:])
        return NoisedImages(self.schedule.add_noise(clean, noise, timestep_I), noise)

    def loss(
        self, prediction: Tensor, target: Tensor, image_weight_I: Tensor, timestep_I: Tensor
    ) -> ImageLoss:
        """Weighted squared error. A perfect prediction gives exactly zero."""
        error_I = (prediction.float() - target).square().flatten(1).sum(1) * image_weight_I
        elements_I = image_weight_I * target[0].numel()
        bucket_I = timestep_I * TIMESTEP_BUCKETS // self.schedule.steps
        zeros_K = torch.zeros(TIMESTEP_BUCKETS, device=target.device)
        return ImageLoss(
            error_I.sum(),
            elements_I.sum(),
            zeros_K.index_add(0, bucket_I, error_I.detach()),
            zeros_K.index_add(0, bucket_I, elements_I),
        )
