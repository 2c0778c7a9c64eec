"""The only training loop: `train` sets a run up, `Trainer.run` loops, `Trainer.train_step` is one step."""

from __future__ import annotations

import logging
from contextlib import ExitStack, suppress

from transfusion.config import Config
from transfusion.data.index.source_index import too_many_faults
from transfusion.errors import EXIT_STOPPED_EARLY, UserError
from transfusion.observe.profiling import profiled
from transfusion.parallel import environment
from transfusion.parallel.collectives import Signals, global_counts, raise_together, reduce_decision
from transfusion.parallel.environment import Environment
from transfusion.schema import Batch, Decision
from transfusion.training.out_of_memory import is_out_of_memory, out_of_memory
from transfusion.training.parts import RunParts
from transfusion.training.recovery import Recovery
from transfusion.training.reporting import Reporter
from transfusion.training.watchdog import LOADER

log = logging.getLogger(__name__)


def train(config: Config) -> int:
    """Train to the last step, from the newest checkpoint of the run folder if there is one.

    Every process of the run calls this in its main thread, and learns its rank from its launcher's variables.

    Args:
        config: The run, as `load_config` gives it.

    Returns:
        The exit code. 0 when done, 75 when a signal or `train.time_limit_minutes` stopped the run after a save.

    Raises:
        UserError: For what a user can fix, such as settings, data, or too little memory.
    """
    here = environment.start(config.train.threads)
    try:
        return Trainer(config, here).run()
    finally:
        environment.stop()


class _StopMeasuringError(Exception):
    """A stop was asked for amid validation losses or the sample grid."""


class Trainer:
    """One run on this process. What it consists of is in `parts`."""

    def __init__(self, config: Config, here: Environment) -> None:
        """Called by all ranks together. Raises UserError on all of them."""
        self.parts = parts = RunParts(config, here)
        self.config, self.here, self.folder, self.lock = parts.config, here, parts.folder, parts.lock
        self.engine, self.state = parts.engine, parts.state
        self.loader, self.saver = parts.loader, parts.saver
        self.clock, self.limit, self.watchdog = parts.clock, parts.limit, parts.watchdog
        self.recovery, self.reporter, self.signals = Recovery(parts), Reporter(parts), Signals()

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
            if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                reason = " ".join(str(error).split())[:300]
                raise UserError(
                    f"train.compile=true: torch cannot compile the network here ({reason}); install a C++ compiler"
                    " (apt-get install build-essential), or set train.compile=false"
                ) from error
            if not is_out_of_memory(error):
                raise
            place = {"rank": self.here.rank, "world_size": self.here.world_size, "step": self.state.step + 1}
            raise out_of_memory(error, self.config, self.folder.memory, **place) from error

    def _run(self) -> int:
        steps, state = self.config.train.steps, self.state
        # A former start may have been stopped after its save, before it had measured what belongs to that step.
        measures = self._is_measured(state.step) and self.reporter.is_unmeasured()
        if state.step >= steps and not measures:
            log.info("already at step %d of %d: nothing to do", state.step, steps)
            return 0
        self.reporter.announce()
        with ExitStack() as stack:
            stack.enter_context(self.loader)
            stack.enter_context(self.signals)
            stack.enter_context(self.watchdog)
            stack.enter_context(self.reporter)
            stopped = measures and not self._measure()
            while state.step < steps and not stopped:
                self._profiled_step()
                if self.clock.steps == 1:
                    self.reporter.warn_of_slowness()
                time_is_up = Decision.SAVE_AND_STOP if self.limit.reached else Decision.CONTINUE
                decision = self._agree(max(self.signals.take(), time_is_up))
                stopped = decision == Decision.SAVE_AND_STOP
                measures = self._is_measured(state.step)
                saves = measures or decision >= Decision.SAVE
                logs = saves or state.step % self.config.log.every == 0
                result = self.recovery.read(all_steps=logs)
                if not logs:
                    self.reporter.alive()
                if logs and result is not None:
                    self.reporter.line(result)
                if saves:
                    self._save()
                # Whoever asks for a stop may wait for seconds only.
                if measures:
                    stopped = stopped or not self._measure()
            self.saver.finish()
        if stopped:
            message = f"stopped at step {state.step} after saving; the same command continues"
            log.info("%s", message)
            environment.say_below_launcher(message)
            return EXIT_STOPPED_EARLY
        log.info("done: step %d of %d", state.step, steps)
        return 0

    def _is_measured(self, step: int) -> bool:
        """Whether this step is saved and measured in any case."""
        return step == self.config.train.steps or step % self.config.checkpoint.every == 0

    def _measure(self) -> bool:
        """Validation losses and the sample grid, after the save. Returns False where a stop was asked for meanwhile."""
        try:
            self.reporter.measure(self._go_on_measuring)
        except _StopMeasuringError:
            return False
        return True

    def _go_on_measuring(self) -> None:
        """Between two parts of a measurement, on all ranks: publish the save under way once all have written it.

        Raises _StopMeasuringError on all ranks once any is asked to stop.
        """
        stops = self.signals.stop or self.limit.reached
        mine = Decision.SAVE_AND_STOP if stops else Decision.CONTINUE
        decision, (written,) = reduce_decision(mine, int(self.saver.written))
        self._publish(written)
        if decision == Decision.SAVE_AND_STOP:
            raise _StopMeasuringError

    def _publish(self, written: int) -> None:
        """Finish the save under way once so many ranks have written it as there are."""
        if written == self.here.world_size:
            self.saver.finish()
            self.limit.save_ends()

    def _profiled_step(self) -> None:
        """`train_step`, timed, and in the steps of log.profile_steps traced."""
        step = self.state.step + 1
        trace = self.folder.trace(step, self.here.rank) if step in self.config.log.profile_steps else None
        self.limit.step_begins()
        with profiled(trace) as write:
            self.train_step()
        self.limit.step_ends()
        if trace is not None:
            raise_together(write)
            log.info("trace of step %d: %s", step, trace)

    def train_step(self) -> None:
        """One optimiser step over this rank's micro-batches of the next global batch."""
        engine, state = self.engine, self.state
        # The first step compiles, and may take one rank longer than another.
        alike = self.clock.steps > 0
        self.watchdog.note(LOADER, state.step, alike=alike)
        with self.clock.span("data"):
            # Together: the loader processes of a single rank may have died.
            batches = [
                engine.sequence.share(batch).to(engine.device) for batch in raise_together(self._next_step)
            ]
        self.watchdog.note("forward and backward", state.step, alike=alike)
        counts = global_counts(batches, engine.loss)
        terms = [engine.forward_backward(batch, counts) for batch in batches]
        self.reporter.note(batches, terms)
        self.watchdog.note("optimiser step", state.step, alike=alike)
        self.recovery.update(terms)
        tokens = self.config.data.global_batch_size * self.config.data.sequence_length
        self.clock.step_done(tokens)
        state.step += 1
        state.tokens += tokens
        state.data = self.loader.state()

    def _next_step(self) -> list[Batch]:
        """This rank's micro-batches, on the host, where they are counted."""
        batches = self.loader.next_step()
        self.parts.operation_meter.note(batches)
        return batches

    def _agree(self, mine: Decision) -> Decision:
        """What all ranks do next, how many samples of the step could not be read, and whether all have written the
        save under way, in one collective.

        Raises UserError, on all ranks together, once the run had more bad samples than data.max_bad_fraction.
        """
        state, most = self.state, self.config.data.max_bad_fraction
        self.watchdog.note("agreement of all ranks", state.step, alike=self.clock.steps > 1)
        # What several ranks read together counts once.
        reading = self.loader.reading if self.engine.sequence.rank == 0 else (0, 0)
        decision, (faults, samples, written) = reduce_decision(mine, *reading, int(self.saver.written))
        state.faults += faults
        state.samples += samples
        self._publish(written)
        if too_many_faults(state.faults, state.samples, most):
            self.reporter.quarantine()
            complaint = self.loader.complaint()
            raise UserError(
                f"{state.faults} of {state.samples} samples could not be read, more than "
                f"data.max_bad_fraction ({most}); {self.folder.quarantine} names them: "
                "fix the shards, or raise it" + (f" ({complaint})" if complaint else "")
            )
        return decision

    def _save(self) -> None:
        self.watchdog.note("saving", self.state.step)
        self.limit.save_begins()
        with self.clock.pause():
            self.reporter.quarantine()
            self.saver.begin(self.state, copy=self.config.checkpoint.asynchronous)
            if not self.config.checkpoint.asynchronous:
                self.saver.finish()
                self.limit.save_ends()
