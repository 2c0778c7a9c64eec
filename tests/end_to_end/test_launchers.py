"""torchrun and the deepspeed launcher do the same as each other, and as one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from transfusion.observe.metrics import read_metrics

pytestmark = pytest.mark.slow


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl")]


def test_launchers_agree(workplace: Any) -> None:
    runs = workplace.folder / "runs"
    quiet = ["train.steps=3", "checkpoint.every=100", "sample_grid.prompts=[]", "data.validation=[]"]
    workplace.run(*workplace.train("runs/plain", *quiet))
    workplace.run(*workplace.train("runs/torchrun", *quiet), processes=2)
    launcher = Path(sys.executable).parent / "deepspeed"
    command = [launcher, "--num_accelerators", "2", "--module", "transfusion"]
    done = subprocess.run(
        [*map(str, command), *workplace.train("runs/deepspeed", *quiet)],
        cwd=workplace.folder, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(runs / "deepspeed") == losses(runs / "torchrun")
    assert losses(runs / "torchrun") == pytest.approx(losses(runs / "plain"), rel=1e-6)
