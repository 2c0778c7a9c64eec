"""What finished cells say together: means over seeds, laws, and the parity of two models; as text and as JSON."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from transfusion.errors import UserError
from transfusion.scaling.fit import Law, Parity, crossing, fit_law, parity
from transfusion.scaling.grid import TABLE

Record = dict[str, Any]
# Laws are trusted so far beyond their points, as a factor.
REACH = 10.0


@dataclass(frozen=True, slots=True)
class Series:
    """The points of one metric and one value of an axis, and their law where they have one.

    left_out: points that have no logarithm.
    """

    flops: tuple[float, ...]
    values: tuple[float, ...]
    left_out: int
    law: Law | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """One metric over all values of an axis.

    pairs: of each two whose laws are known, in their order, the parity of the first to the second at the second's most
    FLOPs, and the FLOPs at which their laws cross.
    """

    metric: str
    higher_is_better: bool
    series: dict[str, Series]
    pairs: dict[tuple[str, str], tuple[Parity, float]]


def read_records(out: Path) -> list[Record]:
    """The lines of OUT/cells.jsonl. Raises UserError where there are none."""
    path = out / TABLE
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        raise UserError(
            f"{path} cannot be read; `transfusion scaling run GRID --out {out}` writes it"
        ) from None
    if not records:
        raise UserError(f"{path} holds no finished run yet; `transfusion scaling run` continues")
    return records


def metrics_of(records: Sequence[Record], wanted: Sequence[str] = ()) -> list[str]:
    """Names of the metrics that all records have, or the wanted ones. Raises UserError for one that is not there."""
    known = [name for name in records[0]["metrics"] if all(name in record["metrics"] for record in records)]
    missing = [name for name in wanted if name not in known]
    if missing:
        raise UserError(f"not every run has a metric {missing[0]!r}; there are {', '.join(known)}")
    return list(wanted) or known


def compare(records: Sequence[Record], axis: str, metrics: Sequence[str]) -> list[Comparison]:
    """Laws of each metric for each value of an axis, in the order of the grid. Raises UserError for an unknown axis."""
    if axis not in records[0]["axes"]:
        raise UserError(f"the grid has no axis {axis!r}; it has {', '.join(records[0]['axes'])}")
    choices = list(dict.fromkeys(record["axes"][axis] for record in records))
    found = []
    for metric in metrics:
        higher = bool(records[0]["higher_is_better"][metric])
        series = {
            choice: _series([record for record in records if record["axes"][axis] == choice], metric, seed)
            for seed, choice in enumerate(choices)
        }
        found.append(Comparison(metric, higher, series, _pairs(series, higher)))
    return found


def table(records: Sequence[Record], metrics: Sequence[str]) -> str:
    """Markdown: a line a cell, with its budget and mean ± standard deviation over seeds of each metric."""
    lines = [
        "| cell | seeds | FLOPs | parameters | " + " | ".join(metrics) + " |",
        "|---" * (4 + len(metrics)) + "|",
    ]
    for cell in dict.fromkeys(record["cell"] for record in records):
        runs = [record for record in records if record["cell"] == cell]
        figures = [_spread([run["metrics"][metric] for run in runs]) for metric in metrics]
        flops, parameters = mean(run["flops"] for run in runs), runs[0]["parameters"]
        head = f"| {cell} | {len(runs)} | {flops:.3g} | {parameters / 1e6:.3g} M | "
        lines.append(head + " | ".join(figures) + " |")
    return "\n".join(lines)


def laws(comparisons: Sequence[Comparison], records: Sequence[Record], axis: str) -> str:
    """Markdown: for each metric the models at their greatest budget, the exponents, and the parity FLOP ratio."""
    names = list(comparisons[0].series)
    lines = [
        "| | " + " | ".join(each.metric for each in comparisons) + " |",
        "|---" * (1 + len(comparisons)) + "|",
    ]
    for name in names:
        mine = [record for record in records if record["axes"][axis] == name]
        greatest = max(record["flops"] for record in mine)
        top = [record for record in mine if record["flops"] > 0.9 * greatest]
        cells = [_spread([record["metrics"][each.metric] for record in top]) for each in comparisons]
        lines.append(f"| {name} at {greatest:.3g} FLOPs | " + " | ".join(cells) + " |")
    for name in names:
        cells = [_exponent(each.series[name]) for each in comparisons]
        lines.append(f"| exponent of {name} | " + " | ".join(cells) + " |")
    for first, second in itertools.combinations(names, 2):
        found = [each.pairs.get((first, second)) for each in comparisons]
        ratios = " | ".join("none" if pair is None else _ratio(pair[0]) for pair in found)
        crossings = " | ".join("none" if pair is None else _crossing(pair[1], records) for pair in found)
        lines.append(f"| parity FLOP ratio, {first} to {second} | {ratios} |")
        lines.append(f"| {first} and {second} cross at FLOPs | {crossings} |")
    return "\n".join(lines)


def as_dict(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """The same as plain values for JSON."""
    return [
        {
            "metric": each.metric,
            "higher_is_better": each.higher_is_better,
            "laws": {name: _law_as_dict(series) for name, series in each.series.items()},
            "pairs": [
                {
                    "first": first,
                    "second": second,
                    "parity": _parity_as_dict(found),
                    "crossing_flops": None if math.isnan(flops) else flops,
                }
                for (first, second), (found, flops) in each.pairs.items()
            ],
        }
        for each in comparisons
    ]


def _series(records: Sequence[Record], metric: str, seed: int) -> Series:
    points = [(record["flops"], record["metrics"][metric]) for record in records]
    kept = [(flops, value) for flops, value in points if value is not None and value > 0]
    flops, values = tuple(x for x, _ in kept), tuple(y for _, y in kept)
    try:
        law = fit_law(flops, values, seed=seed)
    except UserError:
        # Too few points for a law; they are still drawn.
        law = None
    return Series(flops, values, len(points) - len(kept), law)


def _pairs(
    series: Mapping[str, Series], higher_is_better: bool
) -> dict[tuple[str, str], tuple[Parity, float]]:
    found = {}
    for (first, one), (second, other) in itertools.combinations(series.items(), 2):
        if one.law is not None and other.law is not None:
            ratio = parity(one.law, other.law, max(other.flops), higher_is_better=higher_is_better)
            found[first, second] = ratio, crossing(one.law, other.law)
    return found


def _law_as_dict(series: Series) -> dict[str, Any] | None:
    law = series.law
    if law is None:
        return None
    return {
        "exponent": law.exponent,
        "exponent_95": law.exponent_interval(),
        "coefficient": math.exp(law.intercept - law.exponent * law.centre),
        "residual_of_logarithm": law.residual,
        "points": law.points,
        "left_out": series.left_out,
    }


def _parity_as_dict(found: Parity) -> dict[str, Any]:
    return {
        "ratio": None if math.isnan(found.ratio) else found.ratio,
        "ratio_95": found.interval,
        "at_flops": found.flops,
        "share_of_resamples_defined": found.defined,
    }


def _spread(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    return f"{mean(known):.4g}" + (f" ± {stdev(known):.2g}" if len(known) > 1 else "")


def _exponent(series: Series) -> str:
    if series.law is None:
        return "-"
    low, high = series.law.exponent_interval()
    return f"{series.law.exponent:.3f} [{low:.3f}, {high:.3f}]"


def _ratio(found: Parity) -> str:
    if math.isnan(found.ratio):
        return "none"
    if found.interval is None:
        return f"{found.ratio:.3g}, interval open"
    low, high = found.interval
    return f"{found.ratio:.3g} [{low:.3g}, {high:.3g}]"


def _crossing(flops: float, records: Sequence[Record]) -> str:
    """Where two laws cross, unless that is far beyond what was measured."""
    measured = [record["flops"] for record in records]
    near = min(measured) / REACH <= flops <= max(measured) * REACH
    return f"{flops:.3g}" if near else "none near"
