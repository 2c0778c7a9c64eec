"""The same suites at every combination of some settings: a table and a figure of what each setting brings.

OUT/sweep.json             one record a point: its settings, its figures, what they were made of
OUT/sweep.png              a panel a figure, over the first setting, a line for each combination of the others
OUT/KEY=VALUE,.../         metrics.json and evaluation/ of each point
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transfusion import __version__
from transfusion.errors import UserError
from transfusion.evaluate.report.panels import refuse_without_matplotlib
from transfusion.evaluate.report.sweep import differing, draw
from transfusion.evaluate.suites.run import METRICS, SUITES, choose, measure_into, open_model, origin_of
from transfusion.evaluate.suites.settings import SuiteConfig
from transfusion.files import atomic_write_text, file_state, fingerprint
from transfusion.generate.load import Dtype, Weights
from transfusion.generate.pipeline import Pipeline
from transfusion.parallel.environment import is_first_process

RECORD, FIGURE = "sweep.json", "sweep.png"
# A comma between values, none within brackets.
_COMMA = re.compile(r",(?![^\[{]*[\]}])")


@dataclass(frozen=True, slots=True)
class Point:
    """What was measured at one combination of settings.

    settings: from key to value, as they were given. figures: the details of each metric, as metrics.json holds them.
    mark: changes with whatever would make other figures.
    """

    settings: dict[str, str]
    figures: dict[str, dict[str, Any]]
    mark: str

    @property
    def name(self) -> str:
        return ",".join(f"{key}={value}" for key, value in self.settings.items())


def sweep(
    model: Path,
    over: Sequence[str],
    out: Path,
    *,
    overrides: Sequence[str] = (),
    weights: Weights = "auto",
    device: str = "auto",
    dtype: Dtype = "auto",
    classifier: Path | None = None,
    download: bool = False,
    say: Callable[[str], None] = print,
) -> list[Point]:
    """Measure an exported model at every combination of values, and draw the figures. Returns the points in order.

    over: `suite.key=A,B,C` each. The suites that are named there are what runs. overrides: `suite.key=value`, the same
    at every point. Killed and started again it goes on: points of the same model, data and settings are kept. Raises
    UserError for settings that are unknown or too few, before anything is measured, and as the suites do.
    """
    axes = _axes(over)
    suites = list(dict.fromkeys(key.partition(".")[0] for key in axes))
    if vain := [word for word in overrides if word.partition(".")[0] not in suites]:
        raise UserError(
            f"{vain[0]} is of no suite that is swept; leave it out, or sweep a setting of that suite"
        )
    if taken := [word for word in overrides if word.partition("=")[0] in axes]:
        raise UserError(f"{taken[0]} is swept too; leave it out, or its --over")
    combinations = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    chosen = [
        choose(
            suites, [*overrides, *map("=".join, settings.items())], classifier=classifier, download=download
        )
        for settings in combinations
    ]
    refuse_without_matplotlib()
    known = _read(out / RECORD)
    pipeline = open_model(model, weights=weights, device=device, dtype=dtype)
    points: list[Point] = []
    for number, (settings, suites_here) in enumerate(zip(combinations, chosen, strict=True)):
        point = Point(settings, {}, _mark(pipeline, suites_here))
        before = [each for each in known if (each.settings, each.mark) == (settings, point.mark)]
        if not before:
            say(f"{point.name}: point {number + 1} of {len(combinations)}")
            if is_first_process():
                # Figures of other settings would stay beside these.
                (out / point.name / METRICS).unlink(missing_ok=True)
            measure_into(out / point.name, pipeline, suites_here, all_must=True)
        if not is_first_process():
            continue
        # Its settings in the order of this sweep.
        points.append(replace(point, figures=before[0].figures) if before else _measured(out, point))
        others = [each for each in known if each.settings not in [done.settings for done in points]]
        records = [
            {"settings": each.settings, "mark": each.mark, "figures": each.figures}
            for each in [*points, *others]
        ]
        atomic_write_text(out / RECORD, json.dumps(records, indent=1) + "\n")
    if any(point.figures for point in points):
        draw([(point.settings, point.figures) for point in points], out / FIGURE)
    return points


def table(points: Sequence[Point]) -> str:
    """Markdown: a line a point, a column for each figure that is not the same everywhere, its best value in bold."""
    keys = list(points[0].settings)
    names = differing([point.figures for point in points])
    best = {}
    for name in names:
        found = [point.figures[name] for point in points if name in point.figures]
        best[name] = (max if found[0]["higher_is_better"] else min)(each["value"] for each in found)
    lines = [f"| {' | '.join([*keys, *names])} |", "|---" * (len(keys) + len(names)) + "|"]
    for point in points:
        cells = [point.settings[key] for key in keys]
        for name in names:
            value = point.figures.get(name, {}).get("value")
            shown = "-" if value is None else f"{value:.4g}"
            cells.append(f"**{shown}**" if value == best[name] else shown)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _axes(over: Sequence[str]) -> dict[str, list[str]]:
    """From key to values. Raises UserError for what is no list of values."""
    if not over:
        raise UserError("nothing is swept; give --over suite.key=A,B, such as --over images.guidance=1,2,3")
    axes: dict[str, list[str]] = {}
    for word in over:
        key, equals, text = word.partition("=")
        values = [value.strip() for value in _COMMA.split(text)]
        if not equals or len(values) < 2 or not all(values):
            raise UserError(
                f"--over {word!r} is no list of values; write suite.key=A,B, such as images.guidance=1,2,3"
            )
        if key in axes or len(set(values)) < len(values):
            raise UserError(
                f"--over {word!r} names {'its key' if key in axes else 'a value'} twice; name it once"
            )
        if key.partition(".")[0] not in SUITES:
            raise UserError(
                f"--over {word!r}: no suite named {key.partition('.')[0]!r}; there are {', '.join(SUITES)}"
            )
        if any("/" in value for value in values):
            raise UserError(f"--over {word!r}: paths cannot be swept; run `transfusion eval` once for each")
        axes[key] = values
    return axes


def _mark(pipeline: Pipeline, chosen: Mapping[str, SuiteConfig]) -> str:
    """Changes with whatever would make other figures: release, model, data, settings, and the files that they name."""
    return fingerprint(
        [
            __version__,
            *(
                [origin_of(pipeline, name, settings), settings.model_dump(mode="json"), _files_of(settings)]
                for name, settings in chosen.items()
            ),
        ]
    )


def _files_of(settings: SuiteConfig) -> dict[str, Any]:
    """The state of each file that a setting names, and of those of a folder."""
    found: dict[str, Any] = {}
    for value in settings.model_dump(mode="json").values():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and text and (path := Path(text)).exists():
                files = sorted(path.rglob("*")) if path.is_dir() else [path]
                found |= {str(file): file_state(file) for file in files if file.is_file()}
    return found


def _measured(out: Path, point: Point) -> Point:
    details = json.loads((out / point.name / METRICS).read_text(encoding="utf-8"))["details"]
    return Point(point.settings, details, point.mark)


def _read(path: Path) -> list[Point]:
    """The points that are measured. Raises UserError for a file that is not ours."""
    if not path.exists():
        return []

    def points() -> Iterator[Point]:
        for record in json.loads(path.read_text(encoding="utf-8")):
            yield Point(dict(record["settings"]), dict(record["figures"]), str(record["mark"]))

    try:
        return list(points())
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged; delete it, or name another folder with --out") from None
