"""Single steps of ZeRO: what is gathered, skipped, told and averaged."""

from __future__ import annotations

from typing import Any

import torch
from handmade import (
    counts_of,
    make_batch,
    same_state,
    small_config,
    state_of,
    train_step,
    with_broken_image,
)

from scenarios.common import (
    ALONE,
    NOTHING_KEPT,
    difference,
    losses,
    over_ranks,
    stream_batches,
    train,
    whole_weights,
)
from transfusion.config import Config
from transfusion.parallel.collectives import global_counts
from transfusion.parallel.environment import Environment
from transfusion.parallel.local import LocalEngine
from transfusion.parallel.zero import ZeroEngine


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
    counts = global_counts([batch], engine.loss)
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
                float(terms.sums["text"]),
                float(terms.sums["image"]),
            )
            found[f"{weights} error"] = max(
                abs(float(terms.sums["text"] / wanted.sums["text"]) - 1),
                abs(float(terms.sums["image"] / wanted.sums["image"]) - 1),
            )
            noisy = [torch.zeros(batch.media[0].values.shape)]
            for _ in range(3):
                encoding = model.encode_patches(noisy, batch.media[0].timestep_I)
                hidden = model.embed(batch, encoding.patch_ND)
                hidden = model.norm(model.run_blocks(hidden, batch.position_BSA, batch.mask))
                slots = batch.media[0].patch_slot_IP.flatten()
                model.decode_patches(hidden.flatten(0, 1)[slots], encoding)
                model.lm_head(hidden.flatten(0, 1))
        found[f"{weights} state untouched"] = same_state(before, state_of(engine))
    found["trains on the same"] = train(engine, here.rank, range(3, 6)) == train(
        undisturbed, here.rank, range(3, 6)
    )
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
    refused = zero.step(1e-3, max_norm=wanted.gradient_norm / 100, module_norms=True).read()
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
