"""Where the time goes: named spans, pauses that count for nothing, tokens a second, and the time left."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

# Steps whose time tells how long the coming ones take.
ETA_WINDOW = 50


@dataclass(frozen=True)
class Lap:
    """The time between two log lines, pauses left out. shares: of `seconds`, by the name of the span."""

    seconds: float
    steps: int
    tokens_per_second: float | None
    shares: dict[str, float]


class Clock:
    """Host time of a training run; where the device runs behind, read it right after values were fetched.

    Nothing is carried over from an earlier start of the run: the time left is told from steps of this start
    only, since the machine may be another one.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._start = now()
        self._paused = 0.0
        self._pause_depth = 0
        self._lap_start = 0.0
        self._lap_steps = 0
        self._lap_tokens = 0
        self._lap_spans: defaultdict[str, float] = defaultdict(float)
        self._step_times: deque[float] = deque([0.0], maxlen=ETA_WINDOW + 1)

    @property
    def active_seconds(self) -> float:
        """Seconds since the start, pauses left out."""
        return self._now() - self._start - self._paused

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Count the time inside under `name`, in the lap that runs; a pause inside is left out."""
        begin = self.active_seconds
        try:
            yield
        finally:
            self._lap_spans[name] += self.active_seconds - begin

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the time inside out of every figure but the time left: evaluation, checkpoints, samples."""
        begin = self._now()
        self._pause_depth += 1
        try:
            yield
        finally:
            self._pause_depth -= 1
            if self._pause_depth == 0:
                self._paused += self._now() - begin

    def step_done(self, tokens: int) -> None:
        """Note the end of a step over `tokens` tokens of all ranks."""
        self._lap_steps += 1
        self._lap_tokens += tokens
        self._step_times.append(self.active_seconds)

    def lap(self) -> Lap:
        """Figures since the last call, and a new lap."""
        end = self.active_seconds
        seconds = end - self._lap_start
        lap = Lap(
            seconds=seconds,
            steps=self._lap_steps,
            tokens_per_second=self._lap_tokens / seconds if seconds > 0 else None,
            shares={name: time / seconds if seconds > 0 else 0.0 for name, time in self._lap_spans.items()},
        )
        self._lap_start, self._lap_steps, self._lap_tokens = end, 0, 0
        self._lap_spans = defaultdict(float)
        return lap

    def seconds_left(self, steps_left: int) -> float | None:
        """Seconds until `steps_left` more steps are done; None before the first step of this start.

        Pauses are expected to go on taking the part of the time that they took so far.
        """
        steps = len(self._step_times) - 1
        if steps < 1:
            return None
        seconds_per_step = (self._step_times[-1] - self._step_times[0]) / steps
        active = self.active_seconds
        with_pauses = 1.0 + self._paused / active if active > 0 else 1.0
        return max(0, steps_left) * seconds_per_step * with_pauses
