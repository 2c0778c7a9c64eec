"""What the scenarios share: rows of every kind for each rank, and sums over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from handmade import (
    Content,
    make_batch,
    train_step,
)

from transfusion.config import Config
from transfusion.parallel.environment import Environment
from transfusion.parallel.ulysses import SequenceGroup
from transfusion.schema import Batch, LossTerms

ALONE = Environment(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"), threads=1)
# Nothing stays gathered: the setting that shows every missing gather and every leak.
NOTHING_KEPT = {"persistence_threshold": 0, "max_live_parameters": 0, "max_reuse_distance": 0}
UNET = {
    "model__patch_embed": "unet",
    "model__unet": {"widths": [8, 16], "layers": 1, "head_dim": 8},
}
# What rank 0 and rank 1 see in each step.
STREAM: list[tuple[Content, Content]] = [
    ("mixed", "mixed"),
    ("text", "image"),
    ("text", "text"),
    ("two kinds", "mixed"),
    ("image", "image"),
    ("little text", "text"),
    ("image", "mixed"),
    ("image", "text"),
    ("packed", "mixed"),
    ("two sizes", "text"),
    ("wide", "two sizes"),
]
# With `diffusion.context=clean`: a rank with noised copies beside one without, and so on.
CLEAN_STREAM: list[tuple[Content, Content]] = [
    ("clean", "text"),
    ("clean", "clean"),
    ("image", "clean"),
    ("clean", "mixed"),
]
# With a third modality: ranks that have all three, one of them, or none.
MEDIA_STREAM: list[tuple[Content, Content]] = [
    ("seen and heard", "heard"),
    ("heard", "seen"),
    ("read", "heard"),
    ("seen", "read"),
    ("read", "read"),
    ("heard", "heard"),
]
# Vectors of rows and columns for all images of the stream.
LEARNED_PLACES = {"model__patch_position": "learned", "codec__image_sizes": ("4x4", "4x8")}
# Images of 8 x 8 pixels, latents of 4 x 4 in two channels.
LATENTS = {
    "kind": "kl", "folder": "none", "channels": 1, "image_size": 8, "latent_channels": 2, "downscale": 2,
}  # fmt: skip
IMAGE_WEIGHT = 5.0
Stream = Sequence[tuple[Content, Content]]


class Halves:
    """Stands for an autoencoder: means of squares of four pixels, and their negatives."""

    codebook_size, bound = 0, 1.0

    def encode(self, values_ICHW: torch.Tensor) -> torch.Tensor:
        mean_I1hw = torch.nn.functional.avg_pool2d(values_ICHW.float() / 127.5 - 1.0, 2)
        return torch.cat((mean_I1hw, -mean_I1hw), dim=1)

    def decode(self, latent_IChw: torch.Tensor) -> torch.Tensor:
        raise AssertionError("training encodes alone")

    preview = decode

    def as_context(self, latent_IChw: torch.Tensor) -> torch.Tensor:
        return latent_IChw


def stream_batches(step: int, config: Config, ranks: int = 2, stream: Stream = STREAM) -> list[Batch]:
    """All ranks' batches of a step; more than two ranks see what the first two see, with other values."""
    contents, side = stream[step % len(stream)] * (ranks // 2), config.codec.image_size
    return [make_batch(content, 10 * step + rank, side=side) for rank, content in enumerate(contents)]


def shares(
    step: int, config: Config, sequence: SequenceGroup, stream: Stream = STREAM, accumulation: int = 1
) -> tuple[list[Batch], list[Batch]]:
    """The micro-batches of a step that this rank reads, and those that all read.

    Ranks that share rows are one reader; a single reader takes both batches, one after the other.
    """
    readers = sequence.data_world_size
    micro = [
        stream_batches(accumulation * step + number, config, max(2, readers), stream)
        for number in range(accumulation)
    ]
    everything = [batch for batches in micro for batch in batches]
    mine = [batches[sequence.data_rank] for batches in micro] if readers > 1 else everything
    return [sequence.share(batch) for batch in mine], everything


def losses(terms: LossTerms) -> list[float]:
    """Text, image (and another modality's) and whole loss of one step, from sums over all ranks."""
    text, *media = (
        float(total / terms.counts[name].clamp(min=1))
        for name, total in terms.sums.items()
        if total.dim() == 0
    )
    return [text, *media, text + IMAGE_WEIGHT * sum(media)]


def over_ranks(terms: LossTerms) -> LossTerms:
    """The terms summed over all ranks."""
    # Copies: the terms of validation data are float64 already.
    sums, counts = (
        {name: term.to(torch.float64, copy=True) for name, term in part.items()}
        for part in (terms.sums, terms.counts)
    )
    for term in (*sums.values(), *counts.values()):
        dist.all_reduce(term)
    return LossTerms(sums, counts)


def difference(terms: LossTerms, wanted: LossTerms) -> float:
    """Greatest relative difference of the three losses; `terms` are this rank's, `wanted` those of all."""
    pairs = zip(losses(over_ranks(terms)), losses(wanted), strict=True)
    return max(abs(value - reference) / max(abs(reference), 1e-12) for value, reference in pairs)


def train(engine: Any, rank: int, steps: range) -> list[Any]:
    """Train on this rank's share of the stream; the exact outcome of every step."""
    outcome = []
    for step in steps:
        terms, result = train_step(engine, [stream_batches(step, engine.config)[rank]])
        parts = (terms.sums, terms.counts)
        sums = [float(part[name]) for part in parts for name in ("text", "image")]
        outcome.append([sums, result.gradient_norm, result.skipped])
    return outcome


def whole_weights(engine: Any) -> dict[str, torch.Tensor]:
    """Every tensor of the training state, put together over ranks."""
    parts: list[Any] = [None] * dist.get_world_size()
    mine = [(shard.name, shard.start, shard.shape, shard.values) for shard in engine.shards()]
    dist.all_gather_object(parts, mine)
    whole: dict[str, torch.Tensor] = {}
    for name, start, shape, values in (stored for part in parts for stored in part):
        for kind, tensor in values.items():
            target = whole.setdefault(f"{kind}/{name}", torch.full((torch.Size(shape).numel(),), torch.nan))
            target[start : start + tensor.numel()] = tensor
    return whole
