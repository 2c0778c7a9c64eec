"""The samplers by their names in `config.objectives.SAMPLERS`, each built from settings."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from transfusion.config import DiffusionConfig
from transfusion.diffusion.dpm_solver import DPMSolver
from transfusion.diffusion.flow import Euler, Heun
from transfusion.diffusion.sampler import DDIM, DDPM, MIN_ALPHA_BAR, Sampler, SpacedSampler
from transfusion.diffusion.schedule import CosineSchedule

# From the model's objective, the steps, and the bound of the clean latents, if they have one.
SamplerBuilder = Callable[[DiffusionConfig, int, float | None], Sampler]


def _cosine(
    sampler: type[SpacedSampler], config: DiffusionConfig, steps: int, clip: float | None
) -> SpacedSampler:
    assert config.prediction == "epsilon" or config.prediction == "v"
    # With a bound, the bound holds the error.
    min_alpha_bar = MIN_ALPHA_BAR if clip is None else 0.0
    schedule = CosineSchedule(config.steps)
    return sampler(schedule, steps, predicts=config.prediction, clip=clip, min_alpha_bar=min_alpha_bar)


def _flow(sampler: type[Euler], config: DiffusionConfig, steps: int, clip: float | None) -> Euler:
    assert config.prediction == "flow" or config.prediction == "x"
    return sampler(config.steps, steps, predicts=config.prediction, shift=config.timestep_shift, clip=clip)


def _dpm_solver(config: DiffusionConfig, steps: int, clip: float | None) -> Sampler:
    is_straight = config.is_straight
    return DPMSolver(_flow(Euler, config, steps, clip) if is_straight else _cosine(DDIM, config, steps, clip))


BUILDERS: dict[str, SamplerBuilder] = {
    "ddpm": partial(_cosine, DDPM),
    "ddim": partial(_cosine, DDIM),
    "euler": partial(_flow, Euler),
    "heun": partial(_flow, Heun),
    "dpmpp_2m": _dpm_solver,
}
