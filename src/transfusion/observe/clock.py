"""Where the time goes: named spans, pauses that count for nothing, tokens a second, the time left, and a limit."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

# Steps whose time tells how long the coming ones take.
ETA_WINDOW = 50
# Of a time limit: kept for the first save of a start, which nobody has timed yet.
SHARE_OF_FIRST_SAVE = 0.05


@dataclass(frozen=True)
class Interval:
    """The time between two log lines, pauses left out. shares: of `seconds`, by the name of the span."""

    seconds: float
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
        self._interval_start = 0.0
        self._interval_tokens = 0
        self._interval_spans: defaultdict[str, float] = defaultdict(float)
        self._step_times: deque[float] = deque([0.0], maxlen=ETA_WINDOW + 1)

    @property
    def steps(self) -> int:
        """Steps of this start, counted up to fifty."""
        return len(self._step_times) - 1

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
            self._interval_spans[name] += self.active_seconds - begin

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
        self._interval_tokens += tokens
        self._step_times.append(self.active_seconds)

    def interval(self) -> Interval:
        """Figures since the last call, and a new interval."""
        end = self.active_seconds
        seconds = end - self._interval_start
        interval = Interval(
            seconds=seconds,
            tokens_per_second=self._interval_tokens / seconds if seconds > 0 else None,
            shares={
                name: time / seconds if seconds > 0 else 0.0 for name, time in self._interval_spans.items()
            },
        )
        self._interval_start, self._interval_tokens = end, 0
        self._interval_spans = defaultdict(float)
        return interval

    def seconds_left(self, steps_left: int) -> float | None:
        """Seconds until `steps_left` more steps are done; None before the first step of this start.

        Pauses are expected to go on taking the part of the time that they took so far.
        """
        if self.steps < 1:
            return None
        seconds_per_step = (self._step_times[-1] - self._step_times[0]) / self.steps
        active = self.active_seconds
        with_pauses = 1.0 + self._paused / active if active > 0 else 1.0
        return max(0, steps_left) * seconds_per_step * with_pauses


class TimeLimit:
    """Tells when a run must save and stop, so that it has ended before `minutes` are over; 0: never.

    Kept free for the end: twice the longest of the newest steps and the longest save so far.
    """

    def __init__(self, minutes: float, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._limit = 60.0 * minutes
        self._start = self._step_start = now()
        self._save_start = 0.0
        # Longest so far; None before the first.
        self._save: float | None = None
        self._steps: deque[float] = deque([0.0], maxlen=ETA_WINDOW)

    def step_begins(self) -> None:
        self._step_start = self._now()

    def step_ends(self) -> None:
        self._steps.append(self._now() - self._step_start)

    def save_begins(self) -> None:
        self._save_start = self._now()

    def save_ends(self) -> None:
        """Published, whatever was trained meanwhile."""
        self._save = max(self._save or 0.0, self._now() - self._save_start)

    @property
    def reached(self) -> bool:
        """Whether another step might be one too many."""
        save = SHARE_OF_FIRST_SAVE * self._limit if self._save is None else self._save
        reserve = 2.0 * (max(self._steps) + save)
        return self._limit > 0 and self._now() - self._start + reserve >= self._limit
