"""What a whole step learns from, counted over all ranks before its first backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from transfusion.codec.shapes import image_elements
from transfusion.config import CodecConfig
from transfusion.parallel.collectives import group_device
from transfusion.schema import Batch


class GlobalCounts(NamedTuple):
    """What one optimiser step learns from, over all ranks and micro-batches: text targets, latent elements.

    0-dim float32 tensors. The loss of every micro-batch is divided by these, so that neither the number of
    ranks nor that of micro-batches changes the gradient.
    """

    text: Tensor
    image: Tensor


def global_counts(batches: Sequence[Batch], codec: CodecConfig | None = None) -> GlobalCounts:
    """Count what this rank's micro-batches of one step hold and sum it over all ranks, in one collective.

    codec: of the images; None: their pixels.
    """
    # float64: a global batch of images has more elements than float32 counts exactly.
    text = torch.stack([batch.text_weight_BS.sum(dtype=torch.float64) for batch in batches]).sum()
    image = torch.stack(
        [
            group.image_weight_I.sum(dtype=torch.float64) * image_elements(group, codec)
            for batch in batches
            for group in batch.media
        ]
    ).sum()
    counts = torch.stack([text, image])
    if dist.is_initialized() and dist.get_world_size() > 1:
        counts = counts.to(group_device())
        dist.all_reduce(counts)
    return GlobalCounts(*counts.float())
