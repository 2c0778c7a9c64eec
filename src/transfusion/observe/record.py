"""What the main process writes down of a run: metrics.jsonl, the progress line, wandb, sample grids."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from transfusion.config import Config
from transfusion.observe.metrics import MetricsLog, StepMetrics
from transfusion.observe.progress import Progress
from transfusion.observe.runfolder import RunFolder
from transfusion.observe.sinks import MetricLogger, open_metric_logger

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Record:
    """All places that a run is written to, open."""

    folder: RunFolder
    metrics: MetricsLog
    metric_logger: MetricLogger
    progress: Progress

    def write(self, metrics: StepMetrics, *, seconds_left: float | None) -> None:
        """One line of metrics, everywhere."""
        line = self.metrics.append(metrics)
        self.metric_logger.write(line)
        self.progress.update(line, seconds_left=seconds_left)

    def validation(self, step: int, losses: Mapping[str, float | None]) -> None:
        """The validation losses of a step, after its own line."""
        line = self.metrics.append_validation(step, losses)
        self.metric_logger.write(line)
        told = [f"{name} {loss:.4f}" for name, loss in losses.items() if loss is not None]
        log.info("step %d: validation losses  %s", step, "  ".join(told))

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """What suites found at a step, after its own line."""
        line = self.metrics.append_figures(step, figures)
        self.metric_logger.write(line)
        log.info("step %d: %s", step, "  ".join(f"{name} {value:.4f}" for name, value in figures.items()))

    def grid(self, step: int, write: Callable[[Path], None]) -> None:
        """The sample grid of a step, which `write` puts into a file."""
        path = self.folder.grid(step)
        write(path)
        self.metric_logger.image(step, path)


@contextmanager
def open_record(config: Config, folder: RunFolder, first_step: int) -> Iterator[Record]:
    """Open all of it, and close it at the end. first_step: where this start begins."""
    with (
        MetricsLog(folder.metrics) as metrics,
        closing(open_metric_logger(config, folder, attempt=metrics.attempt)) as metric_logger,
        Progress(config.train.steps, first_step=first_step) as progress,
    ):
        yield Record(folder, metrics, metric_logger, progress)
