"""What a run tells of itself: lines of metrics, validation losses, the sample grid, samples that were left out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from transfusion.data.index.image_shapes import cut_away
from transfusion.data.loading.validation import EvaluationLoader
from transfusion.evaluate.progress_lines import heard_by
from transfusion.evaluate.suites.run import choose_for_training, measured
from transfusion.evaluate.validation_losses import validation_losses
from transfusion.generate.image_files import write_grid
from transfusion.generate.pipeline import Pipeline
from transfusion.observe.losses import MeanLosses
from transfusion.observe.memory import peak_gib
from transfusion.observe.metrics import EVALUATED, VALIDATED, StepMetrics, has
from transfusion.observe.progress import duration
from transfusion.observe.record import Record, open_record
from transfusion.optim.schedule import learning_rate
from transfusion.parallel.collectives import broadcast_from_main, gather, raise_together
from transfusion.parallel.engine import Weights
from transfusion.schema import Batch, LossTerms, StepResult
from transfusion.training.parts import RunParts

log = logging.getLogger(__name__)

# Seconds on a CPU that nobody expects who has not been told.
_TOO_LONG = 6 * 3600.0


class Reporter:
    """Measures on all ranks together. What is found, the main process writes, between entering and leaving."""

    def __init__(self, parts: RunParts) -> None:
        self.parts = parts
        self._record: Record | None = None
        self._open = ExitStack()
        # Of this rank, in the steps since the last line of metrics.
        self._terms: list[LossTerms] = []
        self._images = 0
        # Read once, so that all evaluations of a start, and all ranks, run the same.
        evaluation = parts.config.eval
        self._suites_chosen = choose_for_training(evaluation.suites) if evaluation.every else {}

    def __enter__(self) -> Reporter:
        record = open_record(self.parts.config, self.parts.folder, self.parts.state.step)
        is_main = self.parts.here.is_main
        self._record = raise_together(lambda: self._open.enter_context(record) if is_main else None)
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def announce(self) -> None:
        """Say what begins, and what speaks against it."""
        parts, config = self.parts, self.parts.config
        log.info(
            "%s: %d process(es) on %s, step %d to %d, run folder %s",
            config.run.name,
            parts.here.world_size,
            parts.engine.device.type,
            parts.state.step,
            config.train.steps,
            parts.folder.path,
        )
        for warning in config.warnings() if parts.here.is_main else ():
            log.warning("%s", warning)
        for index in parts.loader.indexes if parts.here.is_main else ():
            if warning := cut_away(index, config.media_sizes):
                log.warning("%s", warning)
        if faults := parts.loader.counters()["faults"]:
            log.warning("samples left out, by reason: %s; see %s", faults, parts.folder.quarantine)
        self.quarantine()

    def warn_of_slowness(self) -> None:
        """Say, after the first step of a start, that a CPU will take all too long."""
        parts = self.parts
        left = parts.clock.seconds_left(parts.config.train.steps - parts.state.step) or 0.0
        if parts.here.is_main and parts.engine.device.type == "cpu" and left > _TOO_LONG:
            log.warning(
                "at this pace the run takes about %s on this CPU: train on a GPU, or lower train.steps, model.layers,"
                " model.hidden_size, codec.image_size or data.global_batch_size; the guide to data has a table",
                duration(left),
            )

    def alive(self) -> None:
        """Show that the run goes on, between lines."""
        parts = self.parts
        if self._record:
            left = parts.clock.seconds_left(parts.config.train.steps - parts.state.step)
            self._record.progress.alive(parts.state.step, seconds_left=left)

    def note(self, batches: list[Batch], terms: list[LossTerms]) -> None:
        """Keep what this rank's micro-batches of a step came to, for the next line."""
        self._terms += terms
        self._images += sum(batch.counts.images for batch in batches)

    def line(self, result: StepResult) -> None:
        """Sum the losses over steps and ranks and write a line of metrics."""
        parts = self.parts
        parts.watchdog.note("metrics", parts.state.step)
        losses = MeanLosses.over_ranks(
            self._terms, parts.engine.loss, parts.operation_meter.take(), images=self._images
        )
        self._terms, self._images = [], 0
        parts.state.images += losses.images
        line = self._metrics(result, losses)
        seconds_left = parts.clock.seconds_left(parts.config.train.steps - parts.state.step)
        raise_together(lambda: self._record.write(line, seconds_left=seconds_left) if self._record else None)

    def is_unmeasured(self) -> bool:
        """Whether what `measure` leaves of this step is not there yet, as far as the configuration asks for it."""
        parts = self.parts
        step, folder = parts.state.step, parts.folder

        def look() -> bool:
            no_grid = bool(parts.config.sample_grid.prompts) and not folder.grid(step).exists()
            no_losses = step > 0 and parts.validation is not None and not has(folder.metrics, step, VALIDATED)
            return no_grid or no_losses or (self._evaluates() and not has(folder.metrics, step, EVALUATED))

        return broadcast_from_main(look)

    def measure(self, between: Callable[[], None]) -> None:
        """Validation losses, the sample grid and suites of this step. Before the first step there is only the grid.

        between: called on all ranks together before each part of the work. What it raises ends the measurement.
        """
        with self.parts.clock.pause():
            if self.parts.validation is not None and self.parts.state.step:
                self._validation(self.parts.validation, between)
            if self.parts.config.sample_grid.prompts:
                self._grid(between)
            if self._evaluates():
                self._suites(between)

    def _evaluates(self) -> bool:
        """Whether suites run at this step."""
        step, every = self.parts.state.step, self.parts.config.eval.every
        return every > 0 and step > 0 and (step % every == 0 or step == self.parts.config.train.steps)

    def _suites(self, between: Callable[[], None]) -> None:
        """Each rank does the same, so that all make the same forwards. The main process keeps what is found."""
        parts, chosen, figures = self.parts, self._suites_chosen, dict[str, float]()
        with ExitStack() as stack:
            stack.enter_context(heard_by(self._doing))
            # Evidence of the other ranks would be written over that of the main process.
            out = parts.folder.path if parts.here.is_main else Path(stack.enter_context(TemporaryDirectory()))
            module = stack.enter_context(parts.engine.evaluation(self._best_weights()))
            pipeline = Pipeline(module, parts.tokenizer, parts.config, parts.engine.device, parts.codec)
            for _, found in measured(pipeline, chosen, out, all_must=bool(parts.config.eval.suites)):
                figures |= {name: metric.value for name, metric in found.items()}
                between()
        raise_together(lambda: self._record.figures(parts.state.step, figures) if self._record else None)

    def _validation(self, loader: EvaluationLoader, between: Callable[[], None]) -> None:
        parts, step = self.parts, self.parts.state.step

        def on_batch(number: int) -> None:
            self._doing(f"validation {number}/{len(loader)}")
            between()

        with parts.engine.evaluation(self._best_weights()) as module:
            terms = list(
                validation_losses(module, loader, parts.config, parts.engine.device, parts.codec, on_batch)
            )
            found = MeanLosses.over_ranks(terms, parts.engine.loss).means
        raise_together(lambda: self._record.validation(step, found) if self._record else None)

    def _grid(self, between: Callable[[], None]) -> None:
        """The fixed-seed images, each rank drawing its share with the same number of forwards."""
        parts, sample = self.parts, self.parts.config.sample_grid

        def on_call(done: int, calls: int) -> None:
            self._doing(f"sample grid {done}/{calls}")
            between()

        with parts.engine.evaluation(self._best_weights()) as module:
            pipeline = Pipeline(module, parts.tokenizer, parts.config, parts.engine.device, parts.codec)
            mine = pipeline.sample_grid(
                sample, rank=parts.here.rank, ranks=parts.here.world_size, on_call=on_call
            )
            images = [image for part in gather(mine) for image in part]
        images.sort(key=lambda image: image.seed)

        def write(path: Path) -> None:
            write_grid(images, path, sample)

        raise_together(lambda: self._record.grid(parts.state.step, write) if self._record else None)

    def quarantine(self) -> None:
        """One line for each sample left out so far, by the index or by any rank at run time."""
        parts = self.parts
        # What the index left out is the same on every rank.
        indexed = sum(len(index.faults) for index in parts.loader.indexes)
        mine = parts.loader.faults() if parts.engine.sequence.rank == 0 else []
        found = gather(mine if parts.here.is_main else mine[indexed:])
        faults = [fault for part in found for fault in part]
        raise_together(lambda: parts.folder.add_to_quarantine(faults) if parts.here.is_main else None)

    def _doing(self, what: str) -> None:
        """Note and show what is done beside training."""
        self.parts.watchdog.note(what, self.parts.state.step)
        if self._record:
            self._record.progress.alive(self.parts.state.step, doing=what)

    def _metrics(self, result: StepResult, losses: MeanLosses) -> StepMetrics:
        parts, state, config = self.parts, self.parts.state, self.parts.config
        interval = parts.clock.interval()
        utilization = parts.operation_meter.utilization(
            losses.extra_sums, interval.seconds, parts.here.world_size
        )
        return StepMetrics(
            step=state.step,
            loss=losses.total,
            losses=losses.means,
            series=losses.series,
            gradient_norm=result.gradient_norm,
            gradient_norms=result.module_norms,
            learning_rate=learning_rate(state.step - 1, config.optimizer, config.train.steps),
            skipped=state.skipped_steps,
            roll_backs=state.roll_backs,
            faults=state.faults,
            tokens=state.tokens,
            images=state.images,
            tokens_per_second=interval.tokens_per_second,
            data_wait=interval.shares.get("data", 0.0),
            flops=losses.extra_sums[0],
            **asdict(utilization),
            memory_gib=peak_gib(parts.engine.device),
        )

    def _best_weights(self) -> Weights:
        return "ema" if self.parts.engine.averages else "raw"
