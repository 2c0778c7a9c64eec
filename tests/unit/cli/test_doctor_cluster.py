"""The doctor of several processes: what differs is named with its machine and its remedy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from transfusion.cli import doctor_cluster as doctor
from transfusion.parallel.cluster import Bandwidth

HOSTS = ["node-1", "node-1", "node-2", "node-2"]
SAME = {"python": "3.11.7", "torch": "2.13.0", "gpu": "H100"}


def launch(*arguments: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [
        sys.executable,
        *(launcher if processes > 1 else []),
        "-m",
        "transfusion",
        "doctor",
        "--cluster",
    ]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120, env=variables)


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_of_this_machine_are_fit(tmp_path: Path) -> None:
    ended = launch("--folder", str(tmp_path))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    table = ended.stdout
    marks = {
        line.split()[1]: line.split()[0]
        for line in table.splitlines()
        if line[:4] in ("ok  ", "note", "MISS")
    }
    assert marks == dict.fromkeys(
        ["processes", "versions", "clocks", "storage", "all_reduce", "all_gather"], "ok"
    )
    assert "2 on 1 machine(s)" in table and "These processes can train together." in table
    assert table.count("GB/s") == 6
    assert list(tmp_path.iterdir()) == []


@pytest.mark.dist
@pytest.mark.slow
def test_storage_that_cannot_be_written_is_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    ended = launch("--folder", str(tmp_path / "file"))
    assert "exitcode  : 2" in ended.stderr or "exitcode: 2" in ended.stderr
    assert "cannot write in" in ended.stdout and "mounted on all machines" in ended.stdout


def test_a_single_process_is_told_how_to_start_it() -> None:
    ended = launch(processes=1)
    assert ended.returncode == 2 and "torchrun --nproc-per-node" in ended.stderr


def test_equal_machines_are_good() -> None:
    assert [finding.state for finding in doctor._versions([SAME] * 4, HOSTS)] == ["good"]
    assert [finding.state for finding in doctor._processes(HOSTS)] == ["good"]
    assert [finding.state for finding in doctor._clocks([0.0, 0.001, -0.2, 0.9], HOSTS)] == ["good"]
    assert [finding.state for finding in doctor._storage([], Path())] == ["good"]


def test_other_versions_are_missing_and_other_hardware_is_a_note() -> None:
    """Told once a machine, however many of its processes see it."""
    other = {**SAME, "torch": "2.12.0", "gpu": "A100"}
    torch, gpu = doctor._versions([SAME, SAME, other, other], HOSTS)
    assert (
        torch.state == "missing" and "torch is 2.12.0 on node-2 (rank 2) and 2.13.0 on node-1" in torch.text
    )
    assert gpu.state == "note" and "A100" in gpu.text


def test_a_clock_that_is_off_is_named() -> None:
    (finding,) = doctor._clocks([0.0, 0.1, -7.5, -7.4], HOSTS)
    assert finding.state == "missing" and "node-2 (rank 2) is -7.5 s off node-1" in finding.text
    assert "chronyc" in finding.remedy


def test_unequal_machines_and_slow_networks_are_notes() -> None:
    (finding,) = doctor._processes(["a", "a", "b"])
    assert finding.state == "note" and "a 2, b 1" in finding.text
    slow = Bandwidth("all_reduce", 1 << 27, 100.0, 0.9)
    assert [finding.state for finding in doctor._bandwidths([slow], gpu=True)] == ["note"]
    assert [finding.state for finding in doctor._bandwidths([slow], gpu=False)] == ["good"]
