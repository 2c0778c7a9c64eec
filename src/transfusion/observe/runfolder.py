"""The folder of a run: where everything stands, what it ran on, and its log."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from transfusion.checkpoint import layout
from transfusion.config import CodecConfig, Section
from transfusion.config.codec_folder import folder_files
from transfusion.config.yaml_files import dump
from transfusion.data.shards.sample import Fault
from transfusion.errors import UserError
from transfusion.files import (
    atomic_copy,
    atomic_file,
    atomic_write_text,
    file_digest,
    lock,
    remove_unfinished,
)
from transfusion.observe.environment import describe_environment
from transfusion.sequence.tokenizer import JSON, MODEL, file_name, tokenizer_in


class RunFolder:
    """runs/<name>/ and the names of what it holds. Making one of these touches nothing on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.environment = path / "env.json"
        self.metrics = path / "metrics.jsonl"
        self.log = path / "log.txt"
        self.quarantine = path / "quarantine.jsonl"
        self.codec = path / "codec"
        self.samples = path / "samples"
        self.checkpoints = path / "checkpoints"
        self.stalls = path / "stalls"
        self.memory = path / "memory"
        self.wandb_id = path / "wandb_id"
        self.report = path / "report.html"

    @property
    def tokenizer(self) -> Path:
        """The run's own copy of its tokenizer."""
        return tokenizer_in(self.path)

    def grid(self, step: int) -> Path:
        """Where the sample grid of a step stands."""
        return self.samples / f"step_{step:07d}.png"

    def trace(self, step: int, rank: int) -> Path:
        """Where the profiler's trace of a step stands."""
        return self.path / "profiles" / f"step_{step:07d}_rank_{rank:05d}.json.gz"

    def lock_existing(self) -> TextIO | None:
        """`lock` where a former start has made the folder; None, and nothing made, where there is none yet."""
        return self.lock() if (self.path / "lock").exists() else None

    def lock(self) -> TextIO:
        """Take the folder for this process, until the returned file is closed or the process ends.

        Two runs that write one folder would spoil both. Raises UserError while another process has it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = open(self.path / "lock", "a", encoding="utf-8")  # noqa: SIM115 - held as long as the run
        except OSError as error:
            raise self._unwritable(error) from None
        if not lock(file, wait=False):
            file.close()
            raise UserError(
                f"another process trains in {self.path}; wait for it, end it, or choose another run.dir"
            )
        return file

    def create(self, config: Section, *, arguments: Sequence[str] = ()) -> None:
        """Make the folders and write the resolved config and what this start runs on (main process only).

        Raises UserError if the folder cannot be written.
        """
        try:
            for folder in (self.path, self.samples, self.checkpoints):
                folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(self.config) as partial:
                dump(config, partial)
            text = json.dumps(describe_environment(arguments), indent=2, ensure_ascii=False)
            atomic_write_text(self.environment, text + "\n")
        except OSError as error:
            raise self._unwritable(error) from None

    def refuse_other_tokenizer(self, path: Path) -> None:
        """Raise UserError where the run has checkpoints that were trained with another tokenizer than `path`."""
        if (
            layout.find_latest(self.path)
            and self.tokenizer.is_file()
            and not _same_bytes(self.tokenizer, path)
        ):
            raise UserError(
                f"data.tokenizer {path} is not the tokenizer that {self.path} was trained with; "
                f"set data.tokenizer={self.tokenizer}, or run.dir to a new folder"
            )

    def keep_tokenizer(self, path: Path) -> None:
        """Copy the tokenizer, so that the run stays usable whatever becomes of the file."""
        try:
            kept = self.path / file_name(path)
            if not kept.is_file() or not _same_bytes(kept, path):
                atomic_copy(path, kept)
            # Of a former start, which never came to a checkpoint.
            for other in {MODEL, JSON} - {kept.name}:
                (self.path / other).unlink(missing_ok=True)
        except OSError as error:
            raise self._unwritable(error) from None

    def keep_codec(self, codec: CodecConfig) -> None:
        """Copy the autoencoder, so that the run stays usable whatever becomes of its folder."""
        if not codec.is_autoencoder or Path(codec.folder).resolve() == self.codec.resolve():
            return
        try:
            self.codec.mkdir(exist_ok=True)
            files = folder_files(codec.folder)
            remove_unfinished(self.codec, {file.name for file in files})
            for file in files:
                kept = self.codec / file.name
                if not kept.is_file() or file_digest(kept) != file_digest(file):
                    atomic_copy(file, kept)
        except OSError as error:
            raise self._unwritable(error) from None

    def add_to_quarantine(self, faults: Iterable[Fault]) -> None:
        """Add samples that were left out to those of former starts; each stands there once."""
        former = self.quarantine.read_text(encoding="utf-8").splitlines() if self.quarantine.exists() else []
        # ASCII: a name of a shard may hold bytes that are no UTF-8.
        found = [json.dumps(asdict(fault)) for fault in faults]
        lines = dict.fromkeys([*former, *found])
        if len(lines) > len(former):
            atomic_write_text(self.quarantine, "".join(f"{line}\n" for line in lines))

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"cannot write the run folder {self.path}: {error.strerror}; choose another with run.dir=DIR"
        )


def _same_bytes(one: Path, other: Path) -> bool:
    return one.read_bytes() == other.read_bytes()
