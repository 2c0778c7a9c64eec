"""The paper's figure 5 from a grid's results: a panel a metric, points, laws and their bands over training FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from transfusion.errors import UserError
from transfusion.scaling.results import Comparison

# Two that colour-blind readers tell apart, then further ones.
COLOURS = ("#1f6fb4", "#d9730d", "#2a8a57", "#8a4fb0", "#777777")
MARKERS = ("o", "s", "^", "D", "v")
COLUMNS = 3
PANEL = (4.4, 3.6)
# The laws are drawn so far beyond their points, as a factor.
REACH = 2.0
PLACES = 60
# By kind of file. Without the date the same results give the same bytes.
METADATA = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}


def draw(comparisons: Sequence[Comparison], out: Path, *, title: str = "") -> None:
    """Write a .png, .svg or .pdf. Raises UserError without matplotlib or for another kind of file."""
    if out.suffix not in METADATA:
        raise UserError(f"{out} must end in .png, .svg or .pdf")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("the figure needs matplotlib; run `pip install matplotlib`") from None
    columns = min(COLUMNS, len(comparisons))
    rows = -(-len(comparisons) // columns)
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, comparison in zip(grid, comparisons, strict=False):
        _panel(axes, comparison)
    for axes in grid[len(comparisons) :]:
        axes.set_axis_off()
    if title:
        figure.suptitle(title)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150, metadata=METADATA[out.suffix])


def _panel(axes: Any, comparison: Comparison) -> None:
    for number, (name, series) in enumerate(comparison.series.items()):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        label = name
        if series.law is not None:
            left_out = f", {series.left_out} left out" if series.left_out else ""
            label = f"{name}: exponent {series.law.exponent:.2f}{left_out}"
        axes.plot(series.flops, series.values, marker, color=colour, markersize=5, alpha=0.75, label=label)
        if series.law is not None:
            flops = np.geomspace(min(series.flops) / REACH, max(series.flops) * REACH, PLACES)
            low, high = series.law.band(flops)
            axes.plot(flops, series.law.at(flops), color=colour, linewidth=1.4)
            axes.fill_between(flops, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    # As numbers, not as powers of ten: the figures of a grid seldom span more than one.
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    better = "higher" if comparison.higher_is_better else "lower"
    axes.set_title(f"{comparison.metric.replace('_', ' ')} ({better} is better)", fontsize=9)
    axes.set_xlabel("training FLOPs", fontsize=9)
    axes.tick_params(which="both", labelsize=8)
    axes.grid(alpha=0.25, which="both", linewidth=0.5)
    axes.legend(fontsize=8, frameon=False)
