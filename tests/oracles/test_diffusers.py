"""Schedule and samplers equal those of diffusers, given the same noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from transfusion.config import DiffusionConfig
from transfusion.diffusion.dpm_solver import DPMSolver
from transfusion.diffusion.flow import Euler, Heun
from transfusion.diffusion.noise import counter_normal
from transfusion.diffusion.objective import ImageObjective
from transfusion.diffusion.sampler import DDIM, DDPM, sample, spaced_timesteps, start_noise
from transfusion.diffusion.schedule import CosineSchedule

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (extra: oracles)")

SCHEDULE = CosineSchedule(1000)
KEYS, SHAPE = torch.tensor([3, 4]), (8, 8, 8)


def scheduler(name: str, **settings: Any) -> Any:
    made = getattr(diffusers, name)(
        1000,
        beta_schedule="squaredcos_cap_v2",
        timestep_spacing="trailing",
        **{"clip_sample": False, **settings},
    )
    return made


def predicted(latent: Tensor) -> Tensor:
    """Stands for the network: a function of the latent, neither linear nor small."""
    return 0.3 * latent.tanh() + 0.5 * latent


def test_alpha_bar() -> None:
    theirs = scheduler("DDPMScheduler").alphas_cumprod
    assert torch.equal(SCHEDULE.alpha_bar_T, theirs)


def test_add_noise() -> None:
    clean, noise = torch.randn(2, 4, 8, 8, 8)
    timestep = torch.tensor([0, 10, 500, 999])
    theirs = scheduler("DDPMScheduler").add_noise(clean, noise, timestep)
    assert torch.equal(SCHEDULE.add_noise(clean, noise, timestep), theirs)


@pytest.mark.parametrize("steps", [1, 2, 50, 100, 250, 300, 999, 1000])
def test_timesteps(steps: int) -> None:
    theirs = scheduler("DDPMScheduler")
    theirs.set_timesteps(steps)
    assert spaced_timesteps(1000, steps) == theirs.timesteps.tolist()


class FreshNoise:
    """Hands our counter-based noise to a diffusers scheduler, which asks for it through `randn_tensor`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.index = 0
        module = diffusers.schedulers.scheduling_ddpm
        monkeypatch.setattr(
            module, "randn_tensor", lambda shape, **_: counter_normal(KEYS, shape[1:], stream=1 + self.index)
        )


# Our objective, diffusers' name for it.
PREDICTIONS = [("epsilon", "epsilon"), ("v", "v_prediction")]


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize(("predicts", "kind"), PREDICTIONS)
def test_a_ddpm_trajectory_of_250_steps(
    monkeypatch: pytest.MonkeyPatch, clip: float | None, predicts: Any, kind: str
) -> None:
    fresh = FreshNoise(monkeypatch)
    clipping = {} if clip is None else {"clip_sample": True, "clip_sample_range": clip}
    theirs, ours = (
        scheduler("DDPMScheduler", variance_type="fixed_small", prediction_type=kind, **clipping),
        DDPM(SCHEDULE, 250, predicts=predicts, clip=clip),
    )
    theirs.set_timesteps(250)
    assert ours.timesteps == theirs.timesteps.tolist()
    mine = its = start_noise(KEYS, SHAPE)
    for index, timestep in enumerate(ours.timesteps):
        fresh.index = index
        its = theirs.step(predicted(its), timestep, its).prev_sample
        mine = ours.step(index, mine, predicted(mine), KEYS)[0]
        assert (mine - its).abs().max() <= 1e-6 * its.abs().max(), f"step {index}"
    assert mine.isfinite().all()


@pytest.mark.parametrize(("predicts", "kind"), PREDICTIONS)
def test_a_ddim_trajectory_of_50_steps(predicts: Any, kind: str) -> None:
    theirs = scheduler("DDIMScheduler", set_alpha_to_one=True, prediction_type=kind)
    ours = DDIM(SCHEDULE, 50, predicts=predicts)
    theirs.set_timesteps(50)
    assert ours.timesteps == theirs.timesteps.tolist()
    mine = its = start_noise(KEYS, SHAPE)
    for index, timestep in enumerate(ours.timesteps):
        its = theirs.step(predicted(its), timestep, its, eta=0.0).prev_sample
        mine = ours.step(index, mine, predicted(mine), KEYS)[0]
        assert (mine - its).abs().max() <= 1e-6 * its.abs().max(), f"step {index}"


@pytest.mark.parametrize(("predicts", "kind"), PREDICTIONS)
def test_a_clipped_ddim_trajectory_of_50_steps(predicts: Any, kind: str) -> None:
    theirs = scheduler("DDIMScheduler", clip_sample=True, prediction_type=kind)
    ours = DDIM(SCHEDULE, 50, predicts=predicts, clip=1.0)
    theirs.set_timesteps(50)
    mine = its = start_noise(KEYS, SHAPE)
    for index, timestep in enumerate(ours.timesteps):
        step = theirs.step(predicted(its), timestep, its, eta=0.0, use_clipped_model_output=True)
        its = step.prev_sample
        mine = ours.step(index, mine, predicted(mine), KEYS)[0]
        assert (mine - its).abs().max() <= 1e-6 * its.abs().max(), f"step {index}"


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize(("predicts", "kind"), PREDICTIONS)
@pytest.mark.parametrize("steps", [5, 20])
def test_a_dpm_solver_trajectory(steps: int, clip: float | None, predicts: Any, kind: str) -> None:
    theirs = diffusers.DPMSolverMultistepScheduler(
        1000, beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing", prediction_type=kind
    )
    # Theirs has no such bound. The predictions of both go through one that keeps to it.
    ours = DPMSolver(DDIM(SCHEDULE, steps, predicts=predicts, clip=clip))
    if clip is not None:
        convert = theirs.convert_model_output
        theirs.convert_model_output = lambda *args, **kwargs: convert(*args, **kwargs).clamp(-clip, clip)
    theirs.set_timesteps(steps)
    assert list(ours.timesteps) == theirs.timesteps.tolist()
    its = start_noise(KEYS, SHAPE)
    asked: list[Tensor] = []

    def network(latent: Tensor, _: float) -> Tensor:
        asked.append(latent)
        return predicted(latent)

    mine = sample(ours, its, network, KEYS)
    for index, timestep in enumerate(theirs.timesteps):
        its = theirs.step(predicted(its), timestep, its).prev_sample
        reached = asked[index + 1] if index + 1 < steps else mine
        assert (reached - its).abs().max() <= 1e-4 * its.abs().max(), f"step {index}"


def test_velocity_and_flow_of_noised_images() -> None:
    clean = torch.rand(3, 8, 8, 8) * 2 - 1
    timestep, key = torch.tensor([0, 500, 999]), torch.tensor([1, 2, 3])
    noise = counter_normal(key, (8, 8, 8))
    velocity = ImageObjective(DiffusionConfig(prediction="v")).corrupt(clean, timestep, key)
    theirs = scheduler("DDPMScheduler")
    assert torch.equal(velocity.noisy, theirs.add_noise(clean, noise, timestep))
    assert torch.equal(velocity.target, theirs.get_velocity(clean, noise, timestep))
    flow = ImageObjective(DiffusionConfig(prediction="flow")).corrupt(clean, timestep, key)
    path = diffusers.FlowMatchEulerDiscreteScheduler(1000)
    # Theirs names timesteps by the noise level times 1000: 1 to 1000.
    torch.testing.assert_close(flow.noisy, path.scale_noise(clean, (timestep + 1).float(), noise))
    assert torch.equal(flow.target, noise - clean)


def evenly(steps: int) -> list[float]:
    """Noise levels as the pipelines of diffusers ask for them, before the shift."""
    return [1 - index / steps for index in range(steps)]


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_trajectory_of_50_steps(shift: float) -> None:
    theirs, ours = diffusers.FlowMatchEulerDiscreteScheduler(1000, shift=shift), Euler(1000, 50, shift=shift)
    theirs.set_timesteps(sigmas=evenly(50))
    torch.testing.assert_close(torch.tensor(ours.sigmas), theirs.sigmas, rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.tensor(ours.timesteps), theirs.timesteps - 1, rtol=0, atol=1e-3)
    its = start_noise(KEYS, SHAPE)
    asked: list[torch.Tensor] = []

    def network(latent: torch.Tensor, _: float) -> torch.Tensor:
        asked.append(latent)
        return predicted(latent)

    mine = sample(ours, its, network, KEYS)
    for index, timestep in enumerate(theirs.timesteps):
        its = theirs.step(predicted(its), timestep, its).prev_sample
        reached = asked[index + 1] if index < 49 else mine
        assert (reached - its).abs().max() <= 1e-5 * its.abs().max(), f"step {index}"


def test_a_flow_trajectory_of_the_second_order() -> None:
    """Theirs spaces its levels otherwise; both walk along theirs."""
    theirs, ours = diffusers.FlowMatchHeunDiscreteScheduler(1000), Heun(1000, 20)
    theirs.set_timesteps(20)
    ours.sigmas = [*theirs.timesteps[[0, *range(1, 39, 2)]].div(1000).tolist(), 0.0]
    mine = its = start_noise(KEYS, SHAPE)
    for timestep in theirs.timesteps:
        its = theirs.step(predicted(its), timestep, its).prev_sample
    mine = sample(ours, mine, lambda latent, _: predicted(latent), KEYS)
    assert (mine - its).abs().max() <= 1e-5 * its.abs().max()
