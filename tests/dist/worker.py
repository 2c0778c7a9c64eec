"""What one rank does in the distributed tests: `worker.py single|pair|compiled|interpreted FOLDER`.

Starting DeepSpeed takes seconds, so all scenarios run in one start and write their findings to
FOLDER/<mode>_<rank>.json; the tests beside this file judge them. A scenario that raises is recorded as a
traceback. `single` comes first: it leaves the checkpoint that `pair` loads.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

from handmade import (
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
from safetensors.torch import save_file
from transfusion_kernels import IntervalMask

from transfusion.checkpoint import layout, llama
from transfusion.checkpoint import save as saving
from transfusion.checkpoint.layout import step_folder
from transfusion.checkpoint.llama import Llama, start_from_llama
from transfusion.checkpoint.resume import SliceReader, load, resume
from transfusion.checkpoint.save import save
from transfusion.codec import Codec, TokenCodec
from transfusion.config import Config, SampleConfig
from transfusion.errors import UserError
from transfusion.evaluate.validation_losses import held_out_losses
from transfusion.generate.pipeline import Pipeline
from transfusion.optim import groups
from transfusion.parallel import environment
from transfusion.parallel.collectives import agree
from transfusion.parallel.build import build_engine
from transfusion.parallel.counts import global_counts
from transfusion.parallel.environment import Environment
from transfusion.parallel.local import LocalEngine
from transfusion.parallel.ulysses import SequenceGroup
from transfusion.parallel.zero import ZeroEngine
from transfusion.schema import Batch, BatchCounts, Decision, LossTerms, Modality, TrainState

ALONE = Environment(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"), threads=1)
# Nothing stays gathered: the setting that shows every missing gather and every leak.
NOTHING_KEPT = {"persistence_threshold": 0, "max_live_parameters": 0, "max_reuse_distance": 0}
UNET = {
    "model__patcher": "unet",
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
# Vectors of rows and columns for all pictures of the stream.
LEARNED_PLACES = {"model__patch_position": "learned", "codec__image_sizes": ("4x4", "4x8")}
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
        "model__key_heads": 1,
        **LEARNED_PLACES,
        "train__zero": NOTHING_KEPT,
    },
    "uneven": {"model__patch_size": 1, "codec__image_size": 2, "train__zero": NOTHING_KEPT},
    "unet": {**UNET, "train__zero": NOTHING_KEPT},
    "unet, recomputed": {**UNET, "train__activation_checkpointing": "block", "train__zero": NOTHING_KEPT},
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
        "model__key_heads": 2,
        "train__sequence_parallel": 2,
        "train__activation_checkpointing": "attention",
    },
}
# Pictures of 8 x 8 pixels, latents of 4 x 4 in two channels.
LATENTS = {
    "kind": "kl", "folder": "none", "channels": 1, "image_size": 8, "latent_channels": 2, "downscale": 2,
}  # fmt: skip
IMAGE_WEIGHT = 5.0


class Halves:
    """Stands for an autoencoder: means of squares of four pixels, and their negatives."""

    bound: float | None = 1.0

    def encode(self, values_ICHW: torch.Tensor) -> torch.Tensor:
        mean_I1hw = torch.nn.functional.avg_pool2d(values_ICHW.float() / 127.5 - 1.0, 2)
        return torch.cat((mean_I1hw, -mean_I1hw), dim=1)

    def decode(self, latent_IChw: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    settled = decode


Stream = Sequence[tuple[Content, Content]]


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
    """Text, image and whole loss of one step, from sums over all ranks."""
    text = float(terms.text_sum / terms.text_count.clamp(min=1))
    image = float(terms.image_sum / terms.image_count.clamp(min=1))
    return [text, image, text + IMAGE_WEIGHT * image]


def over_ranks(terms: LossTerms) -> LossTerms:
    """The terms summed over all ranks."""
    # Copies: the terms of held-out data are float64 already.
    summed = [term.to(torch.float64, copy=True) for term in terms]
    for term in summed:
        dist.all_reduce(term)
    return LossTerms(*summed)


def difference(terms: LossTerms, wanted: LossTerms) -> float:
    """Greatest relative difference of the three losses; `terms` are this rank's, `wanted` those of all."""
    pairs = zip(losses(over_ranks(terms)), losses(wanted), strict=True)
    return max(abs(value - reference) / max(abs(reference), 1e-12) for value, reference in pairs)


def train(engine: Any, rank: int, steps: range) -> list[Any]:
    """Train on this rank's share of the stream; the exact outcome of every step."""
    outcome = []
    for step in steps:
        terms, result = train_step(engine, [stream_batches(step, engine.config)[rank]])
        outcome.append([[float(term) for term in terms[:4]], result.gradient_norm, result.skipped])
    return outcome


def whole_weights(engine: Any) -> dict[str, torch.Tensor]:
    """Every tensor of the training state, put together over ranks."""
    parts: list[Any] = [None] * dist.get_world_size()
    mine = [(shard.name, shard.start, shard.shape, shard.values) for shard in engine.shards()]
    dist.all_gather_object(parts, mine)
    whole: dict[str, torch.Tensor] = {}
    for name, start, shape, values in (piece for part in parts for piece in part):
        for kind, tensor in values.items():
            target = whole.setdefault(f"{kind}/{name}", torch.full((torch.Size(shape).numel(),), torch.nan))
            target[start : start + tensor.numel()] = tensor
    return whole


def equals_local(
    config: Config,
    here: Environment,
    reference: Config | None = None,
    steps: int = len(STREAM),
    codec: Codec | TokenCodec | None = None,
    stream: Stream = STREAM,
    accumulation: int = 1,
) -> dict[str, Any]:
    """Losses, gradient norms and final weights of ZeRO beside those of the plain engine on the same rows."""
    zero, plain = ZeroEngine(config, here, codec), LocalEngine(reference or config, ALONE, codec)
    loss_errors, norm_errors = [], []
    for step in range(steps):
        mine, everything = shares(step, config, zero.sequence, stream, accumulation)
        counts = global_counts(mine, config.codec)
        terms, result = train_step(zero, mine, counts=counts)
        wanted_terms, wanted = train_step(
            plain, everything, counts=counts if codec else counts_of(everything)
        )
        loss_errors.append(difference(terms, wanted_terms))
        norm_errors.append(abs(result.gradient_norm / wanted.gradient_norm - 1))
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
            counts = global_counts(batches)
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
    too_large = fused.step(1e-3, largest_norm=result.gradient_norm / 100).read()
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


def release(here: Environment) -> dict[str, Any]:
    """How many elements of parameters each rank holds gathered, by when."""
    engine = ZeroEngine(small_config(train__zero=NOTHING_KEPT), here)
    parameters = list(engine.engine.module.parameters())
    held: dict[str, Any] = {"whole": sum(parameter.ds_numel for parameter in parameters)}
    highest = 0

    def watch(*_: Any) -> None:
        nonlocal highest
        highest = max(highest, sum(parameter.numel() for parameter in parameters))

    for module in engine.engine.module.modules():
        module.register_forward_hook(watch)
    batch = stream_batches(0, engine.config)[here.rank]
    train_step(engine, [batch])
    counts = global_counts([batch])
    held["peak"] = highest
    engine.forward_backward(batch, counts)
    held["after backward"] = sum(parameter.numel() for parameter in parameters)
    engine.step(1e-3)
    with engine.evaluation("raw") as model:
        engine.loss.terms(model, batch)
        held["after evaluation"] = sum(parameter.numel() for parameter in parameters)
    kept = ZeroEngine(small_config(), here)
    train_step(kept, [batch])
    held["kept by default"] = sum(parameter.numel() for parameter in kept.engine.module.parameters())
    return held


def broken_step(config: Config, here: Environment) -> dict[str, Any]:
    """NaN on rank 1 alone, in the second of two micro-batches, beside a run that never saw it."""
    engine, untouched = ZeroEngine(config, here), ZeroEngine(config, here)
    for each in (engine, untouched):
        train(each, here.rank, range(2))
    before = state_of(engine)
    good = make_batch("mixed", 77 + here.rank, side=config.codec.image_size)
    bad = with_broken_image(good) if here.rank == 1 else good
    _, result = train_step(engine, [good, bad])
    return {
        "skipped": result.skipped,
        "norm is infinite": result.gradient_norm == float("inf"),
        "state untouched": same_state(before, state_of(engine)),
        "updates": engine.updates,
        "goes on the same": train(engine, here.rank, range(2, 5)) == train(untouched, here.rank, range(2, 5)),
        "ends the same": same_state(state_of(engine), state_of(untouched)),
    }


def evaluation(config: Config, here: Environment) -> dict[str, Any]:
    """Averaged weights beside the plain engine's, partial forwards as in sampling, and no trace left behind."""
    engine, undisturbed, plain = (
        ZeroEngine(config, here),
        ZeroEngine(config, here),
        LocalEngine(config, ALONE),
    )
    for step in range(3):
        batches = stream_batches(step, config)
        train_step(plain, batches, counts=counts_of(batches))
    for each in (engine, undisturbed):
        train(each, here.rank, range(3))
    before = state_of(engine)
    batch = make_batch("mixed", 5)
    found: dict[str, Any] = {}
    for weights in ("ema", "raw"):
        with engine.evaluation(weights) as model, plain.evaluation(weights) as reference:
            found[f"{weights} training"] = model.training
            for _ in range(2):
                terms, wanted = engine.loss.terms(model, batch), plain.loss.terms(reference, batch)
            found[f"{weights} text"], found[f"{weights} image"] = (
                float(terms.text_sum),
                float(terms.image_sum),
            )
            found[f"{weights} error"] = max(
                abs(float(terms.text_sum / wanted.text_sum) - 1),
                abs(float(terms.image_sum / wanted.image_sum) - 1),
            )
            noisy = [torch.zeros(batch.images[0].values.shape)]
            for _ in range(3):
                encoding = model.encode_patches(noisy, batch.images[0].timestep_I)
                hidden = model.embed(batch, encoding.patch_ND)
                hidden = model.norm(model.run_blocks(hidden, batch.position_BSA, batch.mask))
                slots = batch.images[0].patch_slot_IP.flatten()
                model.decode_patches(hidden.flatten(0, 1)[slots], encoding)
                model.text_head(hidden.flatten(0, 1))
        found[f"{weights} state untouched"] = same_state(before, state_of(engine))
    found["trains on the same"] = train(engine, here.rank, range(3, 6)) == train(
        undisturbed, here.rank, range(3, 6)
    )
    return found


def checkpoints(config: Config, here: Environment, folder: Path) -> dict[str, Any]:
    """Save, go on, load into a fresh engine and go on again, with several checkpoints on the way."""
    engine = ZeroEngine(config, here)
    train(engine, here.rank, range(2))
    with engine.evaluation("ema"):
        pass
    state = TrainState(step=2, skipped_steps=1, tokens=34, data={"source": {"epoch": 1}})
    save(folder, engine, TrainState(step=1), keep=2)
    save(folder, engine, state, keep=2)
    saved = state_of(engine)
    expected = train(engine, here.rank, range(2, 6))
    fresh = ZeroEngine(config, here)
    found: dict[str, Any] = {"state": resume(folder, fresh) == state, "updates": fresh.updates}
    found["loaded bit for bit"] = same_state(saved, state_of(fresh))
    found["goes on the same"] = train(fresh, here.rank, range(2, 6)) == expected
    found["ends the same"] = same_state(state_of(engine), state_of(fresh))
    plain = LocalEngine(config, ALONE)
    load(step_folder(folder, 2), plain)
    load(step_folder(folder, 2), fresh)
    gathered, whole = whole_weights(fresh), state_of(plain)
    found["plain engine loads the same"] = same_state(gathered, whole)
    found["files"] = sorted(path.name for path in folder.rglob("*") if path.is_file() and here.rank == 0)
    return found


def from_one_rank(config: Config, here: Environment, folder: Path) -> dict[str, Any]:
    """Load what a single process saved; its shards beside the plain engine's whole tensors."""
    engine, plain = ZeroEngine(config, here), LocalEngine(config, ALONE)
    state = resume(folder / "one", engine)
    load(step_folder(folder / "one", 3), plain)
    same = same_state(whole_weights(engine), state_of(plain))
    batches = stream_batches(4, config)
    terms, _ = train_step(engine, [batches[here.rank]])
    wanted, _ = train_step(plain, batches, counts=counts_of(batches))
    return {
        "state": state == TrainState(step=3),
        "same": same,
        "next loss": difference(terms, wanted),
        "updates": engine.updates,
    }


def failures(config: Config, here: Environment, folder: Path) -> dict[str, Any]:
    """Errors of one rank that every rank must hear of: no space while saving, a bad file while loading."""
    engine = ZeroEngine(config, here)
    found = {}

    def no_space(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    # Before anything is written, and in the thread that writes.
    for name, owner, member in (("begin", engine, "shards"), ("save", saving, "write_tensors")):
        whole = getattr(owner, member)
        if here.rank == 1:
            setattr(owner, member, no_space)
        try:
            save(folder, engine, TrainState(step=9), keep=2)
        except UserError as error:
            found[name] = str(error)
        setattr(owner, member, whole)
    found["nothing counts as saved"] = not step_folder(folder, 9).exists()
    target = save(folder, engine, TrainState(step=10), keep=2)
    if here.rank == 1:
        # Shared storage may show a rank a former list of files.
        layout.find_latest = lambda _: None  # type: ignore[assignment]
    state = resume(folder, engine)
    found["all resume what the first finds"] = state is not None and state.step == 10
    reader = SliceReader.read

    def unreadable(*_: Any) -> Any:
        raise OSError(5, "Input/output error", "rank_00000.safetensors")

    if here.rank == 1:
        SliceReader.read = unreadable  # type: ignore[method-assign]
    try:
        load(target, engine)
    except UserError as error:
        found["fill"] = str(error)
    SliceReader.read = reader  # type: ignore[method-assign]
    if here.rank == 0:
        path = target / "rank_00001.safetensors"
        path.write_bytes(path.read_bytes()[:-4])
    dist.barrier()
    try:
        load(target, engine)
    except UserError as error:
        found["load"] = str(error)
    return found


def low_precision(here: Environment, stage: int) -> dict[str, Any]:
    """bf16 beside the plain engine in bf16, which rounds and adds in another order."""
    config = small_config(train__precision="bf16", train__zero={"stage": stage}, optimizer__ema_decay=0.5)
    zero, plain = ZeroEngine(config, here), LocalEngine(config, ALONE)
    start = same_state(whole_weights(zero), state_of(plain))
    curve, errors = [], []
    for _ in range(8):
        batches = stream_batches(0, config)
        terms, _ = train_step(zero, [batches[here.rank]])
        wanted, _ = train_step(plain, batches, counts=counts_of(batches))
        curve.append(losses(over_ranks(terms))[2])
        errors.append(difference(terms, wanted))
    dtypes = {str(parameter.dtype) for parameter in zero.engine.module.parameters()}
    return {"unrounded start": start, "curve": curve, "error": max(errors), "dtypes": sorted(dtypes)}


def told_norms(config: Config, here: Environment) -> dict[str, Any]:
    """Norms by module beside the plain engine's, with a gradient that is clipped; then a step that is refused."""
    zero, plain = ZeroEngine(config, here), LocalEngine(config, ALONE)
    errors = []
    for step in range(3):
        batches = stream_batches(step, config)
        counts = counts_of(batches)
        zero.forward_backward(batches[here.rank], counts)
        for batch in batches:
            plain.forward_backward(batch, counts)
        got, wanted = (each.step(1e-3, module_norms=True).read() for each in (zero, plain))
        assert got.module_norms is not None and wanted.module_norms is not None
        assert got.module_norms.keys() == wanted.module_norms.keys() and got.gradient_norm > 0.1
        # Relative to the whole: at the start some parts have no gradient at all.
        errors += [
            abs(norm - wanted.module_norms[name]) / wanted.gradient_norm
            for name, norm in got.module_norms.items()
        ]
    before = state_of(zero)
    batches = stream_batches(3, config)
    zero.forward_backward(batches[here.rank], counts_of(batches))
    refused = zero.step(1e-3, largest_norm=wanted.gradient_norm / 100, module_norms=True).read()
    untouched = same_state(before, state_of(zero))
    _, after = train_step(zero, [batches[here.rank]])
    return {
        "error": max(errors),
        "refused": refused.skipped and refused.module_norms is None,
        "norm of the refused": abs(refused.gradient_norm / after.gradient_norm - 1),
        "state untouched": untouched,
        "taken after": not after.skipped,
        "updates": zero.updates,
    }


class Pieces:
    """Stands for a tokenizer of which a Llama without one needs nothing."""

    def piece_bytes(self) -> list[bytes]:
        return []


def from_llama(changes: dict[str, Any], here: Environment, folder: Path) -> dict[str, Any]:
    """A Llama of two shards into ZeRO and into the plain engine; how much a rank read at once."""
    config = small_config(optimizer__ema_decay=0.5, model__key_heads=1, **changes)
    source = LocalEngine(config.model_copy(update={"run": config.run.model_copy(update={"seed": 3})}), ALONE)
    if here.rank == 0:
        write_llama(folder, source)
    dist.barrier()
    read, rows = [], Llama.rows

    def watched(self: Llama, name: str, start: int, end: int) -> torch.Tensor:
        values = rows(self, name, start, end)
        read.append(values.numel())
        return values

    Llama.rows = watched  # type: ignore[method-assign]
    zero, plain = ZeroEngine(config, here), LocalEngine(config, ALONE)
    start_from_llama(folder, zero, Pieces())  # type: ignore[arg-type]
    mine = sum(read)
    start_from_llama(folder, plain, Pieces())  # type: ignore[arg-type]
    Llama.rows = rows  # type: ignore[method-assign]
    got = whole_weights(zero)
    batches = stream_batches(0, config)
    terms, _ = train_step(zero, [batches[here.rank]])
    wanted, _ = train_step(plain, batches, counts=counts_of(batches))
    taken = plain.masters["text_head.weight"].numel()
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
    names = {name: llama._their_name(name, False) for name in source.masters}
    tensors = {its: source.masters[name].detach().contiguous() for name, its in names.items() if its}
    halves = (dict(list(tensors.items())[::2]), dict(list(tensors.items())[1::2]))
    weight_map = {}
    for number, half in enumerate(halves):
        file = f"model-{number}.safetensors"
        save_file(half, str(folder / file))
        weight_map |= dict.fromkeys(half, file)
    (folder / llama.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    settings = {
        "model_type": "llama", "num_hidden_layers": model.layers, "hidden_size": model.width,
        "num_attention_heads": model.heads, "num_key_value_heads": model.kv_heads,
        "intermediate_size": model.ffn_width, "rms_norm_eps": model.norm_epsilon,
    }  # fmt: skip
    (folder / llama.CONFIG).write_text(json.dumps(settings))


def refused_sharing(here: Environment) -> list[str]:
    """What is said where the ranks cannot share rows, and where they have read different ones."""
    told = []
    for config in (
        small_config(train__sequence_parallel=4, model__heads=4),
        small_config(train__sequence_parallel=2, data__rows=3),
    ):
        try:
            build_engine(config, replace(here, world_size=4) if config.data.rows == 3 else here)
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
    result = agree(decision, 3 + here.rank, 10**12)
    content: Content = "image" if here.rank else "text"
    counts = global_counts([make_batch(content, 1), make_batch(content, 2)])
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
            counts.text.item() == expected.text.item(),
            counts.image.item() == expected.image.item(),
        ],
        "local engine refused": refusal,
        "auto": type(build_engine(small_config(), here)).__name__,
    }


def pair(here: Environment, folder: Path) -> dict[str, Callable[[], Any]]:
    averaged = small_config(optimizer__ema_decay=0.5)
    tight = small_config(optimizer__ema_decay=0.5, train__zero=NOTHING_KEPT)
    low = small_config(optimizer__ema_decay=0.5, train__precision="bf16")
    second = small_config(optimizer__ema_decay=0.5, train__zero={"stage": 2})
    uneven = small_config(optimizer__ema_decay=0.5, **VARIANTS["uneven"])
    unet = small_config(optimizer__ema_decay=0.5, **VARIANTS["unet"])
    shared_low = small_config(optimizer__ema_decay=0.5, train__precision="bf16", train__sequence_parallel=2)
    latents = small_config(codec=LATENTS, **VARIANTS["shared rows"])
    scenarios: dict[str, Callable[[], Any]] = {"agreement": lambda: agreement(here)}
    for name, changes in VARIANTS.items():
        scenarios[f"equals local: {name}"] = lambda changes=changes: equals_local(
            small_config(**changes), here
        )
    scenarios |= {
        "accumulation": lambda: accumulation(here),
        "nothing is read: nothing kept": lambda: nothing_is_read(tight, here),
        "nothing is read: bf16, shared rows": lambda: nothing_is_read(shared_low, here),
        "equals local: shared rows, latents": lambda: equals_local(latents, here, steps=3, codec=Halves()),
        "refused sharing": lambda: refused_sharing(here),
        "release": lambda: release(here),
        "low precision: 3": lambda: low_precision(here, 3),
        "low precision: 1": lambda: low_precision(here, 1),
        "from one rank": lambda: from_one_rank(averaged, here, folder),
        "failures": lambda: failures(averaged, here, folder / "failures"),
    }
    for name, changes in {
        "nothing kept": {"train__zero": NOTHING_KEPT},
        "stage 2": {"train__zero": {"stage": 2}},
    }.items():
        scenarios[f"from a Llama: {name}"] = lambda name=name, changes=changes: from_llama(
            changes, here, folder / f"llama {name}"
        )
    low_first = {"train__zero": {"stage": 1}, "train__precision": "bf16"}
    for name, changes in {**VARIANTS, "stage 1, bf16": low_first}.items():
        if name in ("nothing kept", "uneven", "stage 2", "stage 1, bf16"):
            clipped = small_config(optimizer__gradient_clip=0.05, **changes)
            scenarios[f"told norms: {name}"] = lambda clipped=clipped: told_norms(clipped, here)
    kinds = {"defaults": averaged, "nothing kept": tight, "bf16": low, "stage 2": second, "uneven": uneven}
    for name, config in kinds.items():
        scenarios[f"checkpoints: {name}"] = lambda config=config, name=name: checkpoints(
            config, here, folder / name
        )
        if name != "uneven":
            scenarios[f"broken step: {name}"] = lambda config=config: broken_step(config, here)
        if name not in ("bf16", "uneven"):
            scenarios[f"evaluation: {name}"] = lambda config=config: evaluation(config, here)
    scenarios["evaluation: unet"] = lambda: evaluation(unet, here)
    return scenarios


def single(here: Environment, folder: Path) -> dict[str, Callable[[], Any]]:
    def run() -> dict[str, Any]:
        config = small_config(optimizer__ema_decay=0.5, train__engine="zero")
        engine, plain = build_engine(config, here), LocalEngine(config, ALONE)
        outcomes = [train(each, 0, range(3)) for each in (engine, plain)]
        pairs = zip(outcomes[0], outcomes[1], strict=True)
        save(folder / "one", engine, TrainState(step=3), keep=1)
        return {
            "engine": type(engine).__name__,
            "norm error": max(abs(zero[1] / local[1] - 1) for zero, local in pairs),
            "group of one": dist.get_world_size() == 1,
        }

    return {"one rank": run}


def compiled(here: Environment, folder: Path) -> dict[str, Callable[[], Any]]:
    """Compiled blocks, alone and recomputed, beside eager ones."""

    def run(recomputed: str, ranks_a_row: int = 1) -> dict[str, Any]:
        config = small_config(
            train__compile=True,
            train__activation_checkpointing=recomputed,
            train__sequence_parallel=ranks_a_row,
            train__zero=NOTHING_KEPT,
        )
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        found = equals_local(config, here, small_config())
        counters = torch._dynamo.utils.counters
        found["graphs"] = counters["stats"]["unique_graphs"]
        found["breaks"] = sum(counters["graph_break"].values())
        return found

    return {
        "compiled": lambda: run("none"),
        "compiled, recomputed": lambda: run("block"),
        "compiled, attention recomputed": lambda: run("attention"),
        "compiled, recomputed, shared rows": lambda: run("block", 2),
    }


def interpreted(here: Environment, folder: Path) -> dict[str, Callable[[], Any]]:
    """The Triton kernels, run by Triton's interpreter, beside the plain engine on the CPU's attention."""
    from transfusion_kernels.attention import forward

    changes = {"model__width": 64, "train__activation_checkpointing": "block", "train__zero": NOTHING_KEPT}
    launches = []
    launch = forward.attention_forward

    def counted(*arguments: Any) -> Any:
        launches.append(arguments[0].shape)
        return launch(*arguments)

    def run() -> dict[str, Any]:
        forward.attention_forward = counted  # type: ignore[assignment]
        config = small_config(train__attention="triton", **changes)
        found = equals_local(config, here, small_config(train__attention="cpu", **changes), steps=2)
        return found | {"forwards": len(launches), "contents": STREAM[:2]}

    return {"interpreted": run}


class Letters:
    """Stands for the tokenizer of a vocabulary of 64."""

    vocabulary = 64

    def encode(self, text: str) -> list[int]:
        return [8 + ord(letter) % 56 for letter in text]


def chunk_counts(chunk: int) -> list[tuple[int, ...]]:
    """Into how many chunks the text head cuts each rank's targets, step by step."""
    steps = (stream_batches(step, small_config()) for step in range(len(STREAM)))
    return [tuple(-(-batch.counts.text_targets // chunk) for batch in batches) for batches in steps]


def padding_alone(batch: Batch) -> Batch:
    """The batch of a rank whose share of the held-out documents has run out."""
    everywhere = batch.token_ids_BS.shape
    bound = torch.zeros(everywhere, dtype=torch.int32)
    group = batch.images[0]
    return replace(
        batch,
        token_ids_BS=torch.zeros_like(batch.token_ids_BS),
        modality_BS=torch.full(everywhere, Modality.PADDING, dtype=torch.uint8),
        text_weight_BS=torch.zeros(everywhere),
        mask=IntervalMask(bound, bound),
        images=(replace(group, image_weight_I=torch.zeros_like(group.image_weight_I)),),
        counts=BatchCounts(
            tokens=0, text_targets=0, images=0, image_elements=0, padding=batch.token_ids_BS.numel()
        ),
    )


def judged_in_training(here: Environment, changes: dict[str, Any]) -> dict[str, Any]:
    """Grid and held-out losses as the trainer takes them, beside one process with the same weights."""
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

    grid = SampleConfig(prompts=["one", "two two", "three"], steps=3, seed=4)
    # The second rank has nothing left for its second batch.
    shares = [[make_batch("mixed", 50), make_batch("text", 51)], [make_batch("image", 52)]]
    shares[1].append(padding_alone(make_batch("mixed", 53)))
    with engine.evaluation("ema") as model:
        pipeline = Pipeline(model, Letters(), config, here.device)
        mine = pipeline.sample_grid(grid, rank=here.rank, ranks=2)
        # Nothing is left for the second rank, which must take part in the forwards all the same.
        single = grid.model_copy(update={"prompts": ["one"]})
        of_one = pipeline.sample_grid(single, rank=here.rank, ranks=2)
        terms = held_out_losses(model, shares[here.rank], config, here.device)
    with plain.evaluation("ema") as model:
        wanted = Pipeline(model, Letters(), config, here.device).sample_grid(grid)
        wanted_terms = held_out_losses(model, [*shares[0], *shares[1]], config, here.device)
    everyone: list[Any] = [None, None]
    dist.all_gather_object(everyone, mine)
    pictures = sorted(everyone[0] + everyone[1], key=lambda picture: picture.seed)
    pairs = list(zip(pictures, wanted, strict=True))
    trained_on = [train(each, here.rank, range(4, 7)) for each in (engine, undisturbed)]
    return {
        "shares": [len(share) for share in everyone],
        "of one": len(of_one),
        "captions": [[a.prompt, a.seed] for a, _ in pairs] == [[b.prompt, b.seed] for _, b in pairs],
        "greatest difference": max(int((a.pixels.int() - b.pixels.int()).abs().max()) for a, b in pairs),
        "different pictures": len({picture.pixels.numpy().tobytes() for picture in pictures}),
        "held out": difference(terms, wanted_terms),
        "counts": [float(count) for count in over_ranks(terms)[1:4:2]],
        "trains on the same": trained_on[0] == trained_on[1],
    }


def built_files() -> list[str]:
    """What has been compiled for DeepSpeed; the tests give it a folder of their own."""
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


class Levels:
    """A codec of tokens: each square of 2 x 2 grey pixels is its mean in 16 levels."""

    codes = 16

    def tokens(self, values_ICHW: torch.Tensor) -> torch.Tensor:
        return (torch.nn.functional.avg_pool2d(values_ICHW.float(), 2)[:, 0] / 16).long()

    def pictures(self, token_Ihw: torch.Tensor) -> torch.Tensor:
        wide = token_Ihw.repeat_interleave(2, 1).repeat_interleave(2, 2)
        return (wide * 16 + 8).to(torch.uint8)[:, None]


def chameleon(here: Environment) -> dict[str, Any]:
    """Image tokens on ranks with many pictures and with none: the same gathers, the loss of one process."""
    codec = {"kind": "vq", "folder": "-", "latent_channels": 3, "downscale": 2, "codes": 16}
    changes = {f"codec__{name}": value for name, value in codec.items()}
    config = small_config(
        **changes,
        model__family="chameleon",
        model__patch_position="learned",
        train__zero=NOTHING_KEPT,
        train__z_loss=1e-3,
    )
    # The first three: later ones hold latents, which are no tokens.
    found = equals_local(config, here, steps=3, codec=Levels())
    engine = ZeroEngine(config, here, Levels())
    with engine.evaluation("raw") as module:
        grid = SampleConfig(prompts=["three", "two", "one"], guidance=2.0)
        pipeline = Pipeline(module, Letters(), config, engine.device, Levels())
        mine = pipeline.sample_grid(grid, rank=here.rank, ranks=here.world_size)
    return found | {"drawn": len(mine)}


def pair_in_training(here: Environment) -> dict[str, Callable[[], Any]]:
    chunked = small_config(train__head_chunk=5, train__zero=NOTHING_KEPT)
    return {
        "equals local: head in chunks": lambda: equals_local(chunked, here),
        "chunks": lambda: chunk_counts(chunked.train.head_chunk),
        "judged: defaults": lambda: judged_in_training(here, {}),
        "judged: nothing kept": lambda: judged_in_training(here, {"train__zero": NOTHING_KEPT}),
        "judged: unet": lambda: judged_in_training(here, VARIANTS["unet"]),
        "chameleon": lambda: chameleon(here),
        "built files": built_files,
    }


def whole_pair(here: Environment, folder: Path) -> dict[str, Callable[[], Any]]:
    return pair(here, folder) | pair_in_training(here)


def quad(here: Environment, folder: Path) -> dict[str, Callable[[], Any]]:
    """Four ranks over twenty-three steps, so that the stream comes round more than twice."""
    names = ("defaults", "nothing kept", "recomputed", "shared rows")
    variants = {name: VARIANTS[name] for name in names}
    # The last one: DeepSpeed makes the groups for it once a process.
    variants["second copies"] = {"train__zero": NOTHING_KEPT | {"hpz_partition_size": 2}}
    return {
        name: lambda changes=changes: equals_local(small_config(**changes), here, steps=23)  # type: ignore[misc]
        for name, changes in variants.items()
    }


MODES = {"quad": quad, "single": single, "pair": whole_pair, "compiled": compiled, "interpreted": interpreted}


def main() -> None:
    mode, folder = sys.argv[1], Path(sys.argv[2])
    here = environment.start(1, timeout=timedelta(seconds=60))
    findings: dict[str, Any] = {}
    for name, scenario in MODES[mode](here, folder).items():
        try:
            findings[name] = scenario()
        except Exception:
            findings[name] = {"raised": traceback.format_exc()}
            break
    (folder / f"{mode}_{here.rank}.json").write_text(json.dumps(findings))
    environment.stop()
    environment.leave(0)


if __name__ == "__main__":
    main()
