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


def test_suites_find_the_same_in_a_training_on_one_process_and_under_zero(workplace: Any) -> None:
    folder = workplace.folder
    (folder / "suites.yaml").write_text(
        "samples: {count: 2, captions: 4, steps: 3, max_tokens: 4}\ndenoise: {limit: 10}\nvalidation:\n"
    )
    evaluates = ["train.steps=4", "checkpoint.every=2", "sample_grid.prompts=[]", "data.validation_limit=4"]
    evaluates += ["eval.every=2", "eval.suites=suites.yaml"]
    workplace.run(*workplace.train("runs/alone-evaluates", *evaluates))
    workplace.run(*workplace.train("runs/zero-evaluates", *evaluates), processes=2)
    found = []
    for run in ("alone", "zero"):
        path = folder / "runs" / f"{run}-evaluates"
        found.append(
            [line for line in read_metrics(path / "metrics.jsonl") if "eval_caption_token_f1" in line]
        )
        assert [line["step"] for line in found[-1]] == [2, 4]
        assert len(list((path / "evaluation" / "generated").glob("*.png"))) == 2
    for alone, zero in zip(*found, strict=True):
        names = [name for name in alone if name.startswith("eval_")]
        assert len(names) > 8
        assert [zero[name] for name in names] == pytest.approx([alone[name] for name in names], rel=1e-4)


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
