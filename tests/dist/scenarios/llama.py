"""Weights of a Llama, read by each rank for its own slices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from handmade import (
    counts_of,
    small_config,
    train_step,
)
from safetensors.torch import save_file

from scenarios.common import (
    ALONE,
    difference,
    stream_batches,
    whole_weights,
)
from transfusion.checkpoint import published_weights
from transfusion.checkpoint.published_weights import PublishedModel, start_from_published
from transfusion.config.weights_folder import index_name
from transfusion.parallel.environment import Environment
from transfusion.parallel.local import LocalEngine
from transfusion.parallel.zero import ZeroEngine


class Pieces:
    """Stands for a tokenizer of which a Llama without one needs nothing."""

    def piece_bytes(self) -> list[bytes]:
        return []


def from_llama(changes: dict[str, Any], here: Environment, folder: Path) -> dict[str, Any]:
    """A Llama of two shards into ZeRO and into the plain engine; how much a rank read at once."""
    config = small_config(optimizer__ema_decay=0.5, model__num_kv_heads=1, **changes)
    source = LocalEngine(config.model_copy(update={"run": config.run.model_copy(update={"seed": 3})}), ALONE)
    if here.rank == 0:
        write_llama(folder, source)
    dist.barrier()
    read, rows = [], PublishedModel.rows

    def watched(self: PublishedModel, name: str, start: int, end: int) -> torch.Tensor:
        values = rows(self, name, start, end)
        read.append(values.numel())
        return values

    PublishedModel.rows = watched  # type: ignore[method-assign]
    zero, plain = ZeroEngine(config, here), LocalEngine(config, ALONE)
    start_from_published(folder, zero, Pieces())  # type: ignore[arg-type]
    mine = sum(read)
    start_from_published(folder, plain, Pieces())  # type: ignore[arg-type]
    PublishedModel.rows = rows  # type: ignore[method-assign]
    got = whole_weights(zero)
    batches = stream_batches(0, config)
    terms, _ = train_step(zero, [batches[here.rank]])
    wanted, _ = train_step(plain, batches, counts=counts_of(batches))
    taken = plain.masters["embedding.weight"].numel()
    return {
        "same": all(
            torch.equal(got[f"{kind}/{name}"], value.flatten())
            for kind in ("weight", "ema")
            for name, value in source.masters.items()
            if not name.startswith("patch_")
        ),
        "read at once": max(read) <= taken,
        "share read": mine / (sum(read) - mine),
        "next loss": difference(terms, wanted),
    }


def write_llama(folder: Path, source: LocalEngine) -> None:
    """The text tower of an engine, as transformers writes a Llama."""
    model = source.config.model
    folder.mkdir(parents=True)
    names = {name: published_weights.published_name(name, False) for name in source.masters}
    tensors = {its: source.masters[name].detach().contiguous() for name, its in names.items() if its}
    halves = (dict(list(tensors.items())[::2]), dict(list(tensors.items())[1::2]))
    weight_map = {}
    for number, half in enumerate(halves):
        file = f"model-{number}.safetensors"
        save_file(half, str(folder / file))
        weight_map |= dict.fromkeys(half, file)
    (folder / index_name(published_weights.STEM)).write_text(json.dumps({"weight_map": weight_map}))
    settings = {
        "model_type": "llama", "num_hidden_layers": model.layers, "hidden_size": model.hidden_size,
        "num_attention_heads": model.heads, "num_key_value_heads": model.kv_heads,
        "intermediate_size": model.ffn_width, "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": model.tie_embeddings,
    }  # fmt: skip
    (folder / published_weights.CONFIG).write_text(json.dumps(settings))
