"""What becomes of bad steps: they are skipped, and after too many in a row the last good checkpoint comes back."""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from typing import NamedTuple

from transfusion.checkpoint.resume import load, newest_good
from transfusion.errors import UserError
from transfusion.observe.losses import MeanLosses
from transfusion.optim.schedule import learning_rate
from transfusion.parallel.collectives import broadcast_from_main
from transfusion.parallel.step_result import PendingResult
from transfusion.schema import LossTerms, StepResult
from transfusion.training.parts import RunParts

log = logging.getLogger(__name__)

# A median of fewer steps says little.
MIN_STEPS = 16


class Limits(NamedTuple):
    """The greatest loss and gradient norm of a step that is still taken."""

    loss: float
    norm: float


class SpikeDetector:
    """Limits of the next step: `factor` times the running medians of the newest `window` good steps.

    Medians, since a mean would be moved by the very spikes it is to find. Every rank sees the same figures, so
    all judge alike. `recent` is kept up to date in place and is part of the run's state: a resumed run judges
    as the one that was not interrupted.
    """

    def __init__(self, factor: float, window: int, recent: list[list[float]]) -> None:
        """factor: 0 looks for nothing. recent: loss and gradient norm of former good steps, oldest first."""
        self.on = factor > 0
        self._factor, self._window, self._recent = factor, window, recent

    def limits(self) -> Limits:
        """Infinite until there are enough good steps to compare with."""
        if not self.on or len(self._recent) < min(MIN_STEPS, self._window):
            return Limits(math.inf, math.inf)
        losses, norms = zip(*self._recent, strict=True)
        # With frozen text, steps of text alone have no gradient.
        found = [norm for norm in norms if norm] or [math.inf]
        return Limits(self._factor * statistics.median(losses), self._factor * statistics.median(found))

    def note(self, loss: float, norm: float) -> None:
        """One more good step."""
        self._recent.append([loss, norm])
        del self._recent[: -self._window]


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
