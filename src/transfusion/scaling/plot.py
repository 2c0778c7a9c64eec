"""The paper's figure 5 from a grid's results: a panel a metric, points, laws and their bands over training FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from transfusion.evaluate.report.panels import COLOURS, MARKERS, head, save_panels
from transfusion.scaling.results import Comparison

# The laws are drawn so far beyond their points, as a factor.
REACH = 2.0
PLACES = 60


def draw(comparisons: Sequence[Comparison], out: Path, *, title: str = "") -> None:
    """Write a .png, .svg or .pdf. Raises UserError without matplotlib or for another kind of file."""
    save_panels(comparisons, _panel, out, title=title)


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
    head(axes, comparison.metric, higher_is_better=comparison.higher_is_better)
    axes.set_xlabel("training FLOPs", fontsize=9)
    axes.legend(fontsize=8, frameon=False)
