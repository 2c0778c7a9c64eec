"""Where checkpoints lie, what their manifest says, and which of them is the newest complete one.

    <run>/checkpoints/step_00000120/manifest.json        written last
                                    rank_00000.safetensors, rank_00001.safetensors, ...
    <run>/checkpoints/latest                             name of the newest, for people and scripts

A rank's file holds, for each parameter that it has a slice of, the tensors `weight/NAME`, `exp_avg/NAME`,
`exp_avg_sq/NAME` and, with a moving average, `ema/NAME`: flat fp32 slices. No pickles.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transfusion.config import Config, ModelConfig
from transfusion.errors import UserError
from transfusion.files import DIGEST_BYTES, file_digest, fingerprint

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
LATEST = "latest"
_STEP_FOLDER = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """One rank's file: its size in bytes and its blake2b digest."""

    bytes: int
    blake2b: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterRecord:
    """One parameter. slices: for each rank [start, length] of its part, in elements; length 0 for none."""

    shape: list[int]
    dtype: str
    slices: list[list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """All about a checkpoint but its tensors.

    kinds: which tensors each parameter has. frozen: parameters with a weight alone, which were not trained. updates:
    optimiser steps made. state: the `TrainState`. config: the run's configuration, plain values.
    """

    format_version: int
    world_size: int
    updates: int
    fingerprint: str
    kinds: list[str]
    parameters: dict[str, ParameterRecord]
    files: dict[str, FileRecord]
    state: dict[str, Any]
    config: dict[str, Any]
    frozen: list[str] = field(default_factory=list)

    def as_json(self) -> str:
        """The text of manifest.json, with a digest of all the rest."""
        values = asdict(self)
        return json.dumps({**values, "digest": fingerprint(values, DIGEST_BYTES)}, indent=1) + "\n"


def checkpoints_folder(run_folder: str | Path) -> Path:
    return Path(run_folder) / "checkpoints"


def step_folder(run_folder: str | Path, step: int) -> Path:
    return checkpoints_folder(run_folder) / f"step_{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step in a finished checkpoint's folder name, None for any other name."""
    match = _STEP_FOLDER.fullmatch(folder.name)
    return int(match[1]) if match else None


def rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def complete_checkpoints(run_folder: str | Path) -> list[Path]:
    """Folders that were saved to the end, oldest first. What a killed save left is not among them."""
    folder = checkpoints_folder(run_folder)
    if not folder.is_dir():
        return []
    steps = {entry: step for entry in folder.iterdir() if (step := step_of(entry)) is not None}
    return sorted((entry for entry in steps if (entry / MANIFEST).is_file()), key=steps.__getitem__)


def find_latest(run_folder: str | Path) -> Path | None:
    """The newest complete checkpoint of a run, None if there is none."""
    found = complete_checkpoints(run_folder)
    return found[-1] if found else None


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint; UserError if it is missing, edited, or of another format."""
    path = folder / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        stated = values.pop("digest")
        version = values["format_version"]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; name a folder such as runs/NAME") from None
    except (ValueError, KeyError, AttributeError, TypeError):
        raise damaged(folder, f"{MANIFEST} is not a checkpoint's manifest") from None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{folder} has checkpoint format {version}, this version reads {FORMAT_VERSION}; "
            "use the version that wrote it, or start a new run"
        )
    if stated != fingerprint(values, DIGEST_BYTES):
        raise damaged(folder, f"{MANIFEST} was changed after it was written")
    values["parameters"] = {name: ParameterRecord(**record) for name, record in values["parameters"].items()}
    values["files"] = {name: FileRecord(**record) for name, record in values["files"].items()}
    return Manifest(**values)


def check_file(folder: Path, name: str, record: FileRecord) -> None:
    """Raise UserError unless a rank's file is there, whole and unchanged."""
    path = folder / name
    try:
        size = path.stat().st_size
    except OSError:
        raise damaged(folder, f"{name} is missing") from None
    if size != record.bytes:
        raise damaged(folder, f"{name} has {size} bytes instead of {record.bytes}")
    if file_digest(path) != record.blake2b:
        raise damaged(folder, f"the contents of {name} were changed")


def model_fingerprint(config: Config) -> str:
    """Changes with every setting that makes the same weights mean another network."""
    return fingerprint(model_settings(config.as_dict()))


def model_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a configuration that must agree between a checkpoint and the run that loads it."""
    # Not where the autoencoder lies, whose fingerprint tells which it is, nor how images are cut. What is empty says
    # nothing.
    return {
        # A checkpoint from before a setting was there says nothing of it: it is as the default.
        "model": ModelConfig().as_dict() | config["model"],
        "codec": {
            name: value
            for name, value in config["codec"].items()
            if value and name not in ("folder", "resize")
        },
        # The same weights that answer with the noise are wrong about a velocity.
        "diffusion": {"prediction": config["diffusion"]["prediction"]},
    }


def damaged(folder: Path, problem: str) -> UserError:
    """The error for a checkpoint that cannot be trusted."""
    return UserError(
        f"{folder} is damaged: {problem}; delete the folder to continue from the one before it, or"
        " without one from the start"
    )
