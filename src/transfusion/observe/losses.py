"""Losses as they are reported: means over the targets of all ranks and of all steps of an interval."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from transfusion.losses.loss import Loss, ratio
from transfusion.parallel.collectives import group_device
from transfusion.schema import LossTerms


@dataclass(frozen=True, slots=True)
class MeanLosses:
    """Means over all ranks and steps of an interval; None where there was nothing to learn.

    images: how many of all ranks were learned from, where each told its own.
    """

    text: float | None
    image: float | None
    total: float
    image_by_timestep: list[float | None]
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
        figures = torch.tensor([*extra_sums, images], dtype=torch.float64, device=summed.text_sum.device)
        flat = torch.cat([*(term.reshape(-1) for term in summed), figures])
        if dist.is_initialized() and dist.get_world_size() > 1:
            flat = flat.to(group_device())
            dist.all_reduce(flat)
        text_sum, text_count, image_sum, image_count, *rest = flat.tolist()
        split = len(rest) - len(figures)
        buckets, (*sums, all_images) = rest[:split], rest[split:]
        half = len(buckets) // 2
        return cls(
            text=ratio(text_sum, text_count),
            image=ratio(image_sum, image_count),
            total=loss.mean(text_sum, text_count, image_sum, image_count),
            image_by_timestep=[ratio(a, b) for a, b in zip(buckets[:half], buckets[half:], strict=True)],
            images=int(all_images),
            extra_sums=sums,
        )
