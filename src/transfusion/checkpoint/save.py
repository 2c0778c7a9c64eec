"""Saves a checkpoint: every rank its own slices, and nothing that counts as saved before all are on disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transfusion.checkpoint import layout
from transfusion.checkpoint.layout import FileRecord, Manifest, ParameterRecord
from transfusion.checkpoint.stream import write_tensors
from transfusion.errors import UserError
from transfusion.parallel.agree import agree
from transfusion.parallel.engine import Engine
from transfusion.parallel.shards import AVERAGE, FIRST_MOMENT, SECOND_MOMENT, WEIGHT, Shard
from transfusion.schema import Decision, TrainState


def save(run_folder: str | Path, engine: Engine, state: TrainState, *, keep: int) -> Path:
    """Save step `state.step` under `run_folder` and keep the newest `keep` checkpoints; returns its folder.

    Called by all ranks together; the folder must be on storage that all of them see. It is written under
    another name and renamed at the end, so that a process killed on the way leaves the former checkpoints as
    they were. Raises UserError on every rank if any of them cannot write.
    """
    folder = layout.step_folder(run_folder, state.step)
    unfinished = folder.with_name(folder.name + layout.UNFINISHED)
    if engine.rank == 0:
        _together(lambda: _prepare(unfinished), folder)
    else:
        _together(lambda: None, folder)
    _together(lambda: _write_rank(unfinished, engine), folder)
    if engine.rank == 0:
        _together(lambda: _finish(unfinished, folder, engine, state, keep), folder)
    else:
        _together(lambda: None, folder)
    return folder


def _together(work: Callable[[], None], folder: Path) -> None:
    """Do this rank's part, wait for the others, and fail on all ranks if one failed."""
    problem: OSError | None = None
    try:
        work()
    except OSError as error:
        problem = error
    failed = agree(Decision.CONTINUE, int(problem is not None)).counts[0]
    if problem is not None:
        where = f" ({problem.filename})" if problem.filename else ""
        reason = f"{problem.strerror or problem}{where}"
        raise UserError(f"cannot save {folder}: {reason}; free space or set another run.dir") from problem
    if failed:
        raise UserError(f"cannot save {folder}: {failed} other processes failed; see their messages")


def _prepare(unfinished: Path) -> None:
    # What earlier killed saves left behind is of no use to anyone.
    for leftover in unfinished.parent.glob(f"step_*{layout.UNFINISHED}"):
        shutil.rmtree(leftover)
    unfinished.mkdir(parents=True)


def _write_rank(unfinished: Path, engine: Engine) -> None:
    shards = [shard for shard in engine.shards() if shard.length]
    tensors = {f"{kind}/{shard.name}": tensor for shard in shards for kind, tensor in shard.values.items()}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    record = write_tensors(unfinished / layout.rank_file(engine.rank), shapes, tensors.__getitem__)
    part = {"file": asdict(record), "shards": [_slice_record(shard) for shard in shards]}
    layout.write_whole(_part_file(unfinished, engine.rank), json.dumps(part))


def _slice_record(shard: Shard) -> dict[str, Any]:
    return {"name": shard.name, "shape": list(shard.shape), "start": shard.start, "length": shard.length}


def _part_file(unfinished: Path, rank: int) -> Path:
    return unfinished / f"part_{rank:05d}.json"


def _finish(unfinished: Path, folder: Path, engine: Engine, state: TrainState, keep: int) -> None:
    files: dict[str, FileRecord] = {}
    parameters: dict[str, ParameterRecord] = {}
    for rank in range(engine.world_size):
        part_file = _part_file(unfinished, rank)
        part = json.loads(part_file.read_text(encoding="utf-8"))
        files[layout.rank_file(rank)] = FileRecord(**part["file"])
        for shard in part["shards"]:
            record = parameters.setdefault(
                shard["name"],
                ParameterRecord(
                    shape=shard["shape"], dtype="float32", slices=[[0, 0] for _ in range(engine.world_size)]
                ),
            )
            record.slices[rank] = [shard["start"], shard["length"]]
        part_file.unlink()
    manifest = Manifest(
        format_version=layout.FORMAT_VERSION,
        world_size=engine.world_size,
        updates=engine.updates,
        fingerprint=layout.model_fingerprint(engine.config),
        kinds=[WEIGHT, FIRST_MOMENT, SECOND_MOMENT, *([AVERAGE] if engine.averages else [])],
        parameters=dict(sorted(parameters.items())),
        files=files,
        state=asdict(state),
        config=engine.config.as_dict(),
    )
    layout.write_whole(unfinished / layout.MANIFEST, manifest.as_json())
    layout.sync_folder(unfinished)
    _replace(unfinished, folder)
    layout.write_whole(folder.parent / layout.LATEST, folder.name + "\n")
    layout.sync_folder(folder.parent)
    for old in layout.complete_checkpoints(folder.parent.parent)[:-keep]:
        if old != folder:
            shutil.rmtree(old)


def _replace(unfinished: Path, folder: Path) -> None:
    """Give the finished folder its name, in place of a former save of the same step if there is one."""
    former = folder.with_name(f"{folder.name}.former{layout.UNFINISHED}")
    if folder.exists():
        folder.rename(former)
    unfinished.rename(folder)
    if former.exists():
        shutil.rmtree(former)
