"""The samplers, against a predictor that knows the answer."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from transfusion.diffusion.sampler import DDIM, DDPM, spaced_timesteps, start_noise
from transfusion.diffusion.schedule import CosineSchedule

SCHEDULE = CosineSchedule(1000)


@pytest.mark.parametrize("steps", [1, 2, 3, 30, 50, 100, 250, 333, 999, 1000])
def test_timesteps_run_from_the_last_down(steps: int) -> None:
    timesteps = spaced_timesteps(1000, steps)
    assert len(timesteps) == steps and timesteps[0] == 999 and timesteps[-1] >= 0
    assert all(later < earlier for earlier, later in pairwise(timesteps))


@pytest.mark.parametrize("sampler_type", [DDPM, DDIM])
@pytest.mark.parametrize("steps", [1, 10, 250])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_perfect_predictor_leads_to_its_picture(
    sampler_type: type[DDPM] | type[DDIM], steps: int, clip: float | None
) -> None:
    picture = torch.rand(2, 1, 8, 8).double() * 2 - 1
    key = torch.tensor([4, 5])
    sampler = sampler_type(SCHEDULE, steps, clip=clip)
    latent = start_noise(key, (1, 8, 8)).double()
    for index, timestep in enumerate(sampler.timesteps):
        signal, noise = (c.double() for c in SCHEDULE.signal_and_noise(torch.tensor([timestep])))
        latent = sampler.step(index, latent, (latent - signal * picture) / noise, key)
    assert latent.isfinite().all()
    torch.testing.assert_close(latent, picture, rtol=0, atol=2e-3)


def test_clipping_bounds_every_picture() -> None:
    sampler = DDPM(SCHEDULE, 20, clip=1.0)
    key = torch.tensor([0])
    latent = start_noise(key, (1, 4, 4))
    for index in range(20):
        latent = sampler.step(index, latent, torch.zeros_like(latent), key)
    assert latent.abs().max() <= 1.0


def test_ancestral_noise_is_keyed_by_image_and_step() -> None:
    sampler, keys = DDPM(SCHEDULE, 10), torch.tensor([3, 8])
    latent = start_noise(keys, (1, 4, 4))
    both = sampler.step(2, latent, latent, keys)
    alone = sampler.step(2, latent[1:], latent[1:], keys[1:])
    assert torch.equal(both[1:], alone)
    assert not torch.equal(both[1:], sampler.step(2, latent[1:], latent[1:], keys[:1]))


def test_every_step_adds_noise_of_its_own() -> None:
    sampler, key = DDPM(SCHEDULE, 10), torch.tensor([3])
    nothing = torch.zeros(1, 1, 40, 40)
    added = torch.stack([sampler.step(index, nothing, nothing, key).flatten() for index in range(9)])
    correlation = torch.corrcoef(torch.cat((added, start_noise(key, (1, 40, 40)).view(1, -1))))
    assert (correlation - torch.eye(10)).abs().max() < 0.15


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_numbers_of_steps_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match="steps must lie in"):
        DDIM(SCHEDULE, steps)
