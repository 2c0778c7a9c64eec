"""What a probe is about, what it found, and where that is kept: one small JSON file for each, in the user's cache.

A record is written under another name and takes its own once it is complete. So machines that share a home folder
may read and write it at the same time.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None  # type: ignore[assignment]

# What a probe may come to. All but the last are facts about the kernels and last as long as what they are about.
OUTCOMES = ("right", "wrong", "hung", "died", "failed", "undecided")
# An undecided probe says more about the machine at that time, such as its memory, and is made again after this.
UNDECIDED_SECONDS = 600
_PHRASES = {
    "right": "the probe found them right",
    "wrong": "the probe found them wrong",
    "hung": "the probe hung",
    "died": "the probe died",
    "failed": "the probe failed",
    "undecided": "the probe came to no verdict",
}
_PACKAGE = Path(__file__).parents[1]
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Subject:
    """What is probed and where: a record counts only where all of this is the same.

    Attributes:
        implementation: "hopper", "triton", or "decode" for Triton's kernels of attention to a cache.
        head_dim: Width of a head.
        dtype: Of the inputs, such as "bfloat16".
        device: Name of the GPU.
        architecture: Its compute capability, or the name of AMD's.
        driver: Its version, where that is known.
        torch_version: Of PyTorch.
        triton_version: Of Triton.
        sources: Hash of the kernels' source files.
    """

    implementation: str
    head_dim: int
    dtype: str
    device: str
    architecture: str
    driver: str
    torch_version: str
    triton_version: str
    sources: str

    @staticmethod
    def of(implementation: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> Subject:
        """The subject for inputs on `device`, as it and the software are now."""
        name, architecture = _device(device)
        return Subject(
            implementation=implementation,
            head_dim=int(head_dim),
            dtype=str(dtype).removeprefix("torch."),
            device=name,
            architecture=architecture,
            driver=_driver() if device.type == "cuda" else "",
            torch_version=torch.__version__,
            triton_version=_triton_version(),
            sources=source_hash(),
        )

    @property
    def kernels(self) -> str:
        """The kernels in words."""
        return f"{self.implementation}, head_dim {self.head_dim}, {self.dtype}"

    @property
    def file_name(self) -> str:
        digest = hashlib.blake2b(json.dumps(asdict(self), sort_keys=True).encode(), digest_size=8)
        return f"{self.implementation}-{self.head_dim}-{self.dtype}-{digest.hexdigest()}.json"


@dataclass(frozen=True)
class Verdict:
    """What a probe found.

    Attributes:
        outcome: One of `OUTCOMES`.
        detail: What exactly, empty if right.
        time: When, in seconds since 1970.
        seconds: How long the probe took.
    """

    outcome: str
    detail: str
    time: float
    seconds: float

    @property
    def right(self) -> bool:
        return self.outcome == "right"

    @property
    def date(self) -> str:
        return time.strftime("%Y-%m-%d", time.localtime(self.time))

    @property
    def counts(self) -> bool:
        """Whether it need not be made again."""
        return self.outcome != "undecided" or time.time() - self.time < UNDECIDED_SECONDS

    @property
    def sentence(self) -> str:
        """What happened, as part of a sentence about the kernels."""
        return _PHRASES[self.outcome] + (f" ({self.detail})" if self.detail else "")

    def __str__(self) -> str:
        return f"{self.outcome}: {self.detail}" if self.detail else self.outcome


def read(folder: Path | None, subject: Subject) -> Verdict | None:
    """The verdict that is on record, None where there is none that counts. Whatever is unreadable is none."""
    if folder is None:
        return None
    try:
        record = json.loads((folder / subject.file_name).read_text(encoding="utf-8"))
        verdict = Verdict(**record["verdict"])
        sound = (
            record["subject"] == asdict(subject)
            and verdict.outcome in OUTCOMES
            and isinstance(verdict.detail, str)
            and all(isinstance(number, int | float) for number in (verdict.time, verdict.seconds))
        )
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return verdict if sound and verdict.counts else None


def write(folder: Path, subject: Subject, verdict: Verdict) -> Path:
    """Put a verdict on record, atomically, and return its file.

    Raises:
        OSError: If it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / subject.file_name
    record: dict[str, Any] = {"subject": asdict(subject), "verdict": asdict(verdict)}
    # A random name, since processes of two machines may have the same number.
    descriptor, unfinished = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=folder)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        Path(unfinished).replace(path)
    finally:
        Path(unfinished).unlink(missing_ok=True)
    return path


@contextlib.contextmanager
def locked(folder: Path | None, subject: Subject, seconds: float) -> Iterator[bool]:
    """Keep other processes from the same probe, as far as the file system can.

    Gives False, and goes on all the same, where the folder cannot be written, the file system has no locks, or
    another process has held this one for `seconds`. A lock goes with its process, so that none is left behind.
    """
    with contextlib.ExitStack() as stack:
        held = False
        with contextlib.suppress(OSError):
            if folder is not None and fcntl is not None:
                folder.mkdir(parents=True, exist_ok=True)
                path = folder / f"{subject.file_name}.lock"
                held = _lock(stack.enter_context(path.open("a")), seconds)
        yield held


def _lock(file: Any, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(_POLL_SECONDS)
        else:
            return True


@functools.cache
def source_hash() -> str:
    """Hash of all that decides what the kernels compute, and of the probe that looks at it."""
    found = hashlib.blake2b(digest_size=8)
    for path in (*sorted((_PACKAGE / "attention").glob("*.py")), _PACKAGE / "probe" / "child.py"):
        found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


@functools.cache
def _device(device: torch.device) -> tuple[str, str]:
    """Name and architecture."""
    if device.type != "cuda":
        return f"{device.type} with Triton's interpreter", platform.machine()
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.name, str(properties.gcnArchName)
    return properties.name, f"{properties.major}.{properties.minor}"


@functools.cache
def _driver() -> str:
    """Version of the GPU's driver, of NVIDIA's or AMD's kernel module, else of the CUDA that it can do."""
    for path, pattern in (
        ("/proc/driver/nvidia/version", r"Kernel Module(?: for \S+)?\s+(\d[\d.]*)"),
        ("/sys/module/amdgpu/version", r"(\S+)"),
    ):
        with contextlib.suppress(OSError):
            if found := re.search(pattern, Path(path).read_text(encoding="utf-8", errors="replace")):
                return found[1]
    version = getattr(torch._C, "_cuda_getDriverVersion", None)
    return f"CUDA {version()}" if callable(version) else ""


@functools.cache
def _triton_version() -> str:
    try:
        import triton
    except Exception:  # a broken installation raises whatever its loader raises
        return ""
    return str(triton.__version__)
