"""ZeRO beside the plain engine on the same rows: losses, norms, weights."""

from __future__ import annotations

from typing import Any

from handmade import (
    SOUNDS,
    Content,
    HostReads,
    counts_of,
    join_rows,
    make_batch,
    same_state,
    small_config,
    state_of,
    train_step,
    with_broken_image,
)

from scenarios.common import (
    ALONE,
    LEARNED_PLACES,
    NOTHING_KEPT,
    STREAM,
    UNET,
    Stream,
    difference,
    shares,
    stream_batches,
    whole_weights,
)
from transfusion.codec import Codec
from transfusion.config import Config
from transfusion.optim import groups
from transfusion.parallel.collectives import global_counts
from transfusion.parallel.environment import Environment
from transfusion.parallel.local import LocalEngine
from transfusion.parallel.zero import ZeroEngine

# Uneven: a bias of one element, of which the second rank has nothing but padding.
VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "nothing kept": {"train__zero": NOTHING_KEPT},
    "recomputed": {"train__activation_checkpointing": "block", "train__zero": NOTHING_KEPT},
    "attention recomputed, no places": {
        "model__patch_position": "none",
        "train__activation_checkpointing": "attention",
        "train__zero": NOTHING_KEPT,
    },
    "qk norm, 2d, gqa, learned places": {
        "model__qk_norm": True,
        "model__num_kv_heads": 1,
        **LEARNED_PLACES,
        "train__zero": NOTHING_KEPT,
    },
    "uneven": {"model__patch_size": 1, "codec__image_size": 2, "train__zero": NOTHING_KEPT},
    "unet": {**UNET, "train__zero": NOTHING_KEPT},
    "unet, recomputed": {**UNET, "train__activation_checkpointing": "block", "train__zero": NOTHING_KEPT},
    "own feed-forward": {"model__modality_weights": "ffn", "train__zero": NOTHING_KEPT},
    "own weights": {
        "model__modality_weights": "all",
        "model__qk_norm": True,
        "train__activation_checkpointing": "block",
        "train__zero": NOTHING_KEPT,
    },
    "own weights, shared rows": {
        "model__modality_weights": "all",
        "train__sequence_parallel": 2,
        "train__zero": NOTHING_KEPT,
    },
    "frozen text": {
        "model__modality_weights": "all",
        "train__freeze": ["text"],
        "train__zero": NOTHING_KEPT,
    },
    "frozen text, kept": {"model__modality_weights": "ffn", "train__freeze": ["text"]},
    "biases, wider heads, slower turns": {
        "model__attention_bias": True,
        "model__head_dim": 12,
        "model__rope_scaling": {"type": "llama3", "factor": 4.0, "original_max_position_embeddings": 16},
        "train__zero": NOTHING_KEPT,
    },
    "tied head": {"model__tie_embeddings": True},
    "tied head, nothing kept": {
        "model__tie_embeddings": True,
        "train__activation_checkpointing": "block",
        "train__zero": NOTHING_KEPT,
    },
    "tied head, stage 2": {"model__tie_embeddings": True, "train__zero": {"stage": 2}},
    "clean context": {"diffusion__context": "clean", "train__zero": NOTHING_KEPT},
    "clean context, own weights, shared rows": {
        "diffusion__context": "clean",
        "model__modality_weights": "all",
        "train__sequence_parallel": 2,
        "train__zero": NOTHING_KEPT,
    },
    "three modalities": {"modalities": SOUNDS, "train__zero": NOTHING_KEPT},
    "three modalities, own weights": {
        "modalities": SOUNDS,
        "model__modality_weights": "all",
        "model__patch_position": "learned",
        "train__zero": NOTHING_KEPT,
    },
    "clean image": {"diffusion__prediction": "x", "train__zero": NOTHING_KEPT},
    "muon": {"optimizer__name": "muon"},
    "muon, nothing kept, own weights": {
        "optimizer__name": "muon",
        "model__modality_weights": "all",
        "train__zero": NOTHING_KEPT,
    },
    "muon, stage 1": {"optimizer__name": "muon", "train__zero": {"stage": 1}},
    "stage 1": {"train__zero": {"stage": 1}},
    "stage 2": {"train__zero": {"stage": 2}},
    "all offloaded": {
        "train__zero": NOTHING_KEPT | {"offload_optimizer": "cpu", "offload_parameters": "cpu"}
    },
    "stage 2, optimiser offloaded": {"train__zero": {"stage": 2, "offload_optimizer": "cpu"}},
    "shared rows": {"train__sequence_parallel": 2, "train__zero": NOTHING_KEPT},
    "shared rows, unet": {**UNET, "train__sequence_parallel": 2, "train__zero": NOTHING_KEPT},
    "shared rows, 2d, gqa, learned places": {
        **LEARNED_PLACES,
        "model__position": "2d",
        "model__qk_norm": True,
        "model__heads": 4,
        "model__num_kv_heads": 2,
        "train__sequence_parallel": 2,
        "train__activation_checkpointing": "attention",
    },
}


def equals_local(
    config: Config,
    here: Environment,
    reference: Config | None = None,
    steps: int = len(STREAM),
    codec: Codec | None = None,
    stream: Stream = STREAM,
    accumulation: int = 1,
) -> dict[str, Any]:
    """Losses, gradient norms and final weights of ZeRO beside those of the plain engine on the same rows."""
    zero, plain = ZeroEngine(config, here, codec), LocalEngine(reference or config, ALONE, codec)
    loss_errors, norm_errors = [], []
    for step in range(steps):
        mine, everything = shares(step, config, zero.sequence, stream, accumulation)
        counts = global_counts(mine, zero.loss)
        terms, result = train_step(zero, mine, counts=counts)
        wanted_terms, wanted = train_step(
            plain, everything, counts=counts if codec else counts_of(everything)
        )
        loss_errors.append(difference(terms, wanted_terms))
        # With frozen text a step of text alone has no gradient.
        off = abs(result.gradient_norm - wanted.gradient_norm)
        norm_errors.append(off / wanted.gradient_norm if wanted.gradient_norm else off)
    got, wanted_state = whole_weights(zero), state_of(plain)
    weight_errors = {
        key: float((got[key] - value).abs().max() / value.abs().max().clamp(min=1e-12))
        for key, value in wanted_state.items()
        if key.startswith("weight/")
    }
    return {
        "loss": max(loss_errors),
        "norm": max(norm_errors),
        "weight": max(weight_errors.values()),
        "parameters": got.keys() == wanted_state.keys(),
        "dtypes": sorted({str(parameter.dtype) for parameter in zero.engine.module.parameters()}),
    }


def nothing_is_read(config: Config, here: Environment) -> dict[str, Any]:
    """A step with the fused AdamW, which a GPU has: what the host reads, and that it learns the same and skips."""
    asking, runs_fused = ZeroEngine(config, here), groups.runs_fused
    groups.runs_fused = lambda device: True
    try:
        fused = ZeroEngine(config, here)
    finally:
        groups.runs_fused = runs_fused
    batches = [
        fused.sequence.share(stream_batches(step, config)[fused.sequence.data_rank]) for step in (0, 1)
    ]
    errors: list[float] = []
    places: list[str] = []
    for step in range(4):
        with HostReads() as reads:
            counts = global_counts(batches, fused.loss)
            for batch in batches:
                fused.forward_backward(batch, counts)
            pending = fused.step(1e-3)
        places += reads.places if step else []  # modules are met for the first time in the first step
        result, (_, wanted) = pending.read(), train_step(asking, batches)
        errors.append(abs(result.gradient_norm / wanted.gradient_norm - 1))
    with HostReads() as reads:
        train_step(asking, batches)
    before = state_of(fused)
    broken = [with_broken_image(batch) if here.rank == 1 else batch for batch in batches]
    _, skipped = train_step(fused, broken)
    for batch in batches:
        fused.forward_backward(batch, counts)
    too_large = fused.step(1e-3, max_norm=result.gradient_norm / 100).read()
    untouched = same_state(before, state_of(fused))
    _, good = train_step(fused, batches)
    return {
        "read": sorted(set(places)),
        "read by the asking": len(reads.places),
        "norm": max(errors),
        "skipped": [step.skipped for step in (skipped, too_large, good)],
        "infinite": skipped.gradient_norm == float("inf"),
        "state untouched": untouched,
        "updates": fused.updates,
    }


def accumulation(here: Environment) -> dict[str, Any]:
    """On ZeRO two micro-batches of one row and one of two; on the plain engine all rows in one batch."""
    config = small_config(train__zero=NOTHING_KEPT)
    apart, joined, plain = ZeroEngine(config, here), ZeroEngine(config, here), LocalEngine(config, ALONE)
    loss_errors, norm_errors = [], []
    contents: list[Content] = ["mixed", "text", "image", "mixed"]
    for step in range(6):
        rows = [
            [make_batch(contents[(step + rank + row) % 4], 100 * step + 10 * rank + row, 1) for row in (0, 1)]
            for rank in (0, 1)
        ]
        terms_apart, norm_apart = train_step(apart, rows[here.rank])
        terms_joined, norm_joined = train_step(joined, [join_rows(*rows[here.rank])])
        everything = join_rows(join_rows(*rows[0]), join_rows(*rows[1]))
        wanted, norm = train_step(plain, [everything], counts=counts_of([everything]))
        loss_errors += [difference(terms, wanted) for terms in (terms_apart, terms_joined)]
        norm_errors += [
            abs(item.gradient_norm / norm.gradient_norm - 1) for item in (norm_apart, norm_joined)
        ]
    return {"loss": max(loss_errors), "norm": max(norm_errors)}


def chunk_counts(chunk: int) -> list[tuple[int, ...]]:
    """Into how many chunks the text head cuts each rank's targets, step by step."""
    steps = (stream_batches(step, small_config()) for step in range(len(STREAM)))
    return [tuple(-(-batch.counts.text_targets // chunk) for batch in batches) for batches in steps]
