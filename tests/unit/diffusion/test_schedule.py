"""The noise schedule and the objective."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from transfusion.config import DiffusionConfig
from transfusion.config.objectives import MIN_X_SIGMA
from transfusion.diffusion.noise import counter_normal
from transfusion.diffusion.objective import ImageObjective
from transfusion.diffusion.sampler import guide
from transfusion.diffusion.schedule import CosineSchedule
from transfusion.schema import TIMESTEP_BUCKETS


def _betas(steps: int) -> torch.Tensor:
    """Nichol and Dhariwal's betas, written out once more in double precision."""
    alpha_bar = [math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(steps + 1)]
    return torch.tensor(
        [min(1 - after / before, 0.999) for before, after in pairwise(alpha_bar)],
        dtype=torch.float64,
    )


@pytest.mark.parametrize("steps", [1, 10, 1000])
def test_alpha_times_the_previous_alpha_bar_is_alpha_bar(steps: int) -> None:
    """N10: alpha[t] * alpha_bar[t - 1] = alpha_bar[t]."""
    alpha_bar = CosineSchedule(steps).alpha_bar_T.double()
    assert len(alpha_bar) == steps
    before = torch.cat((torch.ones(1, dtype=torch.float64), alpha_bar[:-1]))
    torch.testing.assert_close((1 - _betas(steps)) * before, alpha_bar, rtol=2e-5, atol=0)
    assert (alpha_bar[1:] < alpha_bar[:-1]).all() and alpha_bar[-1] > 0 and alpha_bar[0] < 1


def test_noised_images_keep_their_variance() -> None:
    signal, noise = CosineSchedule(1000).signal_and_noise(torch.arange(1000))
    torch.testing.assert_close(signal**2 + noise**2, torch.ones(1000), rtol=0, atol=1e-6)


OBJECTIVES = ("epsilon", "v", "flow", "x")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_batch_is_noised_as_its_images_are_alone(name: Any) -> None:
    """A8: noising a batch is noising each image, with timesteps and keys that differ."""
    objective = ImageObjective(DiffusionConfig(prediction=name))
    clean = torch.rand(5, 3, 4, 4) * 2 - 1
    timestep, key = torch.tensor([0, 17, 500, 998, 999]), torch.tensor([3, 1, 2, 1, 9])
    together = objective.corrupt(clean, timestep, key)
    for i in range(5):
        alone = objective.corrupt(clean[i : i + 1], timestep[i : i + 1], key[i : i + 1])
        assert torch.equal(together.noisy[i], alone.noisy[0])
        assert torch.equal(together.target[i], alone.target[0])
    if name == "epsilon":
        assert torch.equal(together.target[1], together.target[3])
        assert torch.equal(together.target, counter_normal(key, (3, 4, 4)))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_answer_is_the_slope_of_the_path(name: Any) -> None:
    """Velocity and flow point along the path of an image; noise is the end of it."""
    objective = ImageObjective(DiffusionConfig(prediction=name))
    clean, timestep, key = torch.rand(1, 1, 4, 4).double(), torch.tensor([400]), torch.tensor([6])
    noised = objective.corrupt(clean, timestep, key)
    noise = counter_normal(key, (1, 4, 4)).double()
    signal, sigma = (factor.item() for factor in objective.schedule.signal_and_noise(timestep))
    torch.testing.assert_close(noised.noisy, (signal * clean + sigma * noise).float())
    if name == "flow":
        assert (signal, sigma) == (pytest.approx(0.599), pytest.approx(0.401))
        torch.testing.assert_close(noised.noisy, clean.float() + sigma * noised.target)
    if name == "v":
        # The derivative by the angle of a path on the unit circle.
        angle, step = math.atan2(sigma, signal), 1e-4
        ahead, behind = (math.cos(a) * clean + math.sin(a) * noise for a in (angle + step, angle - step))
        torch.testing.assert_close(noised.target.double(), (ahead - behind) / (2 * step), rtol=0, atol=1e-5)


def test_an_error_of_the_clean_image_counts_as_one_of_the_velocity() -> None:
    """x has the loss of flow for the velocity that it means, but where the noise level is below its bound."""
    as_clean, as_flow = (ImageObjective(DiffusionConfig(prediction=name)) for name in ("x", "flow"))
    timestep, key = torch.tensor([999, 500, 49, 9]), torch.arange(4)
    clean = torch.rand(4, 1, 4, 4)
    noised, of_flow = (objective.corrupt(clean, timestep, key) for objective in (as_clean, as_flow))
    assert torch.equal(noised.noisy, of_flow.noisy) and torch.equal(noised.target, clean)
    guess = clean + 0.1 * torch.randn_like(clean)
    _, sigma = as_clean.schedule.factors(timestep)
    velocity = (noised.noisy - guess) / sigma
    for image in range(4):
        weight = torch.zeros(4)
        weight[image] = 1.0
        own = as_clean.loss(guess, noised.target, weight, timestep).sums["image"]
        other = as_flow.loss(velocity, of_flow.target, weight, timestep).sums["image"]
        bounded = (min(sigma[image].item(), MIN_X_SIGMA) / MIN_X_SIGMA) ** 2
        torch.testing.assert_close(own, other * bounded, rtol=1e-4, atol=0)
    assert sigma[3] < MIN_X_SIGMA <= sigma[2]


@pytest.mark.parametrize("loss_weight", ["none", "min-snr"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_perfect_prediction_has_no_loss(name: Any, loss_weight: Any) -> None:
    """N1: the objective alone; the whole network is in model/test_losses.py."""
    objective = ImageObjective(DiffusionConfig(prediction=name, loss_weight=loss_weight))
    timestep = torch.tensor([5, 995])
    noised = objective.corrupt(torch.rand(2, 1, 8, 8), timestep, torch.tensor([1, 2]))
    loss = objective.loss(noised.target.clone(), noised.target, torch.ones(2), timestep)
    assert loss.sums["image"] == 0 and loss.counts["image"] == 128


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("name", ["epsilon", "v"])
def test_min_snr_weighs_an_error_as_one_of_the_image(name: Any, gamma: float) -> None:
    """Whatever is predicted, an error counts min(SNR, gamma) times the error in x_0 that it makes."""
    fields: dict[str, Any] = {"prediction": name, "loss_weight": "min-snr", "min_snr_gamma": gamma}
    objective = ImageObjective(DiffusionConfig(**fields))
    timestep = torch.tensor([30, 300, 500, 800])
    noised = objective.corrupt(torch.rand(4, 1, 2, 2), timestep, torch.arange(4))
    answer = noised.target + 0.01
    loss = objective.loss(answer, noised.target, torch.tensor([1.0, 1.0, 0.0, 1.0]), timestep)
    signal, sigma = objective.schedule.factors(timestep)
    # The image that an answer means: x_0 = (x - sigma eps) / signal = signal x - sigma v.
    in_image = sigma / signal * 0.01 if name == "epsilon" else sigma * 0.01
    expected = (signal / sigma).square().clamp(max=gamma) * in_image.square() * 4
    torch.testing.assert_close(loss.sums["image"], expected[[0, 1, 3]].sum(), rtol=1e-3, atol=0)
    torch.testing.assert_close(loss.sums["image_by_timestep"].sum(), loss.sums["image"])
    assert loss.counts["image"] == 12, "the count is not weighted by the timestep"


def test_buckets_and_weights_split_the_loss() -> None:
    objective = ImageObjective(DiffusionConfig(steps=1000))
    timestep = torch.tensor([0, 99, 100, 999, 450])
    weight = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
    prediction, target = torch.randn(5, 1, 2, 2), torch.randn(5, 1, 2, 2)
    loss = objective.loss(prediction, target, weight, timestep)
    assert loss.counts["image"] == 16 and len(loss.counts["image_by_timestep"]) == TIMESTEP_BUCKETS
    assert loss.counts["image_by_timestep"].tolist() == [8, 4, 0, 0, 0, 0, 0, 0, 0, 4]
    torch.testing.assert_close(loss.sums["image"], (prediction - target)[:4].square().sum())
    torch.testing.assert_close(loss.sums["image_by_timestep"].sum(), loss.sums["image"])


def test_guidance_runs_from_the_unconditional_through_the_conditional_prediction() -> None:
    conditional, unconditional = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(guide(conditional, unconditional, 0.0), unconditional)
    torch.testing.assert_close(guide(conditional, unconditional, 1.0), conditional)
    torch.testing.assert_close(guide(conditional, unconditional, 3.0), 3 * conditional - 2 * unconditional)
