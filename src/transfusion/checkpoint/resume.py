"""Loads a checkpoint into an engine, at whatever number of ranks and with whatever engine it was saved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from transfusion.checkpoint import layout
from transfusion.checkpoint.layout import Manifest
from transfusion.errors import UserError
from transfusion.parallel.collectives import broadcast_from_main, raise_together
from transfusion.parallel.engine import Engine
from transfusion.parallel.parameter_shards import AVERAGE, WEIGHT, Shard
from transfusion.schema import TrainState


class SliceReader:
    """Any slice of any parameter of a checkpoint, put together from the ranks' files without loading them."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._open: dict[int, Any] = {}

    def read(self, kind: str, name: str, start: int, length: int) -> Tensor:
        """Elements [start, start + length) of the flattened parameter, fp32 on the CPU.

        A frozen parameter is its own average, and its moments are those that AdamW begins with.
        """
        if name in self.manifest.frozen and kind != WEIGHT:
            if kind != AVERAGE:
                return torch.zeros(length)
            kind = WEIGHT
        parts = []
        position = start
        slices = self.manifest.parameters[name].slices
        pieces = sorted((begin, size, rank) for rank, (begin, size) in enumerate(slices) if size)
        for begin, size, rank in pieces:
            end = min(begin + size, start + length)
            if begin <= position < end:
                parts.append(self._slice(rank, f"{kind}/{name}", position - begin, end - begin))
                position = end
        if position != start + length:
            raise layout.damaged(
                self.folder, f"elements of {name} from {position} on are missing in all files"
            )
        return torch.cat(parts) if parts else torch.empty(0)

    def read_whole(self, kind: str, name: str) -> Tensor:
        """A whole parameter in its shape."""
        shape = self.manifest.parameters[name].shape
        return self.read(kind, name, 0, math.prod(shape)).view(shape)

    def _slice(self, rank: int, key: str, start: int, end: int) -> Tensor:
        name = layout.rank_file(rank)
        try:
            if rank not in self._open:
                self._open[rank] = safe_open(str(self.folder / name), framework="pt")
            return self._open[rank].get_slice(key)[start:end]
        except (OSError, SafetensorError) as error:
            raise layout.damaged(self.folder, f"{name} cannot be read ({error})") from None


def resume(run_folder: str | Path, engine: Engine) -> TrainState | None:
    """Load the newest complete checkpoint of a run, if there is one, and return where the run stood.

    Called by all ranks together. A checkpoint that was being written when its run was killed is passed over.
    Raises UserError as `load` does.
    """
    # One rank looks for all: on shared storage another may still be shown a former list of files.
    folder = broadcast_from_main(lambda: layout.find_latest(run_folder))
    return None if folder is None else load(folder, engine)


def newest_good(run_folder: str | Path) -> Path:
    """The newest complete checkpoint that was not saved amid skipped steps. Raises UserError where there is none."""
    for folder in reversed(layout.complete_checkpoints(run_folder)):
        if not layout.read_manifest(folder).state.get("bad_steps", 0):
            return folder
    raise UserError(
        "too many steps in a row were skipped (train.rollback_after_skipped), and no checkpoint from before them is"
        " left; lower optimizer.learning_rate, look at the newest data, or save more often (checkpoint.every)"
    )


def load(folder: str | Path, engine: Engine) -> TrainState:
    """Load one checkpoint folder into an engine; called by all ranks together.

    At the same number of ranks weights, optimiser state and moving average come back bit for bit; at another
    they are cut anew, equally exact. A run that turns the moving average on starts it at the weights. Raises
    UserError, on every rank, for a damaged checkpoint and for one of another model.
    """
    folder = Path(folder)
    manifest = raise_together(lambda: _checked(folder, engine))
    reader = SliceReader(folder, manifest)
    raise_together(lambda: _fill(engine.shards(), reader))
    engine.shards_written(manifest.updates)
    return TrainState(**manifest.state)


def _checked(folder: Path, engine: Engine) -> Manifest:
    manifest = layout.read_manifest(folder)
    # Every file is checked by one of the ranks.
    for name, record in list(manifest.files.items())[engine.rank :: engine.world_size]:
        layout.check_file(folder, name, record)
    _check_model(folder, manifest, engine)
    return manifest


def _fill(shards: Sequence[Shard], reader: SliceReader) -> None:
    for shard in shards:
        for kind, tensor in shard.values.items():
            # A run may have turned its moving average on since.
            source = WEIGHT if kind == AVERAGE and AVERAGE not in reader.manifest.kinds else kind
            tensor.copy_(reader.read(source, shard.name, shard.start, shard.length))


def _check_model(folder: Path, manifest: Manifest, engine: Engine) -> None:
    """Raise UserError that names the first difference between the checkpoint's model and the engine's."""
    remedy = "restore the settings of the model, or set run.dir to a new folder"
    saved, wanted = layout.model_settings(manifest.config), layout.model_settings(engine.config.as_dict())
    for section, values in wanted.items():
        for key, value in values.items():
            if saved[section].get(key) != value:
                change = f"{section}.{key} was {saved[section].get(key)!r} and is now {value!r}"
                raise UserError(f"{folder} is of another model: {change}; {remedy}")
    if saved != wanted:
        raise UserError(f"{folder} is of another model; {remedy}")
    optimizer = manifest.config.get("optimizer", {}).get("name", "adamw")
    if optimizer != engine.config.optimizer.name:
        raise UserError(
            f"{folder} has the state of optimizer.name={optimizer}, which means nothing to"
            f" {engine.config.optimizer.name}; restore it, or set run.dir to a new folder"
        )
    for shard in sorted(engine.shards(), key=lambda shard: shard.name):
        record = manifest.parameters.get(shard.name)
        if record is None:
            raise UserError(f"{folder} is of another model: it has no {shard.name}; {remedy}")
        if tuple(record.shape) != shard.shape:
            raise UserError(
                f"{folder} is of another model: {shard.name} has shape {tuple(record.shape)} there and "
                f"{shard.shape} here; {remedy}"
            )
