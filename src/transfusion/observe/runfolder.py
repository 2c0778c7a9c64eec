"""The folder of a run: where everything stands, what it ran on, and its log."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from transfusion.checkpoint import layout
from transfusion.config import CodecConfig, Config
from transfusion.config.codec_folder import folder_files
from transfusion.config.yaml_files import dump
from transfusion.data.shards.sample import Fault
from transfusion.errors import UserError
from transfusion.files import atomic_file, atomic_write_text, file_digest, remove_unfinished
from transfusion.observe.environment import describe_environment


@dataclass(frozen=True)
class RunFolder:
    """runs/<name>/ and the names of what it holds. Making one of these touches nothing on disk."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        return self.path / "env.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def quarantine(self) -> Path:
        return self.path / "quarantine.jsonl"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer.model"

    @property
    def codec(self) -> Path:
        return self.path / "codec"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def stalls(self) -> Path:
        return self.path / "stalls"

    @property
    def memory(self) -> Path:
        return self.path / "memory"

    @property
    def wandb_id(self) -> Path:
        return self.path / "wandb_id"

    @property
    def export(self) -> Path:
        return self.path / "export"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

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
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UserError(
                f"another process trains in {self.path}; wait for it, end it, or choose another run.dir"
            ) from None
        return file

    def create(self, config: Config, *, arguments: Sequence[str] = ()) -> None:
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
            if not self.tokenizer.is_file() or not _same_bytes(self.tokenizer, path):
                with atomic_file(self.tokenizer) as partial:
                    shutil.copyfile(path, partial)
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
                    with atomic_file(kept) as partial:
                        shutil.copyfile(file, partial)
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
