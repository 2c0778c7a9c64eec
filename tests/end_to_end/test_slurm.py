"""launch/slurm.sbatch with srun and scontrol stood in for: what is queued again, and what is not."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "slurm.sbatch"


@pytest.mark.parametrize(
    ("doctor", "train", "restarts", "code", "requeued"),
    [
        (0, 0, 0, 0, False),
        (0, 75, 40, 75, True),
        (0, 69, 4, 69, True),
        (0, 69, 5, 69, False),
        (0, 137, 0, 137, True),
        (0, 2, 0, 2, False),
        (2, 0, 0, 2, False),
    ],
)
def test_what_is_queued_again(
    tmp_path: Path, doctor: int, train: int, restarts: int, code: int, requeued: bool
) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    srun = f'echo "$@" >>calls; case "$*" in *doctor*) exit {doctor};; *) exit {train};; esac'
    for name, body in (("srun", srun), ("scontrol", 'echo "scontrol $*" >>calls')):
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o755)
    variables = {
        "PATH": f"{tools}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7",
        "SLURM_RESTART_COUNT": str(restarts),
    }  # fmt: skip
    bash = shutil.which("bash")
    assert bash
    ended = subprocess.run([bash, str(SCRIPT), "config.yaml", "train.steps=3"], env=variables, timeout=120)
    assert ended.returncode == code
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0].endswith("-m transfusion doctor --cluster")
    assert ("scontrol requeue 7" in calls) == requeued
    trained = [call for call in calls if call.endswith("-m transfusion train config.yaml train.steps=3")]
    assert len(trained) == (doctor == 0) and all(call.startswith("--wait=60 ") for call in trained)
