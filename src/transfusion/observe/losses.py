"""Losses as they are reported: means over the targets of all ranks and of all steps of an interval."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from transfusion.losses.loss import Loss, ratio
from transfusion.parallel.collectives import sum_over_ranks
from transfusion.schema import LossTerms


@dataclass(frozen=True, slots=True)
class MeanLosses:
    """Means over all ranks and steps of an interval; None where there was nothing to learn.

    means: of each term by its name. series: of the terms that have several figures. total: what is learned.
    images: how many of all ranks were learned from, where each told its own.
    """

    means: dict[str, float | None]
    series: dict[str, list[float | None]]
    total: float
    images: int
    extra_sums: list[float] = field(default_factory=list)

    @classmethod
    def over_ranks(
        cls, parts: Sequence[LossTerms], loss: Loss, extra_sums: Sequence[float] = (), *, images: int = 0
    ) -> MeanLosses:
        """Add up the parts of all ranks, in one collective; all ranks get the same answer.

        loss: what the parts are of.
        extra_sums: other figures to be added up over the ranks on the way, as many on each. images: of this rank.
        """
        summed = functools.reduce(LossTerms.plus, (part.double() for part in parts))
        tensors = [*summed.sums.values(), *summed.counts.values()]
        figures = torch.tensor([*extra_sums, images], dtype=torch.float64, device=tensors[0].device)
        flat = torch.cat([*(tensor.reshape(-1) for tensor in tensors), figures])
        sizes = [tensor.numel() for tensor in tensors]
        *totals, added = (part.tolist() for part in sum_over_ranks(flat).split([*sizes, len(figures)]))
        half = len(summed.sums)
        sums, counts = (dict(zip(summed.sums, each, strict=True)) for each in (totals[:half], totals[half:]))
        means = {name: list(map(ratio, sums[name], counts[name])) for name in sums}
        return cls(
            means={name: mean[0] for name, mean in means.items() if summed.sums[name].dim() == 0},
            series={name: mean for name, mean in means.items() if summed.sums[name].dim() > 0},
            total=loss.mean(*({name: each[0] for name, each in part.items()} for part in (sums, counts))),
            images=int(added[-1]),
            extra_sums=added[:-1],
        )
