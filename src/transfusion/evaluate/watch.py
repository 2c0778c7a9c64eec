"""Evaluates the checkpoints of a run as they appear, in a process of its own, so that training need not wait.

RUN/evaluations.jsonl    one line a checkpoint: its step, and the figures by name
RUN/metrics.json         the figures of the newest one that was measured, and RUN/evaluation what they were made of
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transfusion.checkpoint.export import export
from transfusion.checkpoint.layout import complete_checkpoints, read_manifest, step_of
from transfusion.errors import UserError
from transfusion.evaluate.metrics.metric import Metric
from transfusion.files import atomic_write_text, remove_leftover
from transfusion.parallel.environment import own_place

RECORD, EXPORT = "evaluations.jsonl", "watched"
POLL_SECONDS = 10.0

# Measures an exported model, and leaves its figures and evidence in a folder.
Measure = Callable[[Path, Path], dict[str, Metric]]


def watch(
    run: Path,
    measure: Measure,
    *,
    once: bool = False,
    say: Callable[[str], None] = print,
    wait: Callable[[float], None] = time.sleep,
) -> None:
    """Measure each checkpoint of a run that is not measured yet, the newest first, until that of the last step.

    Killed and started again, it goes on. once: end as soon as none is left. Raises UserError for a folder that is no
    run, for what cannot be measured, and under a launcher of several processes.
    """
    if not run.is_dir():
        raise UserError(f"{run} is not there; give the folder of a run, once its training has begun")
    if own_place().world_size > 1:
        raise UserError(
            "transfusion watch is one process, and several would write the same files; start it alone"
        )
    has_measured = False
    while True:
        folders = complete_checkpoints(run)
        measured = {line["step"] for line in evaluations(run)}
        pending = [folder for folder in folders if step_of(folder) not in measured]
        if pending:
            is_newest = (step_of(pending[-1]) or 0) >= max(measured, default=0)
            _measure(run, pending[-1], measure, say, is_newest=is_newest)
            has_measured = True
        elif once or (folders and _is_last(folders[-1])):
            if measured and not has_measured:
                say(f"{run / RECORD} has every checkpoint; delete it, and all are measured anew")
            return
        else:
            wait(POLL_SECONDS)


def _is_last(checkpoint: Path) -> bool:
    return (step_of(checkpoint) or 0) >= read_manifest(checkpoint).config["train"]["steps"]


def _measure(
    run: Path, checkpoint: Path, measure: Measure, say: Callable[[str], None], *, is_newest: bool
) -> None:
    """Measure one checkpoint and note its figures. One that training has removed by now is passed over.

    is_newest: of all that were measured. What the run shows of others is left as it is.
    """
    model = run / EXPORT
    remove_leftover(model)
    try:
        export(checkpoint, model)
    except (UserError, OSError):
        if checkpoint.exists():
            raise
        return
    say(f"step {step_of(checkpoint)}")
    found = measure(model, run if is_newest else model)
    for name, metric in found.items():
        say(f"{name:32} {metric.describe()}")
    line = {"step": step_of(checkpoint), **{name: metric.value for name, metric in found.items()}}
    lines = [*evaluations(run), line]
    atomic_write_text(run / RECORD, "".join(json.dumps(each) + "\n" for each in lines))
    remove_leftover(model)


def evaluations(run: Path) -> list[dict[str, Any]]:
    """The lines of the record, by step. Raises UserError for a file that is not ours."""
    path = run / RECORD
    try:
        texts = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return sorted((json.loads(text) for text in texts), key=lambda line: int(line["step"]))
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged; delete it, and all checkpoints are measured anew") from None
