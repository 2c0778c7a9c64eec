"""The folder of a run: where everything stands, what it ran on, and its log."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from transfusion import __version__
from transfusion.checkpoint import layout
from transfusion.config import CodecConfig, Config
from transfusion.config.codec_folder import folder_files
from transfusion.config.yaml_files import dump
from transfusion.data.shards.scan import Fault
from transfusion.errors import UserError
from transfusion.files import atomic_file, atomic_write_text, file_digest
from transfusion.urls import redacted_text

PACKAGES = ("torch", "deepspeed", "triton", "numpy", "sentencepiece", "webdataset", "safetensors")
LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"


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
        if codec.kind == "pixels" or Path(codec.folder).resolve() == self.codec.resolve():
            return
        try:
            self.codec.mkdir(exist_ok=True)
            for file in folder_files(codec.folder):
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


def describe_environment(arguments: Sequence[str] = ()) -> dict[str, Any]:
    """What a run stands on, GPUs of this machine only. No environment variables: they may hold secrets."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "argv": [redacted_text(argument) for argument in arguments],
        "transfusion": __version__,
        "git": git_state(Path(__file__).resolve()),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_count": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "processes": _processes(),
        "gpus": _gpus(),
    }


def package_version(name: str) -> str | None:
    """Installed version of a distribution, without importing it; None where it is missing."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def git_state(file: Path) -> dict[str, Any] | None:
    """Commit of the checkout that tracks `file`, and whether it is changed since; None outside one."""
    if _git(file, "ls-files", "--error-unmatch", file.name) is None:
        return None  # a package installed below somebody's own repository is not that repository
    commit = _git(file, "rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "dirty": bool(_git(file, "status", "--porcelain", "--untracked-files=no"))}


def _git(file: Path, *arguments: str) -> str | None:
    try:
        answer = subprocess.run(
            ["git", "-C", str(file.parent), *arguments],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _processes() -> int:
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [{"name": gpu.name, "memory_gib": round(gpu.total_memory / 2**30, 1)} for gpu in found]


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to whatever sys.stderr is at that moment: a live progress line replaces it while it shows."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        return


def start_logging(folder: RunFolder | None, *, rank: int = 0) -> None:
    """Send the package's log to stderr, and in the main process to log.txt of its run folder.

    Other ranks show warnings only, with their rank. Calling it again replaces the former destinations.
    """
    logger = logging.getLogger("transfusion")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    screen = _Stderr()
    screen.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    screen.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"rank {rank}: %(message)s"))
    logger.addHandler(screen)
    if folder is not None and rank == 0:
        folder.path.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(folder.log, encoding="utf-8")
        file.setFormatter(logging.Formatter(LOG_FORMAT))
        logger.addHandler(file)
