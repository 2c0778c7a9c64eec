"""What the main process writes down of a run: metrics.jsonl, the progress line, wandb, sample grids."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from transfusion.config import Config
from transfusion.observe.metrics import MetricsLog, StepMetrics
from transfusion.observe.progress import Progress
from transfusion.observe.runfolder import RunFolder
from transfusion.observe.sinks import open_metric_logger


class Record:
    """Opens all of it on entering, and closes it on leaving. first_step: where this start begins."""

    def __init__(self, config: Config, folder: RunFolder, first_step: int) -> None:
        self._config, self._folder, self._first_step = config, folder, first_step

    def __enter__(self) -> Record:
        with ExitStack() as stack:
            self._metrics = stack.enter_context(MetricsLog(self._folder.metrics))
            self._metric_logger = open_metric_logger(
                self._config, self._folder, attempt=self._metrics.attempt
            )
            stack.callback(self._metric_logger.close)
            progress = Progress(self._config.train.steps, first_step=self._first_step)
            self._progress = stack.enter_context(progress)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def write(self, metrics: StepMetrics, *, seconds_left: float | None) -> None:
        """One line of metrics, everywhere."""
        line = self._metrics.append(metrics)
        self._metric_logger.write(line)
        self._progress.update(line, seconds_left=seconds_left)

    def grid(self, step: int, write: Callable[[Path], None]) -> None:
        """The sample grid of a step, which `write` puts into a file."""
        path = self._folder.grid(step)
        write(path)
        self._metric_logger.image(step, path)
