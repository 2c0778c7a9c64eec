"""One line alive on a terminal, few plain lines elsewhere, the figures of metrics.jsonl in both."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from transfusion.observe.progress import CallProgress, Progress, describe, duration

LINE: dict[str, Any] = {
    "step": 7,
    "loss": 2.34567,
    "text_loss": 1.5,
    "image_loss": None,
    "gradient_norm": 0.5,
    "tokens_per_second": 12345.6,
    "data_wait": 0.034,
    "memory_gib": 1.25,
    "skipped": 0,
}


def test_describe_rounds_and_leaves_out_what_is_unknown() -> None:
    assert (
        describe(LINE) == "loss 2.3457  text 1.5000  gradient 0.500  12,346 tok/s  data wait 3.4%  1.25 GiB"
    )
    assert "2 skipped" in describe({**LINE, "skipped": 2})
    assert describe({"step": 1}) == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (-5, "0s"), (59.6, "1m 00s"), (3599, "59m 59s"), (18_420, "5h 07m"), (183_600, "2d 03h")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def shown(total: int, steps: range, *, first_step: int = 0) -> list[str]:
    stream = io.StringIO()
    with Progress(total, first_step=first_step, console=Console(file=stream, highlight=False)) as progress:
        for step in steps:
            progress.update({**LINE, "step": step})
    return stream.getvalue().splitlines()


def test_plain_lines_are_few_and_whole() -> None:
    lines = shown(1000, range(1, 1001))
    assert len(lines) <= 102
    assert lines[0].startswith("step 1/1000  loss 2.3457")
    assert lines[-1].startswith("step 1000/1000")
    assert "\x1b" not in "".join(lines)


def test_a_short_or_resumed_run_shows_each_of_its_steps() -> None:
    assert len(shown(5, range(1, 6))) == 5
    resumed = shown(1000, range(995, 1001), first_step=994)
    assert resumed[0].startswith("step 995/1000") and resumed[-1].startswith("step 1000/1000")


def test_sparse_lines_are_all_shown() -> None:
    assert len(shown(1000, range(50, 1001, 50))) == 20


def test_on_a_terminal_one_line_is_redrawn() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=160, _environ={"TERM": "xterm"})
    with Progress(10, console=console) as progress:
        progress.update(LINE, seconds_left=3.0)
    assert "step 7/10" in stream.getvalue() and "loss 2.3457" in stream.getvalue()
    assert "\x1b[" in stream.getvalue()


@pytest.mark.parametrize("width", [60, 80, 119, 120, 200])
def test_however_narrow_the_step_and_the_time_left_are_shown(width: int) -> None:
    stream = io.StringIO()
    console = Console(
        file=stream, force_terminal=True, width=width, _environ={"TERM": "xterm", "NO_COLOR": "1"}
    )
    with Progress(250_000, console=console) as progress:
        progress.update({**LINE, "step": 123_456}, seconds_left=400_000.0)
    last = [line for line in stream.getvalue().replace("\r", "\n").splitlines() if "step" in line][-1]
    assert "step 123456/250000" in last and "left 4d 15h" in last and "loss 2.3457" in last


def test_between_lines_a_plain_log_is_never_silent_for_long() -> None:
    seconds = 0.0
    stream = io.StringIO()
    console = Console(file=stream, highlight=False)
    with Progress(1000, console=console, now=lambda: seconds) as progress:
        for step in range(1, 9):
            seconds += 4.0
            progress.alive(step, seconds_left=4.0 * (1000 - step))
        progress.update({**LINE, "step": 9}, seconds_left=None)
        progress.alive(10)
    assert [line.split("  ")[:2] for line in stream.getvalue().splitlines()] == [
        ["step 1/1000", "left 1h 06m"],
        ["step 4/1000", "left 1h 06m"],
        ["step 7/1000", "left 1h 06m"],
        ["step 9/1000", "loss 2.3457"],
    ]


def test_no_color_is_honoured_on_a_terminal() -> None:
    stream = io.StringIO()
    environ = {"TERM": "xterm", "NO_COLOR": "1"}
    console = Console(file=stream, force_terminal=True, width=160, _environ=environ)
    with Progress(10, console=console) as progress:
        progress.update(LINE)
    assert "step 7/10" in stream.getvalue()
    assert "\x1b[3" not in stream.getvalue().replace("\x1b[?", ""), "no foreground colour"


def test_calls_of_a_model_are_shown_with_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    """At once, and then every ten seconds."""
    now = [0.0]
    with CallProgress(lambda: "2 of 8 images", now=lambda: now[0]) as progress:
        for done in range(50):
            progress(done, 50)
            now[0] += 1.0
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["step 0/50  2 of 8 images", "step 10/50  left 40s  2 of 8 images"]
    assert len(lines) == 5


def test_what_is_done_beside_training_is_shown_and_then_the_figures_again() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=150, color_system=None)
    with Progress(10, console=console) as progress:
        progress.update({**LINE, "step": 5}, seconds_left=60)
        progress.alive(5, doing="validation 3/20")
        assert progress._bar is not None
        shown = progress._bar.tasks[0].fields
        assert shown == {"left": "left 1m 00s", "figures": "validation 3/20"}
        progress.alive(6, seconds_left=50)
        assert progress._bar.tasks[0].fields["figures"].startswith("loss 2.3457")
