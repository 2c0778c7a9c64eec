"""The most memory that a process has used so far."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

GIB = 2**30
PROCESSES = Path("/proc")


def peak_gib(device: torch.device) -> float:
    """Peak GiB: of tensors on a GPU, else the resident memory of this process and its loader workers.

    On CPU it is the sum of each process's own peak, so pages that forked workers share count more than once.
    """
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / GIB
    return process_tree_peak_bytes() / GIB


def process_tree_peak_bytes() -> int:
    """Sum of the peak resident memory of this process and all its living descendants."""
    if _peak_from_status("self") is None:  # no /proc, as on macOS, whose unit is the byte
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return used if sys.platform == "darwin" else used * 1024
    peak, waiting = 0, ["self"]
    while waiting:
        process = waiting.pop()
        peak += _peak_from_status(process) or 0  # a worker may have ended meanwhile
        waiting += _children(process)
    return peak


def _peak_from_status(process: str) -> int | None:
    try:
        status = (PROCESSES / process / "status").read_text()
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def _children(process: str) -> list[str]:
    children: list[str] = []
    try:
        for task in (PROCESSES / process / "task").iterdir():
            children += (task / "children").read_text().split()
    except OSError:
        pass
    return children
