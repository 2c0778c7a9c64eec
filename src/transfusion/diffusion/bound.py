"""The variational bound of an image's log-likelihood, term by term.

Ho et al., 2020, eq. 5. Kingma et al., 2021, eq. 13 and 14.

I images, C channels, H/W latent height and width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from transfusion.diffusion.schedule import Schedule


class DiffusionBound:
    """log p(x) is at least minus the constant of x and minus the sum of one term for each timestep.

    It bounds the density over latents of ancestral sampling with the larger variance (Ho et al., 2020, section 3.2),
    which comes closer than the smaller one.

    Args:
        schedule: The model's.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        signal_T, noise_T = (
            factor.double() for factor in schedule.signal_and_noise(torch.arange(schedule.steps))
        )
        ratio_T = (signal_T / noise_T).square()
        growth_T = (noise_T[1:] / noise_T[:-1]).square()
        # An error in the image counts by what the signal-to-noise ratio falls in a step. The last step, from timestep 0
        # to the image, is a normal distribution about the image predicted there.
        self.weight_T = torch.cat((ratio_T[:1], (ratio_T[:-1] - ratio_T[1:]) / growth_T)) / 2
        # Of what each term is about, for latents of unit variance of which nothing but the noise is unknown.
        likely_T = self.weight_T / (ratio_T + 1)
        self.share_T = likely_T / likely_T.sum()
        widths = (growth_T.log() + 1 / growth_T - 1).sum() + (2 * math.pi / ratio_T[0]).log()
        self._widths, self._end = widths.item() / 2, (signal_T[-1].item(), noise_T[-1].item())

    def timesteps(self, place_N: Tensor) -> Tensor:
        """Timesteps for places in [0, 1), int64 [N], each as often as its share `share_T` says.

        A term over its share has the sum of all terms as its mean, and varies little.
        """
        edge_T = self.share_T.cumsum(0).to(place_N.device)
        found_N = torch.searchsorted(edge_T, place_N * edge_T[-1], right=True)
        return found_N.clamp(max=self.schedule.steps - 1)

    def constant(self, clean_ICHW: Tensor) -> Tensor:
        """What no network changes, fp64 [I]: the last latents against noise, and the widths of the steps."""
        signal, noise = self._end
        size = clean_ICHW[0].numel()
        squares_I = clean_ICHW.double().square().sum((1, 2, 3))
        prior_I = (signal**2 * squares_I + size * (noise**2 - 1 - 2 * math.log(noise))) / 2
        return prior_I + size * self._widths

    def terms(self, clean_ICHW: Tensor, predicted_ICHW: Tensor, timestep_I: Tensor) -> Tensor:
        """The terms of these timesteps, fp64 [I]. predicted_ICHW: the clean latents as the network predicts them."""
        error_I = (clean_ICHW.double() - predicted_ICHW.double()).square().sum((1, 2, 3))
        return self.weight_T.to(error_I.device)[timestep_I] * error_I
