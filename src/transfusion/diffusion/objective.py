"""What the network sees of an image, what it must answer, and how wrong it was.

I images, C channels, H/W latent height and width, K timestep buckets.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from transfusion.config import DiffusionConfig
from transfusion.config.objectives import MIN_X_SIGMA
from transfusion.diffusion.noise import counter_normal
from transfusion.diffusion.schedule import CosineSchedule, RectifiedFlowSchedule, Schedule
from transfusion.schema import TIMESTEP_BUCKETS, LossTerms
from transfusion.sequence.sizes import IMAGE


class NoisedImages(NamedTuple):
    """noisy and target, fp32 [I, C, H, W]: the corrupted latents and the right answer."""

    noisy: Tensor
    target: Tensor


class ImageObjective:
    """Prediction of epsilon (the noise; paper, eq. 3), v, flow or x; one timestep an image.

    epsilon: eps. v: signal eps - noise x_0 (Salimans and Ho, 2022). flow: eps - x_0 (Liu et al., 2023). x: x_0 on the
    path of flow, with the loss of the velocity that it means (Li and He, 2025, table 1, 3-b).
    """

    def __init__(self, config: DiffusionConfig, name: str = IMAGE) -> None:
        """name: of the terms of the loss, that of the modality."""
        self.name = name
        self.predicts = config.prediction
        self.schedule: Schedule = (
            RectifiedFlowSchedule(config.steps) if config.is_straight else CosineSchedule(config.steps)
        )
        self.min_snr_gamma = config.min_snr_gamma if config.loss_weight == "min-snr" else None

    def corrupt(self, clean_ICHW: Tensor, timestep_I: Tensor, noise_key_I: Tensor) -> NoisedImages:
        """Noise whole images, before they are cut into patches."""
        clean = clean_ICHW.float()
        noise = counter_normal(noise_key_I, clean.shape[1:])
        noisy = self.schedule.add_noise(clean, noise, timestep_I)
        return NoisedImages(noisy, self._target(clean, noise, timestep_I))

    def _target(self, clean_ICHW: Tensor, noise_ICHW: Tensor, timestep_I: Tensor) -> Tensor:
        if self.predicts == "epsilon":
            return noise_ICHW
        if self.predicts == "flow":
            return noise_ICHW - clean_ICHW
        if self.predicts == "x":
            return clean_ICHW
        signal, noise = self.schedule.factors(timestep_I)
        return signal * noise_ICHW - noise * clean_ICHW

    def clean(self, noisy_ICHW: Tensor, output_ICHW: Tensor, timestep_I: Tensor) -> Tensor:
        """The clean latents that a prediction means."""
        if self.predicts == "x":
            return output_ICHW
        signal, noise = self.schedule.factors(timestep_I)
        if self.predicts == "epsilon":
            return (noisy_ICHW - noise * output_ICHW) / signal
        if self.predicts == "flow":
            return noisy_ICHW - noise * output_ICHW
        return signal * noisy_ICHW - noise * output_ICHW

    def timestep_weight(self, timestep_I: Tensor) -> Tensor | None:
        """Weights of the squared errors, fp32 [I]; None: all images count alike.

        x: an error in x_0 over the noise level is one in the velocity. Levels below `MIN_X_SIGMA` count as that one.

        Min-SNR (Hang et al., 2023, section 3.4): min(SNR, gamma) is the weight of an error in x_0. An error in the
        noise is one in x_0 times SNR, squared, an error in the velocity one times SNR + 1.
        """
        if self.predicts == "x":
            _, sigma_I = self.schedule.signal_and_noise(timestep_I)
            return sigma_I.clamp(min=MIN_X_SIGMA).square().reciprocal()
        if self.min_snr_gamma is None:
            return None
        signal_I, noise_I = self.schedule.signal_and_noise(timestep_I)
        ratio_I = (signal_I / noise_I).square()
        own_I = ratio_I if self.predicts == "epsilon" else ratio_I + 1.0
        return ratio_I.clamp(max=self.min_snr_gamma) / own_I

    def loss(
        self, prediction: Tensor, target: Tensor, image_weight_I: Tensor, timestep_I: Tensor
    ) -> LossTerms:
        """Such as "image" and "image_by_timestep": weighted squared error over unweighted elements.

        A perfect prediction gives exactly zero.
        """
        error_I = (prediction.float() - target).square().flatten(1).sum(1) * image_weight_I
        timestep_weight_I = self.timestep_weight(timestep_I)
        if timestep_weight_I is not None:
            error_I = error_I * timestep_weight_I
        elements_I = image_weight_I * target[0].numel()
        bucket_I = timestep_I * TIMESTEP_BUCKETS // self.schedule.steps
        zeros_K = torch.zeros(TIMESTEP_BUCKETS, device=target.device)
        error_K = zeros_K.index_add(0, bucket_I, error_I.detach())
        elements_K = zeros_K.index_add(0, bucket_I, elements_I)
        by_timestep = f"{self.name}_by_timestep"
        return LossTerms(
            {self.name: error_I.sum(), by_timestep: error_K},
            {self.name: elements_I.sum(), by_timestep: elements_K},
        )
