"""Saves a checkpoint: every rank its own slices, and nothing that counts as saved before all are on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transfusion.checkpoint import layout
from transfusion.checkpoint.layout import FileRecord, Manifest, ParameterRecord
from transfusion.checkpoint.stream import write_tensors
from transfusion.errors import UserError
from transfusion.parallel.agree import describe, together
from transfusion.parallel.engine import Engine
from transfusion.parallel.shards import AVERAGE, FIRST_MOMENT, SECOND_MOMENT, WEIGHT, Shard
from transfusion.schema import TrainState


def save(run_folder: str | Path, engine: Engine, state: TrainState, *, keep: int) -> Path:
    """Save step `state.step` under `run_folder` and keep the newest `keep` checkpoints; returns its folder.

    Called by all ranks together; the folder must be on storage that all of them see. It is written under
    another name and renamed at the end, so that a process killed on the way leaves the former checkpoints as
    they were. If any rank cannot write, every rank raises the same UserError.
    """
    folder = layout.step_folder(run_folder, state.step)
    unfinished = folder.with_name(folder.name + layout.UNFINISHED)
    main = engine.rank == 0
    _together(lambda: _prepare(unfinished) if main else None, folder)
    _together(lambda: _write_rank(unfinished, engine), folder)
    _together(lambda: _finish(unfinished, folder, engine, state, keep) if main else None, folder)
    return folder


def _together(work: Callable[[], None], folder: Path) -> None:
    """`together`, with errors that tell what was to be saved."""

    def part() -> None:
        try:
            work()
        except OSError as error:
            raise UserError(
                f"cannot save {folder}: {describe(error)}; free space or set another run.dir"
            ) from error

    together(part)


def _prepare(unfinished: Path) -> None:
    # What earlier killed saves left behind is of no use to anyone.
    for leftover in unfinished.parent.glob(f"step_*{layout.UNFINISHED}"):
        layout.clear(leftover)
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
    layout.replace_folder(unfinished, folder)
    layout.write_whole(folder.parent / layout.LATEST, folder.name + "\n")
    layout.sync_folder(folder.parent)
    for old in layout.complete_checkpoints(folder.parent.parent)[:-keep]:
        if old != folder:
            layout.remove_folder(old)
