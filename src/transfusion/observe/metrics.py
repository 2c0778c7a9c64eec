"""metrics.jsonl, the record of a run: one JSON object a logged step, appended at once.

Validation losses are measured after their step was saved, and stand in a line of their own with the same step. A run
that is killed and started again writes some steps twice. Of each name the last value of a step counts.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """What is known after a step. A loss is a mean over its targets, None where the step had none.

    losses: by the names of the loss's terms, such as "text". series: those of several values, such as
    "image_by_timestep". tokens, images: seen since the run's first step.
    data_wait: share of the time since the last line that was spent waiting for data. memory_gib: peak.
    flops: exact operations of all ranks since the last line.
    mfu, hfu, mfu_palm, gemm_share: see `utilization.Utilization`; a mean over the ranks.
    skipped: steps so far whose update was left out. roll_backs: times so far that a former checkpoint was
    brought back. gradient_norms: of this step, by module, where log.gradient_norms asks for them.
    faults: samples so far that could not be read.
    """

    step: int
    loss: float | None
    losses: Mapping[str, float | None]
    series: Mapping[str, Sequence[float | None]]
    gradient_norm: float | None
    learning_rate: float
    skipped: int
    faults: int
    tokens: int
    images: int
    tokens_per_second: float | None
    data_wait: float | None
    memory_gib: float | None
    flops: float | None = None
    mfu: float | None = None
    hfu: float | None = None
    mfu_palm: float | None = None
    gemm_share: float | None = None
    roll_backs: int = 0
    gradient_norms: dict[str, float] | None = None

    def line(self) -> dict[str, Any]:
        """Flat, as it is written: `text_loss`, `image_loss_by_timestep` and so on."""
        values = {name: getattr(self, name) for name in self.__slots__}
        losses, series = values.pop("losses"), values.pop("series")
        return {
            "step": values.pop("step"),
            "loss": values.pop("loss"),
            **{f"{name}_loss": loss for name, loss in losses.items()},
            **{name.replace("_by_", "_loss_by_"): each for name, each in series.items()},
            **values,
        }


class MetricsLog:
    """Appends lines to metrics.jsonl. Only the main process opens one.

    Each line is one unbuffered write, so that a killed process loses none it had logged. A torn line
    (a full disk, a lost machine) is taken away when the file is next opened. attempt: 1 for the first
    start of the run, one more for each start that found lines.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _repair(path)
        attempts = [line.get("attempt", 0) for line in _lines(path)]
        self.attempt = 1 + max(attempts, default=0)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - open as long as the run

    def append(self, metrics: StepMetrics) -> dict[str, Any]:
        """Write one line, with the time and the attempt; returns the line as readers will see it."""
        return self._append(metrics.line())

    def append_validation(self, step: int, losses: Mapping[str, float | None]) -> dict[str, Any]:
        """As `append`, of the validation losses of a step: `validation_text_loss` and so on."""
        return self._append(
            {"step": step} | {f"validation_{name}_loss": loss for name, loss in losses.items()}
        )

    def _append(self, values: dict[str, Any]) -> dict[str, Any]:
        line = without_nan({**values, "time": round(time.time(), 3), "attempt": self.attempt})
        self._file.write(json.dumps(line, separators=(",", ":"), allow_nan=False).encode() + b"\n")
        return line

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The steps of metrics.jsonl in order, of each name its last value. A torn line is left out.

    An absent file is an empty run.
    """
    steps: dict[int, dict[str, Any]] = {}
    for line in _lines(path):
        steps.setdefault(line["step"], {}).update(line)
    return [steps[step] for step in sorted(steps)]


def has_validation(path: Path, step: int) -> bool:
    """Whether metrics.jsonl has validation losses of this step."""
    return any(
        line["step"] == step and any(name.startswith("validation_") for name in line) for line in _lines(path)
    )


def without_nan(value: Any) -> Any:
    """The same plain values with None for every NaN and infinity, which JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return value


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    with open(path, "rb") as file:
        for text in file:
            line = _parse(text)
            if line is not None:
                yield line


def _parse(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None


def _repair(path: Path) -> None:
    """Make the file end with a whole line, so that the next one does not run into a torn one."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with open(path, "rb+") as file:
        content = file.read()
        if content.endswith(b"\n"):
            return
        end_of_lines = content.rfind(b"\n") + 1
        if _parse(content[end_of_lines:]) is not None:
            file.write(b"\n")
        else:
            file.truncate(end_of_lines)
        file.flush()
        os.fsync(file.fileno())
