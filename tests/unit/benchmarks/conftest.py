"""Makes the benchmarks importable as they import each other, and what they set in the process end with the test."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import limits

    monkeypatch.setattr(limits, "CPU_MATRICES", (32, 64))
    monkeypatch.setattr(limits, "CPU_COPIES_MIB", (1,))
    # The environment of a process is written as training starts.
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
