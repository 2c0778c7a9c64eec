"""This process's part of the training state, as live fp32 tensors that a checkpoint copies out of or into."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

WEIGHT = "weight"
FIRST_MOMENT = "exp_avg"
SECOND_MOMENT = "exp_avg_sq"
AVERAGE = "ema"


@dataclass(frozen=True, slots=True)
class Shard:
    """A slice of one parameter, counted in elements of the flattened parameter.

    values: by kind (weight, both Adam moments, moving average if there is one) a fp32 view [length] of what
    the engine trains with. Of a frozen parameter only the weight. Over all ranks the slices of a parameter cover it
    without overlap.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    length: int
    values: dict[str, Tensor]


def module_of(name: str) -> str:
    """The part of the network that a parameter belongs to: `blocks.3` for each block, else its first name."""
    first, _, rest = name.partition(".")
    return f"{first}.{rest.partition('.')[0]}" if first == "blocks" else first
