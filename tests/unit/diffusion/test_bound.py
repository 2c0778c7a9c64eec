"""The variational bound, where the likelihood is known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from transfusion.config import DiffusionConfig
from transfusion.diffusion.bound import DiffusionBound
from transfusion.diffusion.objective import ImageObjective
from transfusion.diffusion.schedule import Schedule

SCALE = 0.5


def variance_of_the_chain(schedule: Schedule, believed: float) -> float:
    """Of what ancestral sampling draws with a linear predictor: from noise down, each step a normal distribution."""
    signal_T, noise_T = (x.double() for x in schedule.signal_and_noise(torch.arange(schedule.steps)))
    variance = 1.0
    for timestep in range(schedule.steps - 1, -1, -1):
        signal, noise = signal_T[timestep].item(), noise_T[timestep].item()
        clean = signal * believed**2 / (signal**2 * believed**2 + noise**2)
        if timestep == 0:
            return clean**2 * variance + (noise / signal) ** 2
        signal_before, noise_before = signal_T[timestep - 1].item(), noise_T[timestep - 1].item()
        # q(x_before | x, x_0), with the image as it is predicted.
        step = (signal / signal_before) if signal else 0.0
        fresh = noise**2 - step**2 * noise_before**2
        factor = step * noise_before**2 / noise**2 + signal_before * fresh / noise**2 * clean
        variance = factor**2 * variance + fresh
    raise AssertionError


@pytest.mark.parametrize("prediction", ["epsilon", "v", "flow", "x"])
@pytest.mark.parametrize("believed", [SCALE, 2 * SCALE])
def test_images_of_normal_numbers(prediction: Any, believed: float) -> None:
    """With a linear predictor the chain draws a normal distribution, whose likelihood is bounded from below."""
    torch.manual_seed(0)
    objective = ImageObjective(DiffusionConfig(prediction=prediction, steps=500))
    bound, schedule = DiffusionBound(objective.schedule), objective.schedule
    clean = SCALE * torch.randn(200, 1, 8, 8)
    total = bound.constant(clean)
    for timestep in range(schedule.steps):
        timestep_I = torch.full((len(clean),), timestep)
        noise = torch.randn_like(clean)
        noisy = schedule.add_noise(clean, noise, timestep_I)
        signal, sigma = (factor.double() for factor in schedule.factors(timestep_I))
        guess = noisy.double() * signal * believed**2 / (signal**2 * believed**2 + sigma**2)
        of_noise = (noisy.double() - signal * guess) / sigma
        output = {
            "epsilon": of_noise,
            "v": signal * of_noise - sigma * guess,
            "flow": of_noise - guess,
            "x": guess,
        }
        predicted = objective.clean(noisy.double(), output[prediction], timestep_I)
        torch.testing.assert_close(predicted, guess, rtol=1e-4, atol=1e-4)
        total += bound.terms(clean, predicted, timestep_I)
    variance = variance_of_the_chain(schedule, believed)
    exact = 32 * math.log(2 * math.pi * variance) + (clean.double().square().sum((1, 2, 3)) / 2 / variance)
    gap = (total - exact).mean().item() / 64
    # Each timestep sees noise of its own, hence the bound may come out a little on the wrong side.
    assert -0.005 < gap < 0.01
