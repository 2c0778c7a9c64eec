"""What finished cells say together: means over seeds, laws, and the parity of two models; as text and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from transfusion.errors import UserError
from transfusion.scaling.fit import Law, Parity, fit_law, parity
from transfusion.scaling.grid import TABLE

Record = dict[str, Any]


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
    """One metric over all values of an axis. parity: of the first value to the second, at the second's most FLOPs."""

    metric: str
    higher_is_better: bool
    series: dict[str, Series]
    parity: Parity | None


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
        found.append(Comparison(metric, higher, series, _parity(list(series.values()), higher)))
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
    if len(names) > 1:
        ratios = " | ".join(_ratio(each.parity) for each in comparisons)
        lines.append(f"| parity FLOP ratio, {names[0]} to {names[1]} | {ratios} |")
    return "\n".join(lines)


def as_dict(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """The same as plain values for JSON."""
    return [
        {
            "metric": each.metric,
            "higher_is_better": each.higher_is_better,
            "laws": {name: _law_as_dict(series) for name, series in each.series.items()},
            "parity": None if each.parity is None else _parity_as_dict(each.parity),
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


def _parity(series: Sequence[Series], higher_is_better: bool) -> Parity | None:
    if len(series) < 2 or series[0].law is None or series[1].law is None:
        return None
    return parity(series[0].law, series[1].law, max(series[1].flops), higher_is_better=higher_is_better)


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


def _ratio(found: Parity | None) -> str:
    if found is None or math.isnan(found.ratio):
        return "none"
    if found.interval is None:
        return f"{found.ratio:.3g}, interval open"
    low, high = found.interval
    return f"{found.ratio:.3g} [{low:.3g}, {high:.3g}]"
