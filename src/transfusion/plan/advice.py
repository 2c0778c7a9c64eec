"""Settings that make a plan fit, or faster: each is tried by planning again before it is told."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transfusion.config import Config
from transfusion.config.checking import load_values
from transfusion.errors import UserError
from transfusion.plan.prediction import Plan, make_plan

# A setting is worth telling from this gain of speed on.
WORTH_TELLING = 1.05
MAX_GPUS = 1024


@dataclass(frozen=True, slots=True)
class Advice:
    """What to set, as `section.key=value` or `--gpus N`, and the plan that it gives."""

    settings: tuple[str, ...]
    plan: Plan

    def __str__(self) -> str:
        return " ".join(self.settings)


def to_fit(plan: Plan) -> Advice | None:
    """The fastest single setting with which a plan fits; else several, and in the end more GPUs. None: nothing does."""
    alone = [advice for setting in _savers(plan) if (advice := _tried(plan, [setting])) and advice.plan.fits]
    if alone:
        return max(alone, key=lambda advice: advice.plan.tokens_per_second)
    together: dict[str, str] = {}
    for setting in _savers(plan):
        together[setting.partition("=")[0]] = setting
        advice = _tried(plan, list(together.values()))
        if advice and advice.plan.fits:
            return _fewest(plan, advice)
    gpus = plan.division.gpus
    while (gpus := gpus * 2) <= MAX_GPUS:
        advice = _tried(plan, list(together.values()), gpus)
        if advice and advice.plan.fits:
            return _fewest(plan, advice)
    return None


def suggest_speedups(plan: Plan) -> list[Advice]:
    """Settings, each for itself, with which a plan that fits still does and is faster; the best first."""
    tried = [advice for setting in _hasteners(plan) if (advice := _tried(plan, [setting]))]
    least = WORTH_TELLING * plan.tokens_per_second
    found = [advice for advice in tried if advice.plan.fits and advice.plan.tokens_per_second >= least]
    return sorted(found, key=lambda advice: -advice.plan.tokens_per_second)


def _savers(plan: Plan) -> Iterator[str]:
    """What saves memory, from what costs little to what costs much."""
    train, rows = plan.config.train, plan.division.micro_batch_size
    if train.engine != "local" and train.zero.stage < 3:
        yield "train.zero.stage=3"
    for what in ("attention", "block") if train.activation_checkpointing == "none" else ():
        yield f"train.activation_checkpointing={what}"
    for power in range(1, rows.bit_length()):
        yield f"data.micro_batch_size={rows // 2**power}"
    if train.engine == "local":
        return
    if train.zero.max_live_parameters > plan.network.block:
        yield "train.zero.max_live_parameters=0"
    if rows == 1:
        yield from (
            f"train.sequence_parallel={ranks}" for ranks in (2, 4, 8) if ranks > train.sequence_parallel
        )
    if train.zero.offload_optimizer == "none":
        yield "train.zero.offload_optimizer=cpu"


def _hasteners(plan: Plan) -> Iterator[str]:
    """What costs memory and saves time."""
    train, division = plan.config.train, plan.division
    if train.activation_checkpointing != "none":
        yield "train.activation_checkpointing=none"
    if not train.compile:
        yield "train.compile=true"
    if division.micro_batches > 1:
        yield f"data.micro_batch_size={division.micro_batch_size * 2}"
    if train.engine == "local" or division.gpus == 1:
        return
    yield from (f"train.zero.stage={stage}" for stage in (1, 2) if stage < train.zero.stage)
    if train.zero.stage < 3:
        return
    if train.zero.max_live_parameters < plan.network.elements:
        yield f"train.zero.max_live_parameters={plan.network.elements}"
    if division.gpus > plan.gpu.gpus_per_machine and train.zero.hpz_partition_size == 1:
        yield f"train.zero.hpz_partition_size={plan.gpu.gpus_per_machine}"


def _tried(plan: Plan, settings: Sequence[str], gpus: int | None = None) -> Advice | None:
    """None where the settings cannot be."""
    told = (*settings, *([f"--gpus {gpus}"] if gpus else []))
    gpus = gpus or plan.division.gpus
    try:
        config = applied(plan.config, settings)
        return Advice(told, make_plan(config, gpus, plan.gpu.name.lower(), plan.document_mix))
    except (UserError, ValueError):
        return None


def _fewest(plan: Plan, advice: Advice) -> Advice:
    """The same without the settings that it also fits without."""
    gpus = advice.plan.division.gpus if advice.plan.division.gpus != plan.division.gpus else None
    settings = [setting for setting in advice.settings if "=" in setting]
    for setting in tuple(settings):
        fewer = [one for one in settings if one != setting]
        tried = _tried(plan, fewer, gpus)
        if tried and tried.plan.fits:
            settings, advice = fewer, tried
    return advice


def applied(config: Config, settings: Sequence[str]) -> Config:
    """The configuration with `section.key=value` set. Raises UserError where that cannot be."""
    return load_values(config.model_dump(), settings, where="the plan", reads_codec=False)
