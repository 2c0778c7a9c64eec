"""compare.html: several runs side by side, as one file that needs nothing beside it; or their tables as Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from transfusion.errors import UserError
from transfusion.evaluate.report.curves import Curve, Panel, draw, figure, loss_names, series, unit
from transfusion.evaluate.report.page import (
    Figure,
    check_packages,
    data_uri,
    flat,
    is_run,
    jsonl,
    mapping,
    render,
)
from transfusion.files import atomic_write_text
from transfusion.observe.metrics import read_metrics
from transfusion.observe.runfolder import RunFolder

# Of middling lightness so that both backgrounds carry them.
COLOURS = ("#2f7fd6", "#d0512b", "#0f8577", "#8b62c9", "#b8860b", "#c0367f", "#5a7d2a", "#7a8292")
PROMPTS_SHOWN = 24
IMAGES_A_PROMPT = 4
# What figures that compare have in common.
_SAME = ("suite", "settings", "data")
# Parts of the names of those that are of latents or tokens, and so of one codec.
_OF_LATENTS = ("image_loss", "image_nats_per_token", "denoise_error", "nats_per_value")
# Where they are, when, and for how long: what differs between any two runs.
_UNTOLD = ("run ", "checkpoint ", "log ")


@dataclass(frozen=True)
class Run:
    """What the folder of one run holds."""

    name: str
    colour: str
    lines: list[dict[str, Any]]
    config: dict[str, Any]
    metrics: dict[str, dict[str, Any]]
    images: dict[tuple[str, int], str]

    @classmethod
    def of(cls, path: Path, name: str, colour: str) -> Run:
        folder = RunFolder(path)
        generated = path / "evaluation" / "generated"
        found = mapping(path / "metrics.json", json.loads).get("details") or {}
        return cls(
            name=name,
            colour=colour,
            lines=read_metrics(folder.metrics),
            config=mapping(folder.config, yaml.safe_load),
            metrics={metric: each for metric, each in found.items() if isinstance(each, dict)},
            images={
                (str(line.get("prompt", "")), int(line.get("seed", 0))): str(
                    generated / str(line.get("file"))
                )
                for line in jsonl(generated / "index.jsonl")
            },
        )

    def spent(self, what: str) -> list[tuple[float, float]]:
        """(step, tokens or FLOPs so far), empty where the run did not write them."""
        points = series(self.lines, what)
        if what == "tokens":
            return points
        return list(zip([step for step, _ in points], accumulate(value for _, value in points), strict=True))


@dataclass(frozen=True)
class Row:
    """A metric of all runs. differences: to the first run, in words; empty where none can be told."""

    label: str
    values: list[str]
    differences: list[str]
    how: str


def compare(paths: Sequence[Path], out: Path) -> Path:
    """Write the page of several runs; returns its path. Raises UserError as `write_report` does."""
    runs = open_runs(paths)
    check_packages()
    atomic_write_text(out, render("compare.html", gather(runs)))
    return out


def open_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs by the names of their folders. Raises UserError for what is no run, twice the same, or too many."""
    if strange := [path for path in paths if not is_run(path)]:
        raise UserError(
            f"{strange[0]} is not the folder of a run (no config.yaml, no metrics.jsonl); give folders that"
            " `transfusion train` wrote"
        )
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError("a run is named twice; name each once")
    if len(paths) > len(COLOURS):
        raise UserError(f"{len(paths)} runs do not fit side by side; name at most {len(COLOURS)}")
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    return [Run.of(path, name, colour) for path, name, colour in zip(paths, names, COLOURS, strict=False)]


def gather(runs: Sequence[Run]) -> dict[str, Any]:
    """Everything that the template shows."""
    shared = set.intersection(*(set(run.images) for run in runs))
    return {
        "name": " · ".join(run.name for run in runs),
        "runs": runs,
        "curves": [(title, panels) for title, panels in _curves(runs) if panels],
        "several_image_losses": len({unit("image", run.config) for run in runs}) > 1,
        "rows": metric_rows(runs),
        "images": _images(runs, shared),
        "settings": setting_rows(runs),
    }


def markdown(paths: Sequence[Path]) -> str:
    """Metrics and differences of configuration as tables for a README. Raises UserError as `compare` does."""
    runs = open_runs(paths)
    names = [run.name for run in runs]
    metrics = [
        [row.label, *(" ".join(filter(None, cell)) for cell in zip(row.values, row.differences, strict=True))]
        for row in metric_rows(runs)
    ]
    settings = [[f"`{key}`", *values] for key, values in setting_rows(runs)]
    return _table(["metric", *names], metrics) + (
        "\n" + _table(["setting", *names], settings) if settings else ""
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def metric_rows(runs: Sequence[Run]) -> list[Row]:
    """Each metric that any run has, with its interval, and how the others differ from the first.

    A difference is told where suite, settings and data are the same, of latents the codec, and of tokens their number.
    It is told as clear where its interval, of both independent intervals together, leaves out 0.
    """
    names = dict.fromkeys(name for run in runs for name in run.metrics)
    rows = []
    for name in names:
        found = [run.metrics.get(name) for run in runs]
        label = name.replace("_", " ")
        rows.append(
            Row(
                label=label[:1].upper() + label[1:],
                values=[_value(each) for each in found],
                differences=["", *(_difference(name, found[0], each) for each in found[1:])],
                how=next(str(each.get("how", "")) for each in found if each),
            )
        )
    return rows


def _value(metric: Mapping[str, Any] | None) -> str:
    if metric is None:
        return "-"
    interval = metric.get("interval")
    spread = " [{}, {}]".format(*map(figure, interval)) if interval else ""
    return f"{figure(metric.get('value'))}{spread}"


def _difference(name: str, first: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> str:
    if first is None or other is None:
        return ""
    # Figures of older versions do not tell what they were made of.
    if not first.get("suite") or not other.get("suite"):
        return ""
    keys = [*_SAME, *(["codec"] if any(part in name for part in _OF_LATENTS) else [])]
    # `how` tells what a model predicts, and how many tokens a text is. Of other figures it need not be the same, as
    # samplers may differ.
    if name.endswith("_loss") or first.get("unit") == "nats/token":
        keys.append("how")
    if any(first.get(key) != other.get(key) for key in keys):
        return "(measured otherwise)"
    change = other["value"] - first["value"]
    told = f"({'+' if change > 0 else ''}{figure(change)}"
    one, two = first.get("interval"), other.get("interval")
    if not one or not two:
        return f"{told})"
    # Of two independent figures: half widths add up as squares.
    low = np.hypot(first["value"] - one[0], two[1] - other["value"])
    high = np.hypot(one[1] - first["value"], other["value"] - two[0])
    clear = change > high or change < -low
    better = (change > 0) == bool(first.get("higher_is_better", True))
    return f"{told}, {'better' if better else 'worse'})" if clear else f"{told}, within the spread)"


def setting_rows(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Each key of the configuration that is not alike in all runs, and its values."""
    flattened = [dict(flat(run.config)) for run in runs]
    keys = dict.fromkeys(key for values in flattened for key in values)
    rows = [(key.replace(" ", "."), [values.get(key, "-") for values in flattened]) for key in keys]
    return [
        row
        for key, row in zip(keys, rows, strict=True)
        if len(set(row[1])) > 1 and not key.startswith(_UNTOLD)
    ]


def _curves(runs: Sequence[Run]) -> list[tuple[str, list[Panel]]]:
    """Losses, those of validation too, by tokens and by FLOPs."""
    names = dict.fromkeys(name for run in runs for name in loss_names(run.lines))
    groups = []
    for what, title, label in (("tokens", "By tokens", "tokens"), ("flops", "By FLOPs", "FLOPs")):
        spent = [run.spent(what) for run in runs]
        panels = []
        for name in names if all(spent) else ():
            # Where runs count otherwise, no unit is that of all.
            units = {unit(name, run.config) for run in runs}
            counted = units.pop() if len(units) == 1 else ""
            for prefix, kind in (("", "training"), ("validation_", "validation")):
                lines = [
                    (run.name, run.colour, _over(series(run.lines, f"{prefix}{name}_loss"), points))
                    for run, points in zip(runs, spent, strict=True)
                ]
                if any(points for _, _, points in lines):
                    told = ", ".join(filter(None, (f"{name.capitalize()} loss", counted, kind)))
                    panels.append(draw(Curve(told, lines, smooth=not prefix, x=label), width=5.6, height=3.2))
        groups.append((title, panels))
    return groups


def _over(points: list[tuple[float, float]], spent: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """(step, loss) as (tokens or FLOPs until that step, loss)."""
    if not points:
        return []
    steps, amounts = zip(*spent, strict=True)
    places = np.interp([step for step, _ in points], steps, amounts)
    return [(float(place), loss) for place, (_, loss) in zip(places, points, strict=True)]


def _images(
    runs: Sequence[Run], shared: set[tuple[str, int]]
) -> list[tuple[str, list[tuple[Run, list[Figure]]]]]:
    """For each prompt the first images of the seeds that all runs drew, run by run."""
    by_prompt: dict[str, list[int]] = {}
    for prompt, seed in runs[0].images:
        if (prompt, seed) in shared:
            by_prompt.setdefault(prompt, []).append(seed)
    return [
        (
            prompt,
            [
                (
                    run,
                    [
                        Figure(data_uri(Path(run.images[prompt, seed])), f"seed {seed}")
                        for seed in seeds[:IMAGES_A_PROMPT]
                    ],
                )
                for run in runs
            ],
        )
        for prompt, seeds in list(by_prompt.items())[:PROMPTS_SHOWN]
    ]
