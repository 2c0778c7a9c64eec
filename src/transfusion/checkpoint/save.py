"""Saves checkpoints: every rank its own slices, and nothing that counts as saved before all are on disk.

Training waits only while its state is copied to host memory. A thread of each rank writes the copy and reads it
again; once all ranks have done so, which they tell each other in the collective that they make each step anyway, the
main process writes the manifest and gives the folder its name.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from transfusion.checkpoint import layout
from transfusion.checkpoint.layout import FileRecord, Manifest, ParameterRecord
from transfusion.checkpoint.stream import write_tensors
from transfusion.errors import UserError, describe
from transfusion.files import (
    UNFINISHED,
    atomic_write_text,
    remove_folder,
    remove_leftover,
    replace_folder,
    sync_folder,
)
from transfusion.parallel.collectives import raise_together
from transfusion.parallel.engine import Engine
from transfusion.parallel.parameter_shards import AVERAGE, FIRST_MOMENT, SECOND_MOMENT, WEIGHT, Shard
from transfusion.schema import TrainState

T = TypeVar("T")


def save(run_folder: str | Path, engine: Engine, state: TrainState, *, keep: int) -> Path:
    """Save step `state.step` under `run_folder`, wait for it, and keep the newest `keep`; returns its folder.

    Called by all ranks together; errors as those of `Saver`.
    """
    saver = Saver(run_folder, engine, keep=keep)
    saver.begin(state, copy=False)
    saver.finish()
    return layout.step_folder(run_folder, state.step)


@dataclass(frozen=True)
class _Pending:
    """A save under way: where to, what its manifest says, and the thread that writes this rank's file."""

    folder: Path
    unfinished: Path
    updates: int
    state: dict[str, Any]
    writing: Future[None]


class Saver:
    """Saves one run's checkpoints, one at a time. Every method but `written` is called by all ranks together.

    The run folder must be on storage that all ranks see. A checkpoint is written under another name and renamed at
    the end, so that a process killed on the way leaves the former checkpoints as they were. If any rank cannot
    write, `begin` or `finish` raises the same UserError on every rank.
    """

    def __init__(
        self, run_folder: str | Path, engine: Engine, *, keep: int, archive_interval: int = 0
    ) -> None:
        """keep: how many of the newest stay. So do those whose step is a multiple of `archive_interval`, if not 0."""
        self._run_folder, self._engine = run_folder, engine
        self._keep, self._archive_interval = keep, archive_interval
        self._copies: dict[str, Tensor] = {}
        self._pending: _Pending | None = None

    @property
    def written(self) -> bool:
        """Whether this rank has done its part of the save under way; `finish` then waits for other ranks only."""
        return self._pending is not None and self._pending.writing.done()

    def begin(self, state: TrainState, *, copy: bool) -> None:
        """Begin to save step `state.step`, after finishing what is under way.

        copy: the engine may train on meanwhile; without it, it may not before `finish`. The copy lies in host
        memory, is as large as this rank's part of the checkpoint, and is used again by the next save.
        """
        self.finish()
        engine = self._engine
        folder = layout.step_folder(self._run_folder, state.step)
        unfinished = folder.with_name(folder.name + UNFINISHED)
        _together(lambda: _prepare(unfinished) if engine.rank == 0 else None, folder)
        shards, tensors = _together(lambda: self._own_part(copy=copy), folder)
        threads = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        writing = threads.submit(_write_rank, unfinished, engine.rank, shards, tensors)
        threads.shutdown(wait=False)
        self._pending = _Pending(folder, unfinished, engine.updates, asdict(state), writing)

    def finish(self) -> None:
        """Wait for the save under way, if there is one, and publish it."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        main = self._engine.rank == 0
        try:
            _together(pending.writing.result, pending.folder)
        except UserError:
            # No rank writes any more; a full disk needs the room.
            if main:
                with contextlib.suppress(OSError):
                    remove_leftover(pending.unfinished)
            raise
        _together(lambda: self._publish(pending) if main else None, pending.folder)

    def _own_part(self, *, copy: bool) -> tuple[list[Shard], Mapping[str, Tensor]]:
        shards = [shard for shard in self._engine.shards() if shard.length]
        tensors = {
            f"{kind}/{shard.name}": tensor for shard in shards for kind, tensor in shard.values.items()
        }
        return shards, self._copied(tensors) if copy else tensors

    def _copied(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for name, tensor in tensors.items():
            copy = self._copies.get(name)
            if copy is None or copy.shape != tensor.shape:
                copy = torch.empty(tensor.shape, dtype=torch.float32, pin_memory=tensor.is_cuda)
            self._copies[name] = copy.copy_(tensor.detach(), non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        return {name: self._copies[name] for name in tensors}

    def _publish(self, pending: _Pending) -> None:
        files, parameters = _collect(pending.unfinished, self._engine.world_size)
        config = self._engine.config
        manifest = Manifest(
            format_version=layout.FORMAT_VERSION,
            world_size=self._engine.world_size,
            updates=pending.updates,
            fingerprint=layout.model_fingerprint(config),
            kinds=[WEIGHT, FIRST_MOMENT, SECOND_MOMENT, *([AVERAGE] if self._engine.averages else [])],
            parameters=dict(sorted(parameters.items())),
            frozen=sorted(
                name
                for name, parameter in self._engine.model.named_parameters()
                if not parameter.requires_grad
            ),
            files=files,
            state=pending.state,
            config=config.as_dict(),
        )
        folder = pending.folder
        atomic_write_text(pending.unfinished / layout.MANIFEST, manifest.as_json())
        sync_folder(pending.unfinished)
        replace_folder(pending.unfinished, folder)
        atomic_write_text(folder.parent / layout.LATEST, folder.name + "\n")
        sync_folder(folder.parent)
        if pending.state["bad_steps"]:
            # Saved amid skipped steps: those from before may be wanted back.
            return
        for old in layout.complete_checkpoints(self._run_folder)[: -self._keep]:
            if old != folder and not self._stays(old):
                remove_folder(old)

    def _stays(self, folder: Path) -> bool:
        step = layout.step_of(folder)
        return step is not None and self._archive_interval > 0 and step % self._archive_interval == 0


def _together(work: Callable[[], T], folder: Path) -> T:
    """`raise_together`, with errors that tell what was to be saved."""

    def part() -> T:
        try:
            return work()
        except OSError as error:
            raise UserError(
                f"cannot save {folder}: {describe(error, advise=False)}; free space or set another run.dir,"
                " with the run folder moved there"
            ) from error

    return raise_together(part)


def _prepare(unfinished: Path) -> None:
    # What earlier killed saves left behind is of no use to anyone.
    for leftover in unfinished.parent.glob(f"step_*{UNFINISHED}"):
        remove_leftover(leftover)
    unfinished.mkdir(parents=True)


def _write_rank(unfinished: Path, rank: int, shards: list[Shard], tensors: Mapping[str, Tensor]) -> None:
    name = layout.rank_file(rank)
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    record = write_tensors(unfinished / name, shapes, tensors.__getitem__)
    try:
        layout.check_file(unfinished, name, record)
    except UserError:
        raise UserError(
            f"cannot save {unfinished / name}: reading it gives other bytes than were written; check the disk, or"
            " set another run.dir"
        ) from None
    slices = [
        {"name": shard.name, "shape": list(shard.shape), "start": shard.start, "length": shard.length}
        for shard in shards
    ]
    part = {"file": asdict(record), "shards": slices}
    atomic_write_text(_part_file(unfinished, rank), json.dumps(part))


def _part_file(unfinished: Path, rank: int) -> Path:
    return unfinished / f"part_{rank:05d}.json"


def _collect(unfinished: Path, world_size: int) -> tuple[dict[str, FileRecord], dict[str, ParameterRecord]]:
    """The ranks' files and which slices of which parameters they hold, as each rank has noted it."""
    files: dict[str, FileRecord] = {}
    parameters: dict[str, ParameterRecord] = {}
    for rank in range(world_size):
        part_file = _part_file(unfinished, rank)
        part = json.loads(part_file.read_text(encoding="utf-8"))
        files[layout.rank_file(rank)] = FileRecord(**part["file"])
        for shard in part["shards"]:
            record = parameters.setdefault(
                shard["name"],
                ParameterRecord(
                    shape=shard["shape"], dtype="float32", slices=[[0, 0] for _ in range(world_size)]
                ),
            )
            record.slices[rank] = [shard["start"], shard["length"]]
        part_file.unlink()
    return files, parameters
