"""The figure of a sweep: a panel a metric, over the first setting, a line for each combination of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transfusion.evaluate.report.panels import COLOURS, MARKERS, head, save_panels

# Numbers that span so much stand on a logarithmic axis.
_WIDE = 8.0

Figures = Mapping[str, Mapping[str, Any]]


class _Line(NamedTuple):
    label: str
    places: list[float]
    details: list[Mapping[str, Any]]


def differing(points: Sequence[Figures]) -> list[str]:
    """The figures that are not the same at all points, as those of real images are. Some may lack at some points."""
    names = dict.fromkeys(name for figures in points for name in figures)
    return [name for name in names if len({figures.get(name, {}).get("value") for figures in points}) > 1]


def draw(points: Sequence[tuple[Mapping[str, str], Figures]], out: Path) -> None:
    """Write a .png, .svg or .pdf of settings and their figures, at least one. Raises UserError, see `save_panels`."""
    key, *others = points[0][0]
    ticks = list(dict.fromkeys(settings[key] for settings, _ in points))
    numbers = _numbers(ticks)
    places = dict(zip(ticks, numbers or [float(place) for place in range(len(ticks))], strict=True))
    all_figures = [figures for _, figures in points]
    # Where nothing differs, one shows that.
    names = differing(all_figures) or [name for figures in all_figures for name in figures][:1]

    def panel(axes: Any, name: str) -> None:
        lines: dict[str, _Line] = {}
        known = [(settings, figures[name]) for settings, figures in points if name in figures]
        for settings, detail in known:
            label = ", ".join(f"{other} {settings[other]}" for other in others)
            line = lines.setdefault(label, _Line(label, [], []))
            line.places.append(places[settings[key]])
            line.details.append(detail)
        for number, line in enumerate(lines.values()):
            _draw_line(axes, number, line)
        if numbers and min(numbers) > 0 and max(numbers) / min(numbers) > _WIDE:
            axes.set_xscale("log")
            axes.set_xticks([], minor=True)
        axes.set_xticks(list(places.values()), ticks)
        axes.set_xlabel(key, fontsize=9)
        head(axes, name, higher_is_better=bool(known[0][1]["higher_is_better"]))
        if others:
            axes.legend(fontsize=8, frameon=False)

    save_panels(names, panel, out)


def _draw_line(axes: Any, number: int, line: _Line) -> None:
    """Values in the order of the axis, with a band where they have intervals."""
    order = sorted(range(len(line.places)), key=line.places.__getitem__)
    x = [line.places[place] for place in order]
    details = [line.details[place] for place in order]
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]
    axes.plot(
        x, [each["value"] for each in details], marker=marker, color=colour, markersize=5, label=line.label
    )
    intervals = [each["interval"] for each in details]
    if all(intervals):
        low, high = zip(*intervals, strict=True)
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def _numbers(texts: Sequence[str]) -> list[float]:
    """As numbers; empty where one is none."""
    try:
        return [float(text) for text in texts]
    except ValueError:
        return []
