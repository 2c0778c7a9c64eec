"""From a checkpoint to a model folder that needs no trainer: weights, configuration, tokenizer.

config.json               this format's version, the step, the run's configuration, an id of all that the folder holds,
                          the names of the weight files and the digests of the other files
model.safetensors         the weights, fp32, with the same id in the metadata
model.ema.safetensors     their moving average, where the run kept one
tokenizer.model           or tokenizer.json where it is a published one, whose ids are moved behind control tokens
codec/                    the autoencoder, where the run has one: a folder of diffusers

The rest is for people and other programs, and is not read again: README.md (`model_card`), else tokenizer.json,
tokenizer_config.json and generation_config.json (`hub_files`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from transfusion.checkpoint import layout
from transfusion.checkpoint.hub_files import GENERATION, image_generation, write_json, write_tokenizer
from transfusion.checkpoint.model_card import model_card
from transfusion.checkpoint.resume import SliceReader
from transfusion.checkpoint.stream import write_tensors
from transfusion.config import Config
from transfusion.config.checking import check_as
from transfusion.config.codec_folder import folder_files
from transfusion.errors import UserError, describe
from transfusion.files import (
    DIGEST_BYTES,
    UNFINISHED,
    atomic_copy,
    atomic_write_text,
    file_digest,
    file_state,
    fingerprint,
    known_digest,
    remove_leftover,
    replace_folder,
    sync_folder,
)
from transfusion.parallel.parameter_shards import AVERAGE, WEIGHT
from transfusion.sequence.tokenizer import JSON, MODEL, tokenizer_in

FORMAT = "transfusion model"
FORMAT_VERSION = 3
CONFIG = "config.json"
TOKENIZER = MODEL
CODEC = "codec"
CARD = "README.md"
EXPORT_ID = "export_id"
EXPORT_AGAIN = "export the model again: transfusion export RUN --out DIR"
WEIGHT_FILES = {WEIGHT: "model.safetensors", AVERAGE: "model.ema.safetensors"}


class ModelFolder(NamedTuple):
    """What an exported folder holds. average: None where the run kept no moving average."""

    export_id: str
    config: Config
    step: int
    weights: Path
    average: Path | None
    tokenizer: Path

    @property
    def preferred(self) -> Path:
        """The averaged weights where there are any, else the raw ones."""
        return self.average or self.weights


class SavedModel(NamedTuple):
    """A checkpoint whose files were checked. run: the folder of its run; None where it stands outside of one."""

    reader: SliceReader
    config: Config
    tokenizer: Path
    run: Path | None


def export(source: str | Path, out: str | Path) -> Path:
    """Write the model folder `out` from a run's newest checkpoint, or from one checkpoint folder.

    Streams one tensor at a time, without an engine. A former export at `out` is replaced once the new one is
    complete. Raises UserError for a missing or damaged checkpoint, a missing tokenizer, and where `out` holds
    anything else.
    """
    saved = open_saved(source)
    codec = _codec(saved)
    return write_export(out, FORMAT, lambda folder: _write(folder, saved, codec))


def open_saved(source: str | Path) -> SavedModel:
    """Open a checkpoint to export it.

    Args:
        source: The folder of a run, whose newest checkpoint is taken, or of one checkpoint.

    Returns:
        The checkpoint and what belongs to it.

    Raises:
        UserError: For a missing or damaged checkpoint, or a missing tokenizer.
    """
    folder = _checkpoint(Path(source))
    manifest = layout.read_manifest(folder)
    for name, record in manifest.files.items():
        layout.check_file(folder, name, record)
    parent = folder.parent.parent
    run = parent if folder.parent == layout.checkpoints_folder(parent) else None
    config = check_as(Config, manifest.config, where=str(folder / layout.MANIFEST))
    return SavedModel(SliceReader(folder, manifest), config, _tokenizer(folder, run, config), run)


def write_export(out: str | Path, kind: str, write: Callable[[Path], None]) -> Path:
    """Have `write` fill the folder `out`, which replaces a former one once it is complete.

    Args:
        out: The folder.
        kind: What its config.json states as `format`.
        write: Fills an empty folder.

    Returns:
        The folder.

    Raises:
        UserError: Where `out` holds anything but an export of this kind, or cannot be written.
    """
    out = Path(out)
    _refuse_foreign(out, kind)
    # A name that nobody else gives: whatever stands there is what a killed export left.
    unfinished = out.with_name(f"{out.name}.export{UNFINISHED}")
    try:
        remove_leftover(unfinished)
        unfinished.mkdir(parents=True)
        write(unfinished)
        sync_folder(unfinished)
        replace_folder(unfinished, out)
    except OSError as error:
        raise UserError(
            f"cannot write {out}: {describe(error, advise=False)}; name another folder"
        ) from error
    return out


def read_export(folder: str | Path) -> ModelFolder:
    """What a model folder holds. Of the weights the headers alone are read.

    Raises UserError that names the first file that is missing, unreadable or of another export.
    """
    folder = Path(folder)
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        version = values["format_version"]
        if values["format"] != FORMAT:
            raise ValueError
        if version != FORMAT_VERSION:
            raise UserError(
                f"{folder} has model format {version}, this version reads {FORMAT_VERSION}; {EXPORT_AGAIN}"
            )
        step, plain, export_id = values["step"], values["config"], values[EXPORT_ID]
        names, digests = dict(values["weights"]), dict(values["digests"])
        weights = folder / names[WEIGHT]
        average = folder / names[AVERAGE] if AVERAGE in names else None
    except OSError as error:
        raise UserError(
            f"{folder} is not a model folder: {CONFIG}: {error.strerror}; {EXPORT_AGAIN}"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{folder} is not a model folder: {CONFIG} is not an export's; {EXPORT_AGAIN}"
        ) from None
    config = check_as(Config, plain, where=str(folder / CONFIG))
    # tokenizer.json may be a copy for other programs, which is no file of the model's own.
    tokenizer = folder / (JSON if JSON in digests and MODEL not in digests else MODEL)
    for name in [*names.values(), tokenizer.name, *digests]:
        path = folder / name
        if not path.is_file():
            raise UserError(f"{folder}: {name} is missing; {EXPORT_AGAIN}")
        try:
            if name in names.values():
                fits = _export_id(path) == export_id
            else:
                fits = known_digest(path, file_state(path)) == digests.get(name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder}: {name} cannot be read ({error}); {EXPORT_AGAIN}") from None
        if not fits:
            raise UserError(
                f"{folder}: {name} is of another export than {CONFIG}, or damaged; {EXPORT_AGAIN}"
            )
    if config.codec.is_autoencoder:
        beside = config.codec.model_copy(update={"folder": str(folder / CODEC)})
        config = config.model_copy(update={"codec": beside})
    return ModelFolder(export_id, config, step, weights, average, tokenizer)


def _export_id(weights: Path) -> str | None:
    with safe_open(str(weights), framework="pt") as opened:
        return (opened.metadata() or {}).get(EXPORT_ID)


def _checkpoint(source: Path) -> Path:
    if (source / layout.MANIFEST).is_file():
        return source
    latest = layout.find_latest(source)
    if latest is None:
        raise UserError(f"{source} has no finished checkpoint; train first, or name a run such as runs/NAME")
    return latest


def _tokenizer(folder: Path, run: Path | None, config: Config) -> Path:
    """The run's own copy; of a checkpoint outside of a run the file that its configuration names.

    That file may have changed since, so a run never falls back to it.
    """
    path = tokenizer_in(run) if run else Path(config.data.tokenizer or tokenizer_in(folder))
    if not path.is_file():
        raise UserError(
            f"cannot export {folder}: no tokenizer at {path}; put the file that it was trained with there"
        )
    return path


def _codec(saved: SavedModel) -> Path | None:
    """The run's own copy of the autoencoder; of a checkpoint outside of a run the folder that it names."""
    codec = saved.config.codec
    if not codec.is_autoencoder:
        return None
    path = saved.run / CODEC if saved.run else Path(codec.folder)
    folder_files(path)
    return path


def _refuse_foreign(out: Path, kind: str) -> None:
    if not out.exists():
        return
    if out.is_dir() and not any(out.iterdir()):
        return
    try:
        if json.loads((out / CONFIG).read_text(encoding="utf-8"))["format"] == kind:
            return
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{out} exists and is not an exported model; name another folder, or remove it")


def _write(folder: Path, saved: SavedModel, codec: Path | None) -> None:
    reader, manifest = saved.reader, saved.reader.manifest
    copied = [write_tokenizer(folder, saved.tokenizer, saved.config.data.sequence_length)]
    if codec is not None:
        (folder / CODEC).mkdir()
        for source in folder_files(codec):
            copied.append(f"{CODEC}/{source.name}")
            atomic_copy(source, folder / copied[-1])
        sync_folder(folder / CODEC)
    content = {
        "step": manifest.state["step"],
        "weights": {kind: name for kind, name in WEIGHT_FILES.items() if kind in manifest.kinds},
        "digests": {name: file_digest(folder / name) for name in copied},
        "config": manifest.config,
    }
    # What the weights are made of stands for them: they are not read twice.
    sources = [record.blake2b for record in manifest.files.values()]
    export_id = fingerprint([content, sources], DIGEST_BYTES)
    marks = {"format": FORMAT, "format_version": FORMAT_VERSION, EXPORT_ID: export_id}
    atomic_write_text(folder / CONFIG, json.dumps(marks | content, indent=1) + "\n")
    shapes = {name: record.shape for name, record in manifest.parameters.items()}
    metadata = {"format": "pt", EXPORT_ID: export_id}
    for kind, file in content["weights"].items():
        write_tensors(folder / file, shapes, partial(reader.read_whole, kind), metadata=metadata)
    write_json(folder / GENERATION, image_generation(saved.config))
    atomic_write_text(folder / CARD, model_card(saved.config, manifest, saved.run))
