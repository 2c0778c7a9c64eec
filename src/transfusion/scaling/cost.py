"""What a step of a configuration costs, and how many steps a budget of FLOPs buys."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from transfusion.config import Config
from transfusion.data.loading.loader import Loader
from transfusion.errors import UserError
from transfusion.families.build import build_model
from transfusion.observe.flops import FlopModel
from transfusion.optim.groups import for_muon
from transfusion.parallel.muon import muon_operations
from transfusion.sequence.tokenizer import Tokenizer

# Global batches whose masks and targets are counted; their mean stands for all.
STEPS_COUNTED = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of a whole run. step_flops: exact, of forward and backward, over the visible pairs of the mask (`observe.flops`),
    and of Muon's own products, which are much of the work where matrices are small or batches are.

    parameters: all but the embedding table, and the weights of blocks that only patches have.
    """

    steps: int
    step_flops: float
    parameters: int

    @property
    def flops(self) -> float:
        return self.steps * self.step_flops


def cost_of(config: Config) -> Cost:
    """Count the first batches of the configuration's own data. Raises UserError as the loader does."""
    tokenizer = Tokenizer(config.data.tokenizer)
    config = config.with_vocabulary(tokenizer.vocabulary)
    model = FlopModel(config)
    total = 0.0
    with Loader(config, config.data.sources, tokenizer, rank=0, world_size=1) as loader:
        for _ in range(STEPS_COUNTED):
            total += model.of(loader.next_step()).exact.total
    step_flops = total / STEPS_COUNTED + _optimizer_operations(config)
    return Cost(steps=config.train.steps, step_flops=step_flops, parameters=model.counted)


def _optimizer_operations(config: Config) -> int:
    """Of the products that Muon makes in a step."""
    with torch.device("meta"):
        described = dict(build_model(config).named_parameters())
    return sum(muon_operations(*described[name].shape) for name in for_muon(described, config.optimizer))


def within(cost: Cost, flops: float) -> Cost:
    """The same steps, as many as come nearest to the budget. Raises UserError where that is none."""
    steps = round(flops / cost.step_flops)
    if steps < 1:
        raise UserError(
            f"a budget of {flops:.3g} FLOPs is less than one step, which takes {cost.step_flops:.3g}"
        )
    return replace(cost, steps=steps)
