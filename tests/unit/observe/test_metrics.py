"""metrics.jsonl survives kills, torn lines and repeated steps, and never holds what JSON cannot."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from transfusion.observe.metrics import MetricsLog, StepMetrics, read_metrics, without_nan


def metrics(step: int, **changes: Any) -> StepMetrics:
    values: dict[str, Any] = {
        "step": step,
        "loss": 2.0,
        "losses": {"text": 1.5, "image": 0.1},
        "series": {"image_by_timestep": [0.1] * 9 + [None]},
        "gradient_norm": 0.5,
        "learning_rate": 1e-3,
        "skipped": 0,
        "faults": 0,
        "tokens": 100 * step,
        "images": step,
        "tokens_per_second": 1000.0,
        "data_wait": 0.01,
        "memory_gib": 1.0,
    }
    return StepMetrics(**{**values, **changes})


def test_a_line_is_on_disk_at_once(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "run" / "metrics.jsonl") as log:
        written = log.append(metrics(1))
        assert read_metrics(tmp_path / "run" / "metrics.jsonl") == [written]
    assert written["attempt"] == 1 and written["time"] > 1e9
    assert written["image_loss_by_timestep"][-1] is None


def test_no_nan_reaches_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.append(
            metrics(1, loss=math.nan, gradient_norm=math.inf, series={"image_by_timestep": [math.nan] * 10})
        )

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    line = json.loads(path.read_text(), parse_constant=refuse)
    assert line["loss"] is None and line["gradient_norm"] is None
    assert line["image_loss_by_timestep"] == [None] * 10


def test_without_nan_keeps_everything_else() -> None:
    assert without_nan({"a": [1, math.nan, "x", (2.5, None)], "b": -math.inf, "c": True}) == {
        "a": [1, None, "x", [2.5, None]],
        "b": None,
        "c": True,
    }


def test_the_last_line_of_a_step_counts_and_steps_are_in_order(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        for step in (1, 2, 3, 4):
            log.append(metrics(step, loss=float(step)))
    with MetricsLog(path) as log:
        assert log.attempt == 2
        for step in (3, 4, 5):
            log.append(metrics(step, loss=float(10 * step)))
    lines = read_metrics(path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["loss"] for line in lines] == [1.0, 2.0, 30.0, 40.0, 50.0]
    assert [line["attempt"] for line in lines] == [1, 1, 2, 2, 2]


@pytest.mark.parametrize("cut", [1, 10, 60])
def test_a_torn_last_line_is_left_out_and_repaired(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.append(metrics(1))
        log.append(metrics(2))
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    # Losing only the line feed loses nothing.
    kept = [1, 2] if cut == 1 else [1]
    assert [line["step"] for line in read_metrics(path)] == kept
    with MetricsLog(path) as log:
        log.append(metrics(3))
    assert [line["step"] for line in read_metrics(path)] == [*kept, 3]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_file_of_nothing_but_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "lo')
    with MetricsLog(path) as log:
        assert log.attempt == 1
        log.append(metrics(1))
    assert len(read_metrics(path)) == 1


def test_no_file_is_an_empty_run(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_killed_process_loses_no_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    script = (
        "import os, signal, sys; sys.path.insert(0, sys.argv[2]); from pathlib import Path;"
        "from test_metrics import metrics; from transfusion.observe.metrics import MetricsLog;"
        "log = MetricsLog(Path(sys.argv[1]));"
        "[log.append(metrics(step)) for step in range(50)];"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    here = str(Path(__file__).parent)
    ended = subprocess.run([sys.executable, "-c", script, str(path), here], env=dict(os.environ))
    assert ended.returncode == -signal.SIGKILL
    assert [line["step"] for line in read_metrics(path)] == list(range(50))
