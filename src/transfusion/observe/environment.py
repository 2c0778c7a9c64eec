"""What a run is made on: machine, packages, commit and arguments, as environment.json tells it."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from transfusion import __version__
from transfusion.urls import redacted_text

PACKAGES = ("torch", "deepspeed", "triton", "numpy", "sentencepiece", "webdataset", "safetensors")


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
