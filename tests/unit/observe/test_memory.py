"""Peak memory grows with what is used, counts children, and is in GiB."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from transfusion.observe import memory
from transfusion.observe.memory import peak_gib

CHILD = "import sys; block = bytearray(200 * 2**20); print(len(block), flush=True); sys.stdin.read()"


def test_peak_is_in_gib_and_keeps_what_was_freed() -> None:
    before = peak_gib(torch.device("cpu"))
    assert 0.05 < before < 64
    block = torch.ones(512 * 2**20, dtype=torch.uint8)
    del block
    # The kernel counts pages in batches a core, so the figure itself is a little rough.
    assert peak_gib(torch.device("cpu")) > before - 0.01


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="children are read from /proc")
def test_loader_workers_count() -> None:
    before = memory.process_tree_peak_bytes()
    with subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None and child.stdin is not None
        child.stdout.readline()
        assert memory.process_tree_peak_bytes() - before > 190 * 2**20
        child.stdin.close()


def test_without_proc_the_process_itself_is_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "PROCESSES", tmp_path)
    assert memory.process_tree_peak_bytes() > 20 * 2**20
