"""What metrics.jsonl holds, by name, read on from where the last reading ended.

The rules are those of `observe.metrics`: of each name the last value of a step counts. Here a start that begins anew at
an earlier step also takes away what former starts wrote behind it, so that a curve has one past.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import secrets
import threading
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

# Points of a curve, about. A screen shows no more.
POINTS = 1200
# Seconds that the run took until a step, without the time between its starts.
ELAPSED = "elapsed"
_MAX_STEP = 1 << 53
_MAX_NAMES, _MAX_LIST = 200, 64
_DIGITS = 7
# No number of an earlier process of the board is taken for one of this.
_OURS = secrets.token_hex(4)
_editions = itertools.count()


@dataclass(slots=True)
class _Column:
    """One metric. Steps rise."""

    steps: array[int] = field(default_factory=lambda: array("q"))
    values: array[float] = field(default_factory=lambda: array("d"))

    def cut(self, place: int) -> bool:
        """Drop what stands from a place on. Whether there was any."""
        some = place < len(self.steps)
        del self.steps[place:], self.values[place:]
        return some

    def thinned(self, first: int, width: int) -> list[list[float]]:
        """The points from step `first` on, one for each `width` steps: [step, mean], or with low and high."""
        begin = bisect_left(self.steps, first)
        steps, values = np.array(self.steps[begin:]), np.array(self.values[begin:])
        if not len(steps):
            return []
        starts = np.flatnonzero(np.diff(steps // width, prepend=-1))
        counts = np.diff(starts, append=len(steps))
        means = np.add.reduceat(values, starts) / counts
        bounds = np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)
        middles = (np.add.reduceat(steps, starts) / counts).round(1)
        rows = np.stack([middles, *map(_short, (means, *bounds))], axis=1).tolist()
        return [row[:2] if count == 1 else row for row, count in zip(rows, counts.tolist(), strict=True)]


class Curves:
    """The curves of one run. Several threads may read them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._clear()

    def _clear(self) -> None:
        self._columns: dict[str, _Column] = {}
        # The first line, by which the file is known again.
        self._head, self._offset, self._edition = b"", 0, next(_editions)
        self._attempt: object = None
        # The newest step. A start that begins anew takes it back.
        self._last = 0
        self._time, self._elapsed = math.nan, 0.0
        self._broken, self._not_finite, self._lines = 0, 0, 0

    def read(self, path: Path, names: Sequence[str], cursor: str = "") -> dict[str, Any]:
        """What is new of some metrics since an answer with this cursor.

        A list of values, such as those by timestep, is called for by its name and told as `name.0`, `name.1` and so on.

        Returns:
            `points` by name, each [step, value], or [step, mean, low, high] where several steps make one point.
            `width`: steps that make one. `first`: points from this step on replace those that are known. `cursor`: for
            the next call. `names`: all that there are. `lines`, `broken`, `not_finite`: lines read, lines that hold no
            step, and steps whose loss is no number.

        Raises:
            OSError: For a file that cannot be read.
        """
        with self._lock:
            self._read_on(path)
            width = self._width()
            first = self._first(cursor, width)
            wanted = [name for name in self._columns if name in names or name.rpartition(".")[0] in names]
            return {
                "points": {name: self._columns[name].thinned(first, width) for name in wanted},
                "width": width,
                "first": first,
                "cursor": f"{_OURS}.{self._edition}.{width}.{self._last}",
                "names": list(dict.fromkeys(_family(name) for name in self._columns)),
                "lines": self._lines,
                "broken": self._broken,
                "not_finite": self._not_finite,
            }

    def _read_on(self, path: Path) -> None:
        """Take in the lines that are whole. One that is being written is left for the next time."""
        with path.open("rb") as file:
            # Another file under the same name, or one that was cut, is read from its beginning.
            if file.read(len(self._head)) != self._head or file.seek(0, os.SEEK_END) < self._offset:
                self._clear()
            file.seek(self._offset)
            for text in file:
                if not text.endswith(b"\n"):
                    break
                self._head = self._head or text
                self._offset += len(text)
                line = parse(text)
                if line is not None:
                    self._add(line)
                elif text.strip():
                    self._broken += 1

    def _add(self, line: dict[str, Any]) -> None:
        step, attempt = line["step"], line.get("attempt")
        time = number(line.get("time"))
        # Lines of a codec's training name no attempt.
        begins_anew = attempt != self._attempt or (attempt is None and step < self._last)
        if begins_anew and self._lines:
            self._forget_behind(step)
        elif time is not None and time > self._time:
            self._elapsed += time - self._time
        self._lines += 1
        self._attempt, self._time = attempt, math.nan if time is None else time
        if "loss" in line and number(line["loss"]) is None:
            self._not_finite += 1
        for name, value in _values(line):
            self._put(name, step, value)
        if time is not None and step >= self._last:
            self._put(ELAPSED, step, self._elapsed)
        self._last = max(self._last, step)

    def _put(self, name: str, step: int, value: float | None) -> None:
        if name not in self._columns:
            if value is None or len(self._columns) >= _MAX_NAMES:
                return
            self._columns[name] = _Column()
        column = self._columns[name]
        # Who has read the newest step reads it again anyway.
        if column.cut(bisect_left(column.steps, step)) and step < self._last:
            self._edition = next(_editions)
        if value is not None:
            column.steps.append(step)
            column.values.append(value)

    def _forget_behind(self, step: int) -> None:
        for column in self._columns.values():
            column.cut(bisect_right(column.steps, step))
        if step < self._last:
            self._last, self._edition = step, next(_editions)

    def _width(self) -> int:
        """Steps that make a point: a power of two, so that it rarely changes while the run grows."""
        begins = [column.steps[0] for column in self._columns.values() if column.steps]
        span = self._last - min(begins, default=0)
        return 1 << max(0, math.ceil(math.log2(max(1, span) / POINTS)))

    def _first(self, cursor: str, width: int) -> int:
        """The first step that somebody with this cursor does not know for good. 0: all of them."""
        start, _, last = cursor.rpartition(".")
        known = start == f"{_OURS}.{self._edition}.{width}" and last.isdecimal() and len(last) < 20
        return int(last) // width * width if known else 0


def parse(text: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl, None for what is none."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or not isinstance(step := line.get("step"), int):
        return None
    return line if 0 <= step < _MAX_STEP and not isinstance(step, bool) else None


def number(value: object) -> float | None:
    """A finite number, None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def _values(line: dict[str, Any]) -> Iterator[tuple[str, float | None]]:
    for name, value in line.items():
        if name in ("step", "attempt", "time", ELAPSED):
            continue
        if isinstance(value, list):
            for place, each in enumerate(value[:_MAX_LIST]):
                yield f"{name}.{place}", number(each)
        elif not isinstance(value, str | dict):
            yield name, number(value)


def _family(name: str) -> str:
    """That of the list that a metric is of, or its own."""
    start, _, place = name.rpartition(".")
    return start if start and place.isdecimal() else name


def _short(values: np.ndarray) -> np.ndarray:
    """To some digits, since no curve shows more."""
    sizes = np.abs(values)
    exponents = np.floor(np.log10(sizes, out=np.zeros_like(sizes), where=sizes > 0))
    # In parts, since the power of a very small value is none.
    scale = 10.0 ** np.clip(_DIGITS - 1 - exponents, -300, 300)
    return np.round(values * scale) / scale
