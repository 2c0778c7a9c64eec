"""Saves and loads between ranks and engines, and failures of one rank alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from handmade import (
    counts_of,
    same_state,
    state_of,
    train_step,
)

from scenarios.common import (
    ALONE,
    difference,
    stream_batches,
    train,
    whole_weights,
)
from transfusion.checkpoint import layout
from transfusion.checkpoint import save as saving
from transfusion.checkpoint.layout import step_folder
from transfusion.checkpoint.resume import SliceReader, load, resume
from transfusion.checkpoint.save import save
from transfusion.config import Config
from transfusion.errors import UserError
from transfusion.parallel.environment import Environment
from transfusion.parallel.local import LocalEngine
from transfusion.parallel.zero import ZeroEngine
from transfusion.schema import TrainState


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
    read = SliceReader.read

    def unreadable(*_: Any) -> Any:
        raise OSError(5, "Input/output error", "rank_00000.safetensors")

    if here.rank == 1:
        SliceReader.read = unreadable  # type: ignore[method-assign]
    try:
        load(target, engine)
    except UserError as error:
        found["fill"] = str(error)
    SliceReader.read = read  # type: ignore[method-assign]
    if here.rank == 0:
        path = target / "rank_00001.safetensors"
        path.write_bytes(path.read_bytes()[:-4])
    dist.barrier()
    try:
        load(target, engine)
    except UserError as error:
        found["load"] = str(error)
    return found
