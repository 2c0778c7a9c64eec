"""The line that shows a run going on: alive on a terminal, a plain line every few steps in a log file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

# A plain log of a whole run has about this many lines.
PLAIN_LINES = 100


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
    ) -> None:
        self._total = total_steps
        self._every = max(1, total_steps // PLAIN_LINES)
        self._next_plain = first_step
        self._console = console or Console(stderr=True, highlight=False)
        self._bar: RichProgress | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._bar = RichProgress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[figures]}"),
                console=self._console,
                expand=True,
            )
            self._bar.start()
            self._task = self._bar.add_task("train", total=total_steps, completed=first_step, figures="")

    def update(self, line: Mapping[str, Any], *, seconds_left: float | None = None) -> None:
        """Show the figures of one line."""
        step = int(line["step"])
        figures = describe(line, seconds_left=seconds_left)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures=figures)
        elif step >= self._next_plain or step >= self._total:
            self._next_plain = step - step % self._every + self._every
            # Not wrapped at the width of a terminal that is not there.
            self._console.print(f"step {step}/{self._total}  {figures}", soft_wrap=True, markup=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the last state on the terminal and give it back."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def describe(line: Mapping[str, Any], *, seconds_left: float | None = None) -> str:
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
        f"left {duration(seconds_left)}" if seconds_left is not None else "",
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
