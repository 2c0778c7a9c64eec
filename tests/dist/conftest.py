"""Starts the worker processes once a session; the tests judge what they found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("worker.py")
LONGEST_START_AND_RUN = 600.0
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# One finding a rank.
Findings = Callable[[str], list[Any]]


def run_worker(launcher: list[str], mode: str, folder: Path, ranks: int, **settings: str) -> Findings:
    """Run the worker on `ranks` processes; returns a look-up of a scenario's findings, rank by rank.

    settings: more environment variables.
    """
    variables = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    variables |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | settings
    variables["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, *launcher, str(WORKER), mode, str(folder)]
    done = subprocess.run(
        command, env=variables, capture_output=True, text=True, timeout=LONGEST_START_AND_RUN, check=False
    )
    findings: list[dict[str, Any]] = []
    for rank in range(ranks):
        path = folder / f"{mode}_{rank}.json"
        findings.append(json.loads(path.read_text()) if path.is_file() else {})

    def look_up(scenario: str) -> list[Any]:
        for rank, found in enumerate(findings):
            if scenario not in found or "raised" in found[scenario]:
                first = next((item["raised"] for item in found.values() if "raised" in item), "")
                pytest.fail(
                    f"rank {rank} did not finish {scenario!r}:\n{first}{done.stdout}{done.stderr[-4000:]}"
                )
        return [found[scenario] for found in findings]

    look_up.output = done.stdout + done.stderr  # type: ignore[attr-defined]
    return look_up


def torchrun(processes: int) -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="session")
def single(shared_folder: Path) -> Findings:
    """Findings of one process without a launcher; it leaves a checkpoint for `pair`."""
    return run_worker([], "single", shared_folder, 1)


@pytest.fixture(scope="session")
def pair(single: Findings, shared_folder: Path) -> Findings:
    """Findings of two ranks over gloo, started by torchrun."""
    return run_worker(torchrun(2), "pair", shared_folder, 2)


@pytest.fixture(scope="session")
def quad(tmp_path_factory: pytest.TempPathFactory) -> Findings:
    """Findings of four ranks."""
    return run_worker(torchrun(4), "quad", tmp_path_factory.mktemp("quad"), 4)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Findings:
    """Findings of two ranks that compile their blocks."""
    return run_worker(torchrun(2), "compiled", tmp_path_factory.mktemp("compiled"), 2)


@pytest.fixture(scope="session")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Findings:
    """Findings of two ranks whose attention is the Triton kernels, run by Triton's interpreter."""
    folder = tmp_path_factory.mktemp("interpreted")
    return run_worker(torchrun(2), "interpreted", folder, 2, TRITON_INTERPRET="1")
