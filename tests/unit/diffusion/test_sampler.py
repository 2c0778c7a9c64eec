"""The samplers, against a predictor that knows the answer."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from transfusion.config import DiffusionConfig
from transfusion.diffusion.flow import Euler, Heun
from transfusion.diffusion.objective import ImageObjective
from transfusion.diffusion.sampler import DDIM, DDPM, sample, spaced_timesteps, start_noise
from transfusion.diffusion.schedule import CosineSchedule
from transfusion.inference.image_diffusion import ImageSampling, build_sampler

SCHEDULE = CosineSchedule(1000)


@pytest.mark.parametrize("steps", [1, 2, 3, 30, 50, 100, 250, 333, 999, 1000])
def test_timesteps_run_from_the_last_down(steps: int) -> None:
    timesteps = spaced_timesteps(1000, steps)
    assert len(timesteps) == steps and timesteps[0] == 999 and timesteps[-1] >= 0
    assert all(later < earlier for earlier, later in pairwise(timesteps))


# Every sampler with every prediction that it serves, and a shift.
SERVED = [
    ("ddpm", "epsilon", 1.0),
    ("ddim", "epsilon", 1.0),
    ("ddpm", "v", 1.0),
    ("ddim", "v", 1.0),
    ("euler", "flow", 1.0),
    ("euler", "flow", 3.0),
    ("heun", "flow", 1.0),
    ("heun", "flow", 3.0),
    ("euler", "x", 1.0),
    ("euler", "x", 3.0),
    ("heun", "x", 1.0),
    ("heun", "x", 3.0),
    ("dpmpp_2m", "x", 3.0),
    ("dpmpp_2m", "epsilon", 1.0),
    ("dpmpp_2m", "v", 1.0),
    ("dpmpp_2m", "flow", 1.0),
    ("dpmpp_2m", "flow", 3.0),
]


@pytest.mark.parametrize(("name", "prediction", "shift"), SERVED)
@pytest.mark.parametrize("steps", [1, 10, 250])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_perfect_predictor_leads_to_its_image(
    name: Any, prediction: Any, steps: int, clip: float | None, shift: float
) -> None:
    """Each sampler inverts its prediction: told the right answer about one image, it ends there."""
    image = torch.rand(2, 1, 8, 8).double() * 2 - 1
    key = torch.tensor([4, 5])
    config = DiffusionConfig(prediction=prediction, timestep_shift=shift)
    schedule, calls = ImageObjective(config).schedule, []

    def perfect(latent: Tensor, timestep: float) -> Tensor:
        calls.append(timestep)
        signal, sigma = (factor.double() for factor in schedule.signal_and_noise(torch.tensor([timestep])))
        noise = (latent - signal * image) / sigma
        return {
            "epsilon": noise,
            "v": signal * noise - sigma * image,
            "flow": noise - image,
            "x": image,
        }[prediction]

    sampler = build_sampler(ImageSampling(sampler=name, steps=steps), config, clip=clip)
    latent = sample(sampler, start_noise(key, (1, 8, 8)).double(), perfect, key)
    torch.testing.assert_close(latent, image, rtol=0, atol=2e-3)
    assert calls[0] == 999 and len(calls) == (2 * steps - 1 if name == "heun" else steps)
    # What questions tell of the clean image, for previews, is the image too, once more than noise was seen.
    denoising = sampler.denoise(start_noise(key, (1, 8, 8)).double(), key)
    question = next(denoising)
    assert question.clean_ICHW is None
    for _ in range(len(calls) // 2):
        seen = question.timestep
        question = denoising.send(perfect(question.latent_ICHW, question.timestep))
        if seen < 950:
            torch.testing.assert_close(question.clean_ICHW, image, rtol=0, atol=2e-3)


def test_heun_is_of_the_second_order() -> None:
    """On a path with a known end the error of Euler falls with the steps, that of Heun with their square."""
    key, start = torch.tensor([0]), torch.ones(1, 1, 1, 1).double()

    # dx / d sigma = x (sigma + 1/2), from sigma 1 to 0.
    def errors(sampler_type: type[Euler]) -> list[float]:
        ends = [
            sample(sampler_type(1000, steps), start, lambda x, t: x * ((t + 1) / 1000 + 0.5), key).item()
            for steps in (10, 20)
        ]
        return [abs(end - math.exp(-1.0)) for end in ends]

    (euler_10, euler_20), (heun_10, heun_20) = errors(Euler), errors(Heun)
    assert 1.8 < euler_10 / euler_20 < 2.2 and heun_10 / heun_20 > 3.3 and heun_20 < euler_20 / 5


@pytest.mark.parametrize("prediction", ["v", "flow", "x"])
def test_dpm_solver_errs_less_than_the_first_order(prediction: Any) -> None:
    """Images that are normal numbers of scale 1/2 have a best predictor and a path that are known."""
    config, key, start = DiffusionConfig(prediction=prediction), torch.tensor([0]), torch.ones(1, 1, 1, 1)
    schedule = ImageObjective(config).schedule

    def best(latent: Tensor, timestep: float) -> Tensor:
        signal, sigma = (
            factor.double() for factor in schedule.signal_and_noise(torch.tensor([round(timestep)]))
        )
        clean = latent * signal / 4 / (signal**2 / 4 + sigma**2)
        noise = (latent - signal * clean) / sigma
        return {"v": signal * noise - sigma * clean, "flow": noise - clean, "x": clean}[prediction]

    def error(name: str, steps: int) -> float:
        sampler = build_sampler(ImageSampling(sampler=name, steps=steps), config, clip=None)
        return abs(sample(sampler, start.double(), best, key).item() - 0.5)

    first = {"v": "ddim", "flow": "euler", "x": "euler"}[prediction]
    for steps in (20, 40):
        assert error("dpmpp_2m", steps) < error(first, steps) / 5


def test_flow_is_clipped_in_every_call() -> None:
    latent = start_noise(torch.tensor([0]), (1, 4, 4))
    for sampler_type in (Euler, Heun):
        sampler = sampler_type(1000, 20, clip=1.0)
        drawn = sample(sampler, latent, lambda x, _: -9 * torch.ones_like(x), torch.tensor([0]))
        torch.testing.assert_close(drawn, torch.ones_like(drawn))


def test_a_shift_spends_more_steps_on_noise() -> None:
    plain, moved = Euler(1000, 4), Euler(1000, 4, shift=3.0)
    assert plain.timesteps == [999, 749, 499, 249]
    assert moved.timesteps == pytest.approx([999, 899, 749, 499])


def test_clipping_bounds_every_image() -> None:
    sampler = DDPM(SCHEDULE, 20, clip=1.0)
    key = torch.tensor([0])
    latent = start_noise(key, (1, 4, 4))
    for index in range(20):
        latent = sampler.step(index, latent, torch.zeros_like(latent), key)[0]
    assert latent.abs().max() <= 1.0


def test_ancestral_noise_is_keyed_by_image_and_step() -> None:
    sampler, keys = DDPM(SCHEDULE, 10), torch.tensor([3, 8])
    latent = start_noise(keys, (1, 4, 4))
    both = sampler.step(2, latent, latent, keys)[0]
    alone = sampler.step(2, latent[1:], latent[1:], keys[1:])[0]
    assert torch.equal(both[1:], alone)
    assert not torch.equal(both[1:], sampler.step(2, latent[1:], latent[1:], keys[:1])[0])


def test_every_step_adds_noise_of_its_own() -> None:
    sampler, key = DDPM(SCHEDULE, 10), torch.tensor([3])
    nothing = torch.zeros(1, 1, 40, 40)
    added = torch.stack([sampler.step(index, nothing, nothing, key)[0].flatten() for index in range(9)])
    correlation = torch.corrcoef(torch.cat((added, start_noise(key, (1, 40, 40)).view(1, -1))))
    assert (correlation - torch.eye(10)).abs().max() < 0.15


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_numbers_of_steps_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match="steps must lie in"):
        DDIM(SCHEDULE, steps)
    with pytest.raises(ValueError, match="steps must lie in"):
        Euler(1000, steps)


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
@pytest.mark.parametrize("steps", [25, 250])
def test_an_error_at_pure_noise_does_not_reach_unbounded_latents(name: Any, steps: int) -> None:
    """Latents of an autoencoder have none. At the first timestep a noise that is a little wrong is divided by 5e-5."""
    sampler = build_sampler(ImageSampling(sampler=name, steps=steps), DiffusionConfig(), clip=None)
    image = torch.linspace(-2, 2, 64).view(1, 1, 8, 8).double()
    wrong = torch.linspace(1, -1, 64).view(1, 1, 8, 8).double()

    def nearly(latent_ICHW: Tensor, timestep: float) -> Tensor:
        alpha_bar = SCHEDULE.alpha_bar_T[int(timestep)].double()
        noise = (latent_ICHW - alpha_bar.sqrt() * image) / (1 - alpha_bar).sqrt()
        return noise + 0.05 * wrong if timestep == 999 else noise

    # Right afterwards, it ends at the image; on the way nothing may be far from noise and image.
    seen: list[float] = []

    def watched(latent_ICHW: Tensor, timestep: float) -> Tensor:
        seen.append(float(latent_ICHW.abs().max()))
        return nearly(latent_ICHW, timestep)

    key = torch.tensor([3])
    latent = sample(sampler, start_noise(key, (1, 8, 8)).double(), watched, key)
    torch.testing.assert_close(latent, image, rtol=0, atol=5e-3)
    assert max(seen) < 6
