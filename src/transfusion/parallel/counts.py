"""What a whole step learns from, counted over all ranks before its first backward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from transfusion.losses.loss import Loss
from transfusion.parallel.collectives import group_device
from transfusion.schema import Batch


def global_counts(batches: Sequence[Batch], loss: Loss) -> dict[str, Tensor]:
    """Count what this rank's micro-batches of one step hold, and sum it over all ranks in one collective.

    By the names of the loss's terms, float32 without a dimension. The loss of every micro-batch is divided by these, so
    that neither the number of ranks nor that of micro-batches changes the gradient.
    """
    # float64: a global batch of images has more elements than float32 counts exactly.
    mine = [loss.counts(batch) for batch in batches]
    counts = torch.stack([torch.stack([each[name] for each in mine]).sum() for name in mine[0]])
    if dist.is_initialized() and dist.get_world_size() > 1:
        counts = counts.to(group_device())
        dist.all_reduce(counts)
    return dict(zip(mine[0], counts.float(), strict=True))
