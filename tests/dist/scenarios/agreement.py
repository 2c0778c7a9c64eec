"""What ranks decide together, and what all of them refuse where one must."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from handmade import (
    Content,
    counts_of,
    make_batch,
    small_config,
)

from transfusion.errors import UserError
from transfusion.families.build import family_of
from transfusion.parallel.build import build_engine
from transfusion.parallel.collectives import global_counts, reduce_decision
from transfusion.parallel.environment import Environment
from transfusion.parallel.ulysses import SequenceGroup
from transfusion.schema import Decision


def refused_sharing(here: Environment) -> list[str]:
    """What is said where the ranks cannot share rows, and where they have read different ones."""
    told = []
    for config in (
        small_config(train__sequence_parallel=4, model__heads=4),
        small_config(train__sequence_parallel=2, data__global_batch_size=3),
    ):
        try:
            build_engine(config, replace(here, world_size=4) if config.data.global_batch_size == 3 else here)
        except UserError as error:
            told.append(str(error))
    group = SequenceGroup(2, rank=here.rank, world_size=2)
    try:
        group.share(make_batch("mixed", here.rank))
    except RuntimeError as error:
        told.append(str(error))
    return told


def agreement(here: Environment) -> dict[str, Any]:
    decision = Decision.SAVE_AND_STOP if here.rank == 1 else Decision.CONTINUE
    result = reduce_decision(decision, 3 + here.rank, 10**12)
    content: Content = "image" if here.rank else "text"
    config = small_config()
    loss = family_of(config).loss(config, None)
    counts = global_counts([make_batch(content, 1), make_batch(content, 2)], loss)
    expected = counts_of([make_batch(kind, seed) for kind in ("text", "image") for seed in (1, 2)])
    try:
        build_engine(small_config(train__engine="local"), here)
        refusal = ""
    except UserError as error:
        refusal = str(error)
    return {
        "decision": int(result.decision),
        "counts": list(result.counts),
        "global counts": [
            counts["text"].item() == expected["text"].item(),
            counts["image"].item() == expected["image"].item(),
        ],
        "local engine refused": refusal,
        "auto": type(build_engine(small_config(), here)).__name__,
    }


def built_files() -> list[str]:
    """What has been compiled for DeepSpeed; the tests give it a folder of their own."""
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
