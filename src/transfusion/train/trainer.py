"""The only training loop: `train` sets a run up, `Trainer.run` loops, `Trainer.train_step` is one step."""

from __future__ import annotations

import logging
import math
import sys
from collections import deque
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path

from transfusion.checkpoint.llama import start_from_llama
from transfusion.checkpoint.resume import load, newest_good, resume
from transfusion.checkpoint.save import Saver
from transfusion.codec import open_any_codec
from transfusion.config import Config
from transfusion.data.index.source_index import too_many_faults
from transfusion.data.loading.loader import Loader
from transfusion.data.loading.validation import EvaluationLoader
from transfusion.errors import EXIT_STOPPED_EARLY, UserError
from transfusion.evaluate.held_out import held_out_losses
from transfusion.generate.pictures import write_grid
from transfusion.generate.pipeline import Pipeline
from transfusion.observe.clock import Clock, TimeLimit
from transfusion.observe.losses import MeanLosses
from transfusion.observe.memory import peak_gib
from transfusion.observe.metrics import StepMetrics
from transfusion.observe.profiling import profiled
from transfusion.observe.record import Record
from transfusion.observe.runfolder import RunFolder, start_logging
from transfusion.observe.sinks import refuse_missing_sink
from transfusion.observe.utilisation import Utilisation
from transfusion.optim.schedule import learning_rate
from transfusion.parallel import environment
from transfusion.parallel.build import build_engine
from transfusion.parallel.collectives import Signals, agree, from_main, gather, together
from transfusion.parallel.counts import global_counts
from transfusion.parallel.engine import Engine, Weights
from transfusion.parallel.environment import Environment
from transfusion.parallel.step_result import PendingResult
from transfusion.schema import Batch, Decision, LossTerms, StepResult, TrainState
from transfusion.sequence.tokenizer import Tokenizer
from transfusion.train.out_of_memory import is_out_of_memory, out_of_memory, remember_allocations
from transfusion.train.spikes import SpikeDetector
from transfusion.train.watchdog import LOADER, Watchdog

log = logging.getLogger(__name__)

# The conventional "try again" of sysexits.h: stopped early, everything saved, run the same command again.


def train(config: Config) -> int:
    """Train `config` to its last step, going on from the newest checkpoint of its run folder.

    Returns the exit code: 0 when done, 75 when a signal stopped the run after saving. Raises UserError.
    """
    here = environment.start(config.train.threads)
    try:
        return Trainer(config, here).run()
    finally:
        environment.stop()


class Trainer:
    """One run on this process: engine, data, and the state that a checkpoint carries."""

    def __init__(self, config: Config, here: Environment) -> None:
        """Called by all ranks together; what one of them refuses, all refuse, and then nothing is written."""
        self.here = here
        self.limit = TimeLimit(config.train.time_limit_minutes)
        self.folder = RunFolder(Path(config.run.folder))
        start_logging(None, rank=here.rank)
        # A run that is under way must not be read either: its checkpoints come and go.
        self.lock = together(lambda: self.folder.lock_existing() if here.is_main else None)
        self.tokenizer = together(lambda: Tokenizer(config.data.tokenizer))
        self.config = config.with_vocabulary(self.tokenizer.vocabulary)
        together(self._check)
        # Frozen and whole on every rank, outside of what the engine shards and trains.
        self.codec = together(lambda: open_any_codec(config.codec, here.device))
        self.engine: Engine = build_engine(self.config, here, self.codec)
        self.state = resume(self.folder.path, self.engine) or self._begin()
        self.loader = together(self._open_loader)
        self.held_out = together(self._open_held_out) if config.data.held_out else None
        together(self._create_folder)
        self.saver = Saver(
            self.folder.path,
            self.engine,
            keep=config.checkpoint.keep,
            keep_every=config.checkpoint.keep_every,
        )
        self.watchdog = Watchdog(
            self.folder.stalls,
            here.rank,
            seconds=config.train.stall_seconds,
            exit_seconds=self._patience(),
            samples=self.loader.samples,
        )
        self.spikes = SpikeDetector(config.train.spike_factor, config.train.spike_window, self.state.recent)
        self.utilisation = Utilisation(self.config, here.device)
        self.clock = Clock()
        # Loss sums of the steps since the last line of metrics.
        self.pending: list[LossTerms] = []
        # Images of this rank in the steps that are pending.
        self.images_pending = 0
        # What steps came to is read so many steps late: a GPU has work to do while the host reads.
        self.steps_late = 1 if here.device.type == "cuda" else 0
        self.unread: deque[PendingResult] = deque()

    def run(self) -> int:
        """Steps until the last one or until asked to stop; saves on the way. Returns the exit code."""
        try:
            return self._run()
        except UserError:
            # On all ranks together, as all errors for users are: what is half saved can still be saved.
            with suppress(UserError):
                self.saver.finish()
            raise
        except Exception as error:
            # Of this rank alone: no collective from here on.
            self.watchdog.died(error)
            if not is_out_of_memory(error):
                raise
            place = {"rank": self.here.rank, "world_size": self.here.world_size, "step": self.state.step + 1}
            raise out_of_memory(error, self.config, self.folder.memory, **place) from error

    def _run(self) -> int:
        steps = self.config.train.steps
        if self.state.step >= steps:
            log.info("already at step %d of %d: nothing to do", self.state.step, steps)
            return 0
        self._announce()
        with ExitStack() as stack:
            stack.enter_context(self.loader)
            signals = stack.enter_context(Signals())
            stack.enter_context(self.watchdog)
            record = together(lambda: stack.enter_context(self._record()) if self.here.is_main else None)
            if self.state.step == 0:
                self._draw_grid(record)
            while self.state.step < steps:
                self._profiled_step()
                decision = self._agree(max(signals.take(), self._time_is_up()))
                at_end = self.state.step == steps
                saves = (
                    at_end or decision >= Decision.SAVE or self.state.step % self.config.checkpoint.every == 0
                )
                logs = saves or self.state.step % self.config.log.every == 0
                result = self._settle(0 if logs else self.steps_late)
                if saves:
                    self.limit.save_begins()
                if logs and result is not None:
                    self._log(record, result, held_out=saves)
                if saves:
                    self._save(record)
                if decision == Decision.SAVE_AND_STOP and not at_end:
                    self.saver.finish()
                    log.warning(
                        "stopped at step %d after saving; the same command continues", self.state.step
                    )
                    return EXIT_STOPPED_EARLY
            self.saver.finish()
        log.info("done: step %d of %d", self.state.step, steps)
        return 0

    def _profiled_step(self) -> None:
        """`train_step`, timed, and in the steps of log.profile_steps traced."""
        step = self.state.step + 1
        trace = self.folder.trace(step, self.here.rank) if step in self.config.log.profile_steps else None
        self.limit.step_begins()
        with profiled(trace) as write:
            self.unread.append(self.train_step())
        self.limit.step_ends()
        if trace is not None:
            together(write)
            log.info("trace of step %d: %s", step, trace)

    def train_step(self) -> PendingResult:
        """One optimiser step over this rank's micro-batches of the next global batch."""
        # The first step compiles, and may take one rank longer than another.
        alike = self.clock.steps > 0
        self.watchdog.note(LOADER, self.state.step, alike=alike)
        with self.clock.span("data"):
            # Together: the loader processes of a single rank may have died.
            batches = [
                self.engine.sequence.share(batch).to(self.engine.device)
                for batch in together(self._next_step)
            ]
        self.watchdog.note("forward and backward", self.state.step, alike=alike)
        counts = global_counts(batches, self.config.codec)
        terms = [self.engine.forward_backward(batch, counts) for batch in batches]
        self.pending += terms
        self.images_pending += sum(batch.counts.images for batch in batches)
        self.watchdog.note("optimiser step", self.state.step, alike=alike)
        result = self._update(terms)
        tokens = self.config.data.rows * self.config.data.row_length
        self.clock.step_done(tokens)
        self.state.step += 1
        self.state.tokens += tokens
        self.state.data = self.loader.state()
        return result

    def _next_step(self) -> list[Batch]:
        """This rank's micro-batches, on the host, where they are counted."""
        batches = self.loader.next_step()
        self.utilisation.note(batches)
        return batches

    def _settle(self, left: int) -> StepResult | None:
        """Read what steps came to, all but the newest `left`, and bring a checkpoint back where they went wrong.

        Returns the newest that was read.
        """
        result = None
        while len(self.unread) > left:
            result = self.unread.popleft().read()
            self.state.skipped_steps += int(result.skipped)
            self.state.bad_steps = self.state.bad_steps + 1 if result.skipped else 0
            if self.state.bad_steps and self._must_roll_back():
                self._roll_back()
        return result

    def _update(self, terms: list[LossTerms]) -> PendingResult:
        """Step the optimiser, unless the loss or the gradient norm stands out and such steps are to be skipped.

        Looking for what stands out reads loss and norm at once: a GPU then waits for the host in every step.
        """
        rate = learning_rate(self.state.step, self.config.optimizer, self.config.train.steps)
        logged = (self.state.step + 1) % self.config.log.every == 0
        norms = logged and self.config.log.gradient_norms
        if not self.spikes.on:
            return self.engine.step(rate, module_norms=norms)
        # The same on all ranks, so all judge alike.
        loss, limits = MeanLosses.over_ranks(terms, self.config).total, self.spikes.limits()
        largest = -math.inf if loss > limits.loss else limits.norm
        pending = self.engine.step(rate, largest_norm=largest, module_norms=norms)
        result = pending.read()
        if result.skipped:
            log.warning(
                "step %d skipped: loss %.4f (limit %.4f), gradient norm %.4f (limit %.4f)",
                self.state.step + 1, loss, limits.loss, result.gradient_norm, limits.norm,
            )  # fmt: skip
        else:
            self.spikes.note(loss, result.gradient_norm)
        return pending

    def _must_roll_back(self) -> bool:
        """Whether so many steps in a row were skipped that the weights themselves are no longer trusted.

        Raises UserError where a checkpoint was brought back already, and not one step has been good since.
        """
        after, bad = self.config.train.roll_back_after, self.state.bad_steps
        if after and bad >= 2 * after:
            last = self.state.step - len(self.unread)
            raise UserError(
                f"steps {last - bad + 1} to {last} were all skipped, half of them after the"
                " last good checkpoint had been brought back; lower optimizer.learning_rate, look at the data of"
                " these steps, or delete the newest checkpoints to go on from an older one"
            )
        return after > 0 and bad == after

    def _roll_back(self) -> None:
        """Bring back weights and optimiser of the newest checkpoint whose steps went well.

        Step, schedule and data go on: what led here is left behind, and is not read again.
        """
        self.watchdog.note("bringing back a checkpoint", self.state.step)
        self.saver.finish()
        with self.clock.pause():
            folder = from_main(lambda: newest_good(self.folder.path))
            former = load(folder, self.engine)
        self.state.roll_backs += 1
        log.warning(
            "%d steps in a row were skipped: weights and optimiser are those of step %d again; the data go on",
            self.state.bad_steps,
            former.step,
        )

    def _begin(self) -> TrainState:
        """The state of a new run; its weights are drawn, or those of a Llama."""
        if self.config.train.init_from:
            start_from_llama(Path(self.config.train.init_from), self.engine, self.tokenizer)
        return TrainState()

    def _record(self) -> Record:
        return Record(self.config, self.folder, self.state.step)

    def _time_is_up(self) -> Decision:
        return Decision.SAVE_AND_STOP if self.limit.reached else Decision.CONTINUE

    def _patience(self) -> float:
        """Seconds after which a rank that waits for another ends; a rank may itself wait for its downloads."""
        seconds, cache = self.config.train.stall_exit_seconds, self.config.data.cache
        if not seconds or self.loader.fetching is None:
            return seconds
        return seconds + cache.attempts * cache.timeout + cache.pause * (2 ** (cache.attempts - 1) - 1)

    def _check(self) -> None:
        """What can be refused at once, before anything large is built. Raises UserError."""
        if self.here.is_main:
            self.folder.refuse_other_tokenizer(self.tokenizer.path)
            refuse_missing_sink(self.config)
        if self.config.log.memory_history:
            remember_allocations(self.here.device)

    def _open_loader(self) -> Loader:
        state = self.state.data or None
        sequence = self.engine.sequence
        ranks = {"rank": sequence.data_rank, "world_size": sequence.data_world_size}
        return Loader(self.config, self.config.data.sources, self.tokenizer, state=state, **ranks)

    def _open_held_out(self) -> EvaluationLoader:
        ranks = {"rank": self.here.rank, "world_size": self.here.world_size}
        return EvaluationLoader(self.config, self.config.data.held_out, self.tokenizer, **ranks)

    def _create_folder(self) -> None:
        """The first thing that a start writes, once nothing is left that could refuse it."""
        if self.here.is_main:
            self.lock = self.lock or self.folder.lock()
            self.folder.create(self.config, arguments=sys.argv)
            self.folder.keep_tokenizer(self.tokenizer.path)
            self.folder.keep_codec(self.config.codec)
            start_logging(self.folder)

    def _agree(self, mine: Decision) -> Decision:
        """What all ranks do next, how many samples of the step could not be read, and whether all have written the
        save under way, in one collective.

        Raises UserError, on all ranks together, once the run had more bad samples than data.max_faults.
        """
        self.watchdog.note("agreement of all ranks", self.state.step, alike=self.clock.steps > 1)
        # What several ranks read together counts once.
        reading = self.loader.reading if self.engine.sequence.rank == 0 else (0, 0)
        decision, (faults, samples, written) = agree(mine, *reading, int(self.saver.written))
        self.state.faults += faults
        self.state.samples += samples
        if written == self.here.world_size:
            self.saver.finish()
            self.limit.save_ends()
        if too_many_faults(self.state.faults, self.state.samples, self.config.data.max_faults):
            self._write_quarantine()
            complaint = self.loader.complaint()
            raise UserError(
                f"{self.state.faults} of {self.state.samples} samples could not be read, more than "
                f"data.max_faults ({self.config.data.max_faults}); {self.folder.quarantine} names them: "
                "mend the shards, or raise it" + (f" ({complaint})" if complaint else "")
            )
        return decision

    def _log(self, record: Record | None, result: StepResult, *, held_out: bool) -> None:
        """Sum the losses over steps and ranks (all ranks together) and write a line (the main process)."""
        self.watchdog.note("held-out losses and metrics", self.state.step)
        losses = MeanLosses.over_ranks(
            self.pending, self.config, self.utilisation.take(), images=self.images_pending
        )
        self.pending, self.images_pending = [], 0
        self.state.images += losses.images
        judged = self._held_out_losses() if held_out else None
        line = self._metrics(result, losses, judged)
        seconds_left = self.clock.seconds_left(self.config.train.steps - self.state.step)
        together(lambda: record.write(line, seconds_left=seconds_left) if record else None)

    def _metrics(self, result: StepResult, losses: MeanLosses, judged: MeanLosses | None) -> StepMetrics:
        lap = self.clock.lap()
        shares = self.utilisation.shares(losses.also, lap.seconds, self.here.world_size)
        return StepMetrics(
            step=self.state.step,
            loss=losses.total,
            text_loss=losses.text,
            image_loss=losses.image,
            image_loss_by_timestep=losses.image_by_timestep,
            gradient_norm=result.gradient_norm,
            gradient_norms=result.module_norms,
            learning_rate=learning_rate(self.state.step - 1, self.config.optimizer, self.config.train.steps),
            skipped=self.state.skipped_steps,
            roll_backs=self.state.roll_backs,
            faults=self.state.faults,
            tokens=self.state.tokens,
            images=self.state.images,
            tokens_per_second=lap.tokens_per_second,
            data_wait=lap.shares.get("data", 0.0),
            **asdict(shares),
            memory_gib=peak_gib(self.engine.device),
            held_out_text_loss=judged.text if judged else None,
            held_out_image_loss=judged.image if judged else None,
        )

    def _held_out_losses(self) -> MeanLosses | None:
        if self.held_out is None:
            return None
        with self.clock.pause(), self.engine.evaluation(self._best_weights()) as module:
            terms = held_out_losses(module, self.held_out, self.config, self.engine.device, self.codec)
            return MeanLosses.over_ranks([terms], self.config)

    def _best_weights(self) -> Weights:
        return "ema" if self.engine.averages else "raw"

    def _save(self, record: Record | None) -> None:
        self._draw_grid(record)
        self.watchdog.note("saving", self.state.step)
        with self.clock.pause():
            self._write_quarantine()
            self.saver.begin(self.state, copy=self.config.checkpoint.asynchronous)
            if not self.config.checkpoint.asynchronous:
                self.saver.finish()
                self.limit.save_ends()

    def _draw_grid(self, record: Record | None) -> None:
        """The fixed-seed pictures, each rank drawing its share with the same number of forwards."""
        if not self.config.sample.prompts:
            return
        self.watchdog.note("drawing the sample grid", self.state.step)
        with self.clock.pause(), self.engine.evaluation(self._best_weights()) as module:
            pipeline = Pipeline(module, self.tokenizer, self.config, self.engine.device, self.codec)
            mine = pipeline.sample_grid(self.config.sample, rank=self.here.rank, ranks=self.here.world_size)
            pictures = [picture for part in gather(mine) for picture in part]
        pictures.sort(key=lambda picture: picture.seed)

        def write(path: Path) -> None:
            write_grid(pictures, path, self.config.sample)

        together(lambda: record.grid(self.state.step, write) if record else None)

    def _announce(self) -> None:
        log.info(
            "%s: %d process(es) on %s, step %d to %d, run folder %s",
            self.config.run.name,
            self.here.world_size,
            self.engine.device.type,
            self.state.step,
            self.config.train.steps,
            self.folder.path,
        )
        for warning in self.config.warnings() if self.here.is_main else ():
            log.warning("%s", warning)
        if faults := self.loader.counters()["faults"]:
            log.warning("samples left out, by reason: %s; see %s", faults, self.folder.quarantine)
        self._write_quarantine()

    def _write_quarantine(self) -> None:
        """One line for each sample left out so far, by the index or by any rank at run time."""
        # What the index left out is the same on every rank.
        indexed = sum(len(index.faults) for index in self.loader.indexes)
        mine = self.loader.faults() if self.engine.sequence.rank == 0 else []
        parts = gather(mine if self.here.is_main else mine[indexed:])
        faults = [fault for part in parts for fault in part]
        together(lambda: self.folder.add_to_quarantine(faults) if self.here.is_main else None)
