"""The line that shows a run going on: alive on a terminal, a plain line every few steps in a log file."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column

# A plain log of a whole run has about this many lines, and one more where so many seconds pass without any.
PLAIN_LINES = 100
SILENCE_SECONDS = 10.0
# Columns of a terminal that has room for a bar beside the figures.
BAR_COLUMNS = 120


class Progress:
    """Shows lines of metrics.jsonl on stderr.

    rich asks the terminal, NO_COLOR and TERM what may be shown. first_step: where this start begins.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        first_step: int = 0,
        console: Console | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total_steps
        self._every = max(1, total_steps // PLAIN_LINES)
        self._next_plain = first_step
        self._now, self._last_plain = now, -math.inf
        self._console = console or Console(stderr=True, highlight=False)
        self._bar: RichProgress | None = None
        self._left = self._figures = ""
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            # Figures are cut at the edge of a narrow terminal, the step and the time left are not.
            self._bar = RichProgress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}", table_column=Column(no_wrap=True)),
                TextColumn("{task.fields[left]}", table_column=Column(no_wrap=True)),
                *([BarColumn(bar_width=20)] if self._console.width >= BAR_COLUMNS else []),
                TextColumn(
                    "{task.fields[figures]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)
                ),
                console=self._console,
                expand=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(
                "train", total=total_steps, completed=first_step, left="", figures=""
            )

    def alive(self, step: int, *, seconds_left: float | None = None, doing: str = "") -> None:
        """Show that the run goes on: at once the first time, then whenever nothing else was shown for a while.

        doing: what is done beside training, such as "validation 3/20".
        """
        if self._bar is not None:
            self._left = self._left if seconds_left is None else _left(seconds_left)
            self._bar.update(self._task, completed=step, left=self._left, figures=doing or self._figures)
        elif self._is_silent:
            self._plain(step, _left(seconds_left), doing)

    @property
    def _is_silent(self) -> bool:
        return self._now() - self._last_plain >= SILENCE_SECONDS

    def _plain(self, step: int, *texts: str) -> None:
        self._last_plain = self._now()
        line = "  ".join(text for text in (f"step {step}/{self._total}", *texts) if text)
        # Not wrapped at the width of a terminal that is not there.
        self._console.print(line, soft_wrap=True, markup=False)

    def update(self, line: Mapping[str, Any], *, seconds_left: float | None = None) -> None:
        """Show the figures of one line."""
        step = int(line["step"])
        figures, left = describe(line), _left(seconds_left)
        if self._bar is not None:
            self._left, self._figures = left, figures
            self._bar.update(self._task, completed=step, left=left, figures=figures)
        elif step >= min(self._next_plain, self._total) or self._is_silent:
            self._next_plain = step - step % self._every + self._every
            self._plain(step, left, figures)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the last state on the terminal and give it back."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class CallProgress:
    """Shows how far many calls of a model are, with the time left. Called before each with those done and all of them.

    what: in words, such as "8 of 64 images".
    """

    def __init__(self, what: Callable[[], str], *, now: Callable[[], float] = time.monotonic) -> None:
        self._what, self._now, self._start = what, now, now()
        self._shown: Progress | None = None

    def __call__(self, done: int, calls: int) -> None:
        if self._shown is None:
            self._shown, self._start = Progress(calls, now=self._now), self._now()
        left = (self._now() - self._start) / done * (calls - done) if done else None
        self._shown.alive(done, seconds_left=left, doing=self._what())

    def __enter__(self) -> CallProgress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._shown is not None:
            self._shown.__exit__(*error)


def _left(seconds: float | None) -> str:
    return "" if seconds is None else f"left {duration(seconds)}"


def describe(line: Mapping[str, Any]) -> str:
    """The figures of one line in one short text; what is not known is left out."""
    parts = [
        _figure("loss", line.get("loss"), ".4f"),
        *(
            _figure(name.removesuffix("_loss"), value, ".4f")
            for name, value in line.items()
            if name.endswith("_loss") and not name.startswith("validation_")
        ),
        _figure("gradient", line.get("gradient_norm"), ".3f"),
        _figure("", line.get("tokens_per_second"), ",.0f", " tok/s"),
        _figure("MFU", line.get("mfu"), ".1%"),
        _figure("of GEMM", line.get("gemm_share") if line.get("mfu") is None else None, ".0%"),
        _figure("data wait", line.get("data_wait"), ".1%"),
        _figure("", line.get("memory_gib"), ".2f", " GiB"),
        f"{line['skipped']} skipped" if line.get("skipped") else "",
    ]
    return "  ".join(part for part in parts if part)


def duration(seconds: float) -> str:
    """Seconds as a person says them: 45s, 3m 20s, 5h 07m, 2d 03h."""
    whole = max(0, round(seconds))
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days}d {hours % 24:02d}h"
    if hours:
        return f"{hours}h {minutes % 60:02d}m"
    if minutes:
        return f"{minutes}m {whole % 60:02d}s"
    return f"{whole}s"


def _figure(name: str, value: float | None, form: str, unit: str = "") -> str:
    if value is None:
        return ""
    return f"{name} {value:{form}}{unit}".strip()
