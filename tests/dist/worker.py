"""What one rank does in the distributed tests: `worker.py single|pair|compiled|interpreted FOLDER`.

Starting DeepSpeed takes seconds, so all scenarios run in one start and write their findings to
FOLDER/<mode>_<rank>.json; the tests beside this file judge them. A scenario that raises is recorded as a
traceback. `single` comes first: it leaves the checkpoint that `pair` loads.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from handmade import small_config
from scenarios.agreement import agreement, built_files, refused_sharing
from scenarios.chameleon import chameleon
from scenarios.checkpoints import checkpoints, failures, from_one_rank
from scenarios.common import (
    ALONE,
    CLEAN_STREAM,
    LATENTS,
    MEDIA_STREAM,
    NOTHING_KEPT,
    STREAM,
    Halves,
    Stream,
    train,
)
from scenarios.equality import VARIANTS, accumulation, chunk_counts, equals_local, nothing_is_read
from scenarios.evaluation import judged_in_training
from scenarios.llama import from_llama
from scenarios.steps import broken_step, evaluation, low_precision, release, told_norms

from transfusion.checkpoint.save import save
from transfusion.parallel import environment
from transfusion.parallel.build import build_engine
from transfusion.parallel.environment import Environment
from transfusion.parallel.local import LocalEngine
from transfusion.schema import TrainState


def pair(here: Environment, folder: Path) -> dict[str, Callable[[], Any]]:
    averaged = small_config(optimizer__ema_decay=0.5)
    tight = small_config(optimizer__ema_decay=0.5, train__zero=NOTHING_KEPT)
    low = small_config(optimizer__ema_decay=0.5, train__precision="bf16")
    second = small_config(optimizer__ema_decay=0.5, train__zero={"stage": 2})
    uneven = small_config(optimizer__ema_decay=0.5, **VARIANTS["uneven"])
    tied = small_config(
        optimizer__ema_decay=0.5,
        model__tie_embeddings=True,
        train__precision="bf16",
        train__zero=NOTHING_KEPT,
    )
    unet = small_config(optimizer__ema_decay=0.5, **VARIANTS["unet"])
    shared_low = small_config(optimizer__ema_decay=0.5, train__precision="bf16", train__sequence_parallel=2)
    latents = small_config(codec=LATENTS, **VARIANTS["shared rows"])
    scenarios: dict[str, Callable[[], Any]] = {"agreement": lambda: agreement(here)}
    for name, changes in VARIANTS.items():
        scenarios[f"equals local: {name}"] = lambda changes=changes: equals_local(
            small_config(**changes), here, stream=stream_of(changes)
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
        "tied": {"model__tie_embeddings": True, "train__zero": NOTHING_KEPT},
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
    kinds["tied, bf16"] = tied
    # A rank's slice begins and ends inside of matrices.
    muon = {"optimizer__name": "muon", "train__precision": "bf16", "train__zero": {"stage": 1}}
    kinds["muon, stage 1, bf16"] = small_config(optimizer__ema_decay=0.5, **muon)
    for name, config in kinds.items():
        scenarios[f"checkpoints: {name}"] = lambda config=config, name=name: checkpoints(
            config, here, folder / name
        )
        if name != "uneven":
            scenarios[f"broken step: {name}"] = lambda config=config: broken_step(config, here)
        if "bf16" not in name and name != "uneven":
            scenarios[f"evaluation: {name}"] = lambda config=config: evaluation(config, here)
    fp32_tied = small_config(optimizer__ema_decay=0.5, **VARIANTS["tied head, nothing kept"])
    scenarios["evaluation: tied"] = lambda: evaluation(fp32_tied, here)
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

    changes = {
        "model__hidden_size": 64,
        "train__activation_checkpointing": "block",
        "train__zero": NOTHING_KEPT,
    }
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


def pair_in_training(here: Environment) -> dict[str, Callable[[], Any]]:
    chunked = small_config(train__loss_chunk_size=5, train__zero=NOTHING_KEPT)
    return {
        "equals local: head in chunks": lambda: equals_local(chunked, here),
        "chunks": lambda: chunk_counts(chunked.train.loss_chunk_size),
        "judged: defaults": lambda: judged_in_training(here, {}),
        "judged: nothing kept": lambda: judged_in_training(here, {"train__zero": NOTHING_KEPT}),
        "judged: unet": lambda: judged_in_training(here, VARIANTS["unet"]),
        "judged: own weights": lambda: judged_in_training(here, VARIANTS["own weights"]),
        "chameleon": lambda: chameleon(here),
        "built files": built_files,
    }


def stream_of(changes: dict[str, Any]) -> Stream:
    """What the ranks see under such a configuration."""
    if "modalities" in changes:
        return MEDIA_STREAM
    return CLEAN_STREAM if changes.get("diffusion__context") == "clean" else STREAM


def whole_pair(here: Environment, folder: Path) -> dict[str, Callable[[], Any]]:
    return pair(here, folder) | pair_in_training(here)


def quad(here: Environment, folder: Path) -> dict[str, Callable[[], Any]]:
    """Four ranks over twenty-three steps, so that the stream comes round more than twice."""
    names = (
        "defaults",
        "nothing kept",
        "recomputed",
        "shared rows",
        "own weights",
        "clean image",
        "clean context, own weights, shared rows",
        "three modalities, own weights",
    )
    variants = {name: VARIANTS[name] for name in names}
    # The last one: DeepSpeed makes the groups for it once a process.
    variants["second copies"] = {"train__zero": NOTHING_KEPT | {"hpz_partition_size": 2}}
    return {
        name: lambda changes=changes: equals_local(  # type: ignore[misc]
            small_config(**changes), here, steps=23, stream=stream_of(changes)
        )
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
