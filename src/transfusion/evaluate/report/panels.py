"""Figures of several panels side by side, as files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from transfusion.errors import UserError

# Two that colour-blind readers tell apart, then further ones.
COLOURS = ("#1f6fb4", "#d9730d", "#2a8a57", "#8a4fb0", "#777777")
MARKERS = ("o", "s", "^", "D", "v")
COLUMNS = 3
PANEL = (4.4, 3.6)
# By kind of file. Without the date the same results give the same bytes.
METADATA = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}

Content = TypeVar("Content")


def refuse_without_matplotlib() -> None:
    """Raises UserError where no figure can be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("the figure needs matplotlib; run `pip install matplotlib`") from None


def save_panels(
    contents: Sequence[Content], panel: Callable[[Any, Content], None], out: Path, *, title: str = ""
) -> None:
    """Write a .png, .svg or .pdf, in which `panel` draws each of the contents on axes of its own.

    Raises UserError without matplotlib or for another kind of file.
    """
    if out.suffix not in METADATA:
        raise UserError(f"{out} must end in .png, .svg or .pdf")
    refuse_without_matplotlib()
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(contents))
    rows = -(-len(contents) // columns)
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, content in zip(grid, contents, strict=False):
        panel(axes, content)
        axes.tick_params(which="both", labelsize=8)
        axes.grid(alpha=0.25, which="both", linewidth=0.5)
    for axes in grid[len(contents) :]:
        axes.set_axis_off()
    if title:
        figure.suptitle(title)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150, metadata=METADATA[out.suffix])


def head(axes: Any, metric: str, *, higher_is_better: bool) -> None:
    """Above a panel: what it shows, and which way is better."""
    better = "higher" if higher_is_better else "lower"
    axes.set_title(f"{metric.replace('_', ' ')} ({better} is better)", fontsize=9)
