"""Sampling and validation losses of ranks with unequal shares, beside one process."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from handmade import (
    make_batch,
    small_config,
    train_step,
)

from scenarios.common import (
    ALONE,
    difference,
    over_ranks,
    stream_batches,
    train,
    whole_weights,
)
from transfusion.config import SampleGridConfig
from transfusion.evaluate.validation_losses import validation_losses
from transfusion.generate.pipeline import Pipeline
from transfusion.parallel.environment import Environment
from transfusion.parallel.local import LocalEngine
from transfusion.parallel.zero import ZeroEngine
from transfusion.schema import Batch, BatchCounts, LossTerms, Modality
from transfusion_kernels import IntervalMask


class Letters:
    """Stands for the tokenizer of a vocabulary of 64."""

    vocabulary = 64
    longest_piece = 1

    def encode(self, text: str) -> list[int]:
        return [8 + ord(letter) % 56 for letter in text]


def padding_alone(batch: Batch) -> Batch:
    """The batch of a rank whose share of the validation documents has run out."""
    everywhere = batch.token_ids_BS.shape
    bound = torch.zeros(everywhere, dtype=torch.int32)
    group = batch.media[0]
    return replace(
        batch,
        token_ids_BS=torch.zeros_like(batch.token_ids_BS),
        modality_BS=torch.full(everywhere, Modality.PADDING, dtype=torch.uint8),
        text_weight_BS=torch.zeros(everywhere),
        mask=IntervalMask(bound, bound),
        media=(replace(group, image_weight_I=torch.zeros_like(group.image_weight_I), is_empty=True),),
        counts=BatchCounts(
            tokens=0, text_targets=0, images=0, image_elements=0, padding=batch.token_ids_BS.numel()
        ),
    )


def judged_in_training(here: Environment, changes: dict[str, Any]) -> dict[str, Any]:
    """Grid and validation losses as the trainer takes them, beside one process with the same weights."""
    config = small_config(optimizer__ema_decay=0.5, **changes)
    engine, undisturbed, plain = (
        ZeroEngine(config, here),
        ZeroEngine(config, here),
        LocalEngine(config, ALONE),
    )
    for each in (engine, undisturbed):
        for step in range(4):
            train_step(each, [stream_batches(step, config)[here.rank]], learning_rate=3e-2)
    weights = whole_weights(engine)
    for shard in plain.shards():
        for kind, tensor in shard.values.items():
            tensor.copy_(weights[f"{kind}/{shard.name}"])
    plain.shards_written(engine.updates)

    grid = SampleGridConfig(prompts=["one", "two two", "three"], steps=3, seed=4)
    # The second rank has nothing left for its second batch.
    shares = [[make_batch("mixed", 50), make_batch("text", 51)], [make_batch("image", 52)]]
    shares[1].append(padding_alone(make_batch("mixed", 53)))
    with engine.evaluation("ema") as model:
        pipeline = Pipeline(model, Letters(), config, here.device)
        mine = pipeline.sample_grid(grid, rank=here.rank, ranks=2)
        # Nothing is left for the second rank, which must take part in the forwards all the same.
        single = grid.model_copy(update={"prompts": ["one"]})
        of_one = pipeline.sample_grid(single, rank=here.rank, ranks=2)
        terms = reduce(LossTerms.plus, validation_losses(model, shares[here.rank], config, here.device))
    with plain.evaluation("ema") as model:
        wanted = Pipeline(model, Letters(), config, here.device).sample_grid(grid)
        everything = [*shares[0], *shares[1]]
        wanted_terms = reduce(LossTerms.plus, validation_losses(model, everything, config, here.device))
    everyone: list[Any] = [None, None]
    dist.all_gather_object(everyone, mine)
    images = sorted(everyone[0] + everyone[1], key=lambda image: image.seed)
    pairs = list(zip(images, wanted, strict=True))
    trained_on = [train(each, here.rank, range(4, 7)) for each in (engine, undisturbed)]
    return {
        "shares": [len(share) for share in everyone],
        "of one": len(of_one),
        "captions": [[a.prompt, a.seed] for a, _ in pairs] == [[b.prompt, b.seed] for _, b in pairs],
        "greatest difference": max(int((a.pixels.int() - b.pixels.int()).abs().max()) for a, b in pairs),
        "different images": len({image.pixels.numpy().tobytes() for image in images}),
        "validation": difference(terms, wanted_terms),
        "counts": [float(over_ranks(terms).counts[name]) for name in ("text", "image")],
        "trains on the same": trained_on[0] == trained_on[1],
    }
