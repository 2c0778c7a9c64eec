"""What becomes of bad steps: they are skipped, and after too many in a row the last good checkpoint comes back."""

from __future__ import annotations

import logging
import math
from collections import deque

from transfusion.checkpoint.resume import load, newest_good
from transfusion.errors import UserError
from transfusion.observe.losses import MeanLosses
from transfusion.optim.schedule import learning_rate
from transfusion.parallel.collectives import broadcast_from_main
from transfusion.parallel.step_result import PendingResult
from transfusion.schema import LossTerms, StepResult
from transfusion.training.parts import RunParts
from transfusion.training.spikes import SpikeDetector

log = logging.getLogger(__name__)


class Recovery:
    """Steps the optimiser and follows what the steps come to. Called by all ranks together."""

    def __init__(self, parts: RunParts) -> None:
        self.parts = parts
        train = parts.config.train
        self.spikes = SpikeDetector(train.spike_factor, train.spike_window, parts.state.recent)
        # What steps came to is read so many steps late: a GPU has work to do while the host reads.
        self.steps_late = 1 if parts.here.device.type == "cuda" else 0
        self._unread: deque[PendingResult] = deque()

    def update(self, terms: list[LossTerms]) -> None:
        """Step the optimiser, unless the loss or the gradient norm stands out and such steps are to be skipped.

        Looking for what stands out reads loss and norm at once: a GPU then waits for the host in every step.
        """
        config, engine, number = self.parts.config, self.parts.engine, self.parts.state.step + 1
        rate = learning_rate(number - 1, config.optimizer, config.train.steps)
        norms = config.log.gradient_norms and number % config.log.every == 0
        if not self.spikes.on:
            self._unread.append(engine.step(rate, module_norms=norms))
            return
        # The same on all ranks, so all judge alike.
        loss, limits = MeanLosses.over_ranks(terms, engine.loss).total, self.spikes.limits()
        largest = -math.inf if loss > limits.loss else limits.norm
        pending = engine.step(rate, max_norm=largest, module_norms=norms)
        self._unread.append(pending)
        result = pending.read()
        if result.skipped:
            log.warning(
                "step %d skipped: loss %.4f (limit %.4f), gradient norm %.4f (limit %.4f)",
                number, loss, limits.loss, result.gradient_norm, limits.norm,
            )  # fmt: skip
        else:
            self.spikes.note(loss, result.gradient_norm)

    def read(self, *, all_steps: bool) -> StepResult | None:
        """Read what steps came to, and bring a checkpoint back where they went wrong.

        all_steps: also those whose results a GPU may still be computing. Returns the newest that was read.
        """
        result, state = None, self.parts.state
        while len(self._unread) > (0 if all_steps else self.steps_late):
            result = self._unread.popleft().read()
            state.skipped_steps += int(result.skipped)
            state.bad_steps = state.bad_steps + 1 if result.skipped else 0
            if state.bad_steps and self._must_roll_back():
                self._roll_back()
        return result

    def _must_roll_back(self) -> bool:
        """Whether so many steps in a row were skipped that the weights themselves are no longer trusted.

        Raises UserError where a checkpoint was brought back already, and not one step has been good since.
        """
        after, bad = self.parts.config.train.rollback_after_skipped, self.parts.state.bad_steps
        if after and bad >= 2 * after:
            last = self.parts.state.step - len(self._unread)
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
        parts = self.parts
        parts.watchdog.note("bringing back a checkpoint", parts.state.step)
        parts.saver.finish()
        with parts.clock.pause():
            folder = broadcast_from_main(lambda: newest_good(parts.folder.path))
            former = load(folder, parts.engine)
        parts.state.roll_backs += 1
        log.warning(
            "%d steps in a row were skipped: weights and optimiser are those of step %d again; the data go on",
            parts.state.bad_steps,
            former.step,
        )
