"""What there is on this machine, as JSON: GPU, driver, versions, compiler, and what cannot be imported."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu_check.record import write_json

PACKAGES = (
    "torch", "triton", "numpy", "pydantic", "pydantic-core", "typing-extensions", "webdataset", "deepspeed",
    "safetensors", "sentencepiece", "pillow", "scikit-learn", "matplotlib", "pytest", "pytest-xdist", "pytest-timeout",
    "nvidia-cudnn-cu13", "nvidia-cudnn-frontend", "nvidia-nccl-cu13", "flash-attn",
)  # fmt: skip
# What the parts import. The error itself is kept, since its own missing packages are named nowhere else.
IMPORTED = (
    "torch",
    "triton",
    "transfusion.cli.main",
    "transfusion_kernels",
    "deepspeed",
    "pytest_timeout",
    "xdist",
)
COMMANDS = {
    "gpu": (
        "nvidia-smi",
        "--query-gpu=name,driver_version,memory.total,memory.used",
        "--format=csv,noheader",
    ),
    "gcc": ("gcc", "--version"),
    "sanitizer": ("compute-sanitizer", "--version"),
}


def first_lines(command: tuple[str, ...]) -> str:
    """What a command says, or why there is nothing."""
    if shutil.which(command[0]) is None:
        return "not found"
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{type(error).__name__}: {error}"
    return (ended.stdout or ended.stderr).strip()[:400]


def version(package: str) -> str:
    """The version of an installed package, or nothing."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return ""


def importing(module: str) -> str:
    """The error of importing a module, or the seconds that it took."""
    begin = time.perf_counter()
    try:
        importlib.import_module(module)
    except BaseException as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return f"{time.perf_counter() - begin:.1f} s"


def triton_library() -> str:
    """The hash of Triton's compiler. Where it is that of another machine, kernels compiled there fit here."""
    spec = importlib.util.find_spec("triton")
    library = Path(spec.origin).parent / "_C" / "libtriton.so" if spec and spec.origin else None
    if library is None or not library.exists():
        return ""
    with library.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def gpu() -> dict[str, Any]:
    """What PyTorch says of the first GPU."""
    import torch

    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": [properties.major, properties.minor],
        "processors": properties.multi_processor_count,
        "memory_gib": properties.total_memory / 2**30,
        "l2_mib": properties.L2_cache_size / 2**20,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    found: dict[str, Any] = {
        "python": sys.version,
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "disk_free_gib": shutil.disk_usage(out.parent).free / 2**30,
        "packages": {name: version(name) for name in PACKAGES},
        **{name: first_lines(command) for name, command in COMMANDS.items()},
        "libtriton_sha256": triton_library(),
    }
    write_json(found, out)
    found["imports"] = {module: importing(module) for module in IMPORTED}
    write_json(found, out)
    found["device"] = gpu()
    write_json(found, out)
    for name, value in found.items():
        print(f"{name}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
