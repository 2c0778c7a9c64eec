"""Losses and gradient norms that stand out from those of the steps before."""

from __future__ import annotations

import math
import statistics
from typing import NamedTuple

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
        return Limits(self._factor * statistics.median(losses), self._factor * statistics.median(norms))

    def note(self, loss: float, norm: float) -> None:
        """One more good step."""
        self._recent.append([loss, norm])
        del self._recent[: -self._window]
