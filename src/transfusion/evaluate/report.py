"""report.html: what a run did, as one file that needs nothing beside it. The only importer of matplotlib, jinja2.

Reads files only; what is missing is left out with a note that says how to get it. Colours in the curves are
names of CSS variables, so that one picture serves light, dark and paper.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image, UnidentifiedImageError

from transfusion.config.objectives import PREDICTED
from transfusion.errors import UserError
from transfusion.files import atomic_write_text
from transfusion.observe.metrics import read_metrics
from transfusion.observe.progress import duration
from transfusion.observe.runfolder import RunFolder
from transfusion.schema import TIMESTEP_BUCKETS

CURVE_POINTS = 400
GRIDS_SHOWN = 6
PROMPTS_SHOWN = 20
PICTURES_A_PROMPT = 10
CAPTIONS_SHOWN = 40
WRONG_CAPTIONS_SHOWN = 20
# Small pictures are enlarged to about this many pixels a side; large ones are made smaller, for the page is
# to stay below 3 MB.
PICTURE_SIDE = 96
LARGEST_SIDE = 128
LARGEST_GRID = 900
SMALLEST_GRID = 256
JPEG_QUALITY = 80

# Stand-ins that no plot uses otherwise -> CSS variables of the template.
INK, FAINT, GRID = "#010101", "#020202", "#030303"
TEXT, IMAGE, TOTAL, OTHER = "#040401", "#040402", "#040403", "#040404"
STYLE_COLOURS = {
    INK: "var(--ink)",
    FAINT: "var(--faint)",
    GRID: "var(--grid)",
    TEXT: "var(--text-series)",
    IMAGE: "var(--image-series)",
    TOTAL: "var(--total-series)",
    OTHER: "var(--other-series)",
}
# From little noise to much, of middling lightness so that both backgrounds carry them.
BUCKET_STOPS = ((0x2F, 0x7F, 0xD6), (0x8B, 0x62, 0xC9), (0xD0, 0x4A, 0x83), (0xE0, 0x85, 0x2C))


@dataclass(frozen=True)
class Picture:
    """A picture for the page: a data: URI, its caption, and whether it is marked right or wrong."""

    uri: str
    caption: str = ""
    expected: str = ""
    correct: bool | None = None


@dataclass(frozen=True)
class Panel:
    """A drawn curve: inline SVG and the heading above it."""

    title: str
    svg: str


@dataclass(frozen=True)
class Curve:
    """One panel: series of (label, colour, points), raw and smoothed; marked: points shown each for itself."""

    title: str
    series: Sequence[tuple[str, str, list[tuple[float, float]]]]
    smooth: bool = True
    marked: Sequence[tuple[float, float]] = ()


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into the folder of a run; returns its path.

    Raises UserError if the folder is not one of a run, or if matplotlib or jinja2 is missing.
    """
    folder = RunFolder(Path(run_folder))
    if not (folder.config.is_file() or folder.metrics.is_file()):
        raise UserError(
            f"{folder.path} is not the folder of a run (no config.yaml, no metrics.jsonl); "
            f"give the folder that `transfusion train` wrote, such as runs/quickstart"
        )
    try:
        import jinja2
        import matplotlib  # noqa: F401 - asked for here, so that its lack is told before any work
    except ImportError as error:
        raise UserError(f"the report needs {error.name}; run `pip install matplotlib jinja2`") from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = figure
    page = environment.get_template("report.html").render(gather(folder))
    atomic_write_text(folder.report, page)
    return folder.report


def gather(folder: RunFolder) -> dict[str, Any]:
    """Everything that the template shows, empty where the run has none."""
    lines = read_metrics(folder.metrics)
    config = _yaml(folder.config)
    environment = _json(folder.environment)
    captions = _jsonl(folder.path / "evaluation" / "captions.jsonl")
    diffusion = config.get("diffusion") or {}
    return {
        "name": (config.get("run") or {}).get("name") or folder.path.name,
        "facts": _facts(lines, config, environment),
        "metrics": _metrics(_json(folder.path / "metrics.json")),
        "curves": [_draw(curve) for curve in _loss_curves(lines, diffusion)],
        "held_out": any(line.get("held_out_text_loss") or line.get("held_out_image_loss") for line in lines),
        "bucket_curve": _draw_buckets(lines),
        "predicts_noise": diffusion.get("objective", "noise") == "noise",
        "machine_curves": [_draw(curve) for curve in _machine_curves(lines)],
        "grids": _grids(folder.samples),
        "grids_across": _across(folder.samples),
        "grid_prompts": (config.get("sample") or {}).get("prompts") or [],
        "generated": _generated(folder.path / "evaluation" / "generated"),
        "captions": [_captioned(folder.path, line) for line in captions[:CAPTIONS_SHOWN]],
        "captions_total": len(captions),
        "captions_right": sum(bool(line.get("correct")) for line in captions),
        "captions_wrong": [
            _captioned(folder.path, line)
            for line in captions[CAPTIONS_SHOWN:]
            if line.get("correct") is False
        ][:WRONG_CAPTIONS_SHOWN],
        "environment": _flat(environment),
        "config_text": folder.config.read_text(encoding="utf-8") if folder.config.is_file() else "",
    }


def figure(value: Any) -> str:
    """A number as a person reads it: four digits, thousands apart; anything else as text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "-" if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return "-"
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.4g}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.3g}"


# ---- text and figures ----------------------------------------------------------------------------------


def _facts(
    lines: list[dict[str, Any]], config: dict[str, Any], environment: dict[str, Any]
) -> dict[str, Any]:
    model = config.get("model") or {}
    gpus = environment.get("gpus") or []
    machine = f"{len(gpus)} x {gpus[0]['name']}" if gpus else environment.get("cpu") or ""
    facts: dict[str, Any] = {
        "layers": model.get("layers"),
        "width": model.get("width"),
        "planned_steps": (config.get("train") or {}).get("steps"),
        "machine": machine,
        "processes": environment.get("processes"),
        "steps": 0,
    }
    if lines:
        facts |= {
            "steps": lines[-1]["step"],
            "tokens": lines[-1].get("tokens"),
            "images": lines[-1].get("images"),
            "duration": duration(_seconds(lines)),
            "attempts": len({line.get("attempt") for line in lines}),
            "skipped": lines[-1].get("skipped"),
            "faults": lines[-1].get("faults"),
            "text_loss": _ending(lines, "text_loss"),
            "image_loss": _ending(lines, "image_loss"),
        }
    return facts


def _seconds(lines: list[dict[str, Any]]) -> float:
    """Time from the first line to the last of each attempt, added up."""
    times: dict[Any, list[float]] = {}
    for line in lines:
        times.setdefault(line.get("attempt"), []).append(line.get("time") or 0.0)
    return sum(max(stamps) - min(stamps) for stamps in times.values())


def _ending(lines: list[dict[str, Any]], name: str) -> float | None:
    """Mean over the last twentieth of the lines that have it."""
    values = [value for _, value in _series(lines, name)]
    return float(np.mean(values[-max(1, len(values) // 20) :])) if values else None


def _metrics(values: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for name, entry in values.get("details", values).items():
        fields = entry if isinstance(entry, dict) else {"value": entry}
        if isinstance(fields.get("value"), int | float | str | None):
            label = name.replace("_", " ")
            empty = {"value": None, "unit": "", "bar": None, "passed": None, "how": ""}
            row = {**empty, **fields, "label": label[:1].upper() + label[1:]}
            if row["bar"] is not None:
                higher = fields.get("higher_is_better")
                sense = "" if higher is None else "at least " if higher else "below "
                row["bar"] = sense + figure(row["bar"])
            rows.append(row)
    return rows


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{name} ")
        elif isinstance(value, list):
            rows.append((prefix + name, " ".join(map(_entry, value)) or "none"))
        else:
            rows.append((prefix + name, _entry(value)))
    return [(name, value) for name, value in rows if value]


def _entry(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items()) + ";"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)


# ---- pictures ------------------------------------------------------------------------------------------


def _grids(samples: Path) -> list[Picture]:
    """The first grid, the last, and some evenly between."""
    files = sorted(samples.glob("step_*.png"), key=_step_of)
    if len(files) > GRIDS_SHOWN:
        chosen = np.linspace(0, len(files) - 1, GRIDS_SHOWN).round().astype(int)
        files = [files[index] for index in chosen]
    found = [(file, data_uri(file, smallest=SMALLEST_GRID, largest=LARGEST_GRID)) for file in files]
    return [Picture(uri, f"step {_step_of(file):,}") for file, uri in found if uri]


def _across(samples: Path) -> int:
    """Grids side by side: all in one row, fewer where they are wider than high."""
    try:
        with Image.open(next(iter(samples.glob("step_*.png")))) as grid:
            width, height = grid.size
    except (StopIteration, OSError, UnidentifiedImageError):
        return GRIDS_SHOWN
    return GRIDS_SHOWN if width <= height else 3 if width <= 2 * height else 2


def _step_of(file: Path) -> int:
    digits = file.stem.removeprefix("step_")
    return int(digits) if digits.isdigit() else 0


def _generated(folder: Path) -> list[tuple[str, list[Picture], int]]:
    """For each prompt in order: its first pictures as listed, none picked, and how many there are."""
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for line in _jsonl(folder / "index.jsonl"):
        by_prompt.setdefault(str(line.get("prompt", "")), []).append(line)
    shown = []
    for prompt, lines in list(by_prompt.items())[:PROMPTS_SHOWN]:
        found = [
            Picture(uri, f"seed {line.get('seed', '?')}")
            for line in lines[:PICTURES_A_PROMPT]
            if (uri := data_uri(folder / str(line.get("file", ""))))
        ]
        if found:
            shown.append((prompt, found, len(lines)))
    return shown


def _captioned(folder: Path, line: dict[str, Any]) -> Picture:
    return Picture(
        uri=data_uri(folder / str(line.get("image", ""))),
        caption=str(line.get("caption", "")),
        expected="" if line.get("expected") is None else str(line["expected"]),
        correct=line.get("correct"),
    )


def data_uri(file: Path, *, smallest: int = PICTURE_SIDE, largest: int = LARGEST_SIDE) -> str:
    """A picture as a data: URI, with sides between `smallest` and `largest`; "" if it cannot be read."""
    try:
        with Image.open(file) as opened:
            picture = opened.convert("L" if opened.mode in ("1", "L", "I", "I;16") else "RGB")
    except (OSError, UnidentifiedImageError, ValueError):
        return ""
    longest = max(picture.size)
    if longest < smallest:
        factor = -(-smallest // longest)
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    elif longest > largest:
        picture.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if longest >= LARGEST_SIDE and picture.mode == "RGB":
        picture.save(buffer, "JPEG", quality=JPEG_QUALITY)
        kind = "jpeg"
    else:
        picture.save(buffer, "PNG", optimize=True)
        kind = "png"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


# ---- curves --------------------------------------------------------------------------------------------


def _loss_curves(lines: list[dict[str, Any]], diffusion: dict[str, Any]) -> list[Curve]:
    predicted = PREDICTED.get(diffusion.get("objective", "noise"), "")
    weighted = ", by min-SNR" if diffusion.get("loss_weight") == "min-snr" else ""
    return _present(
        Curve(
            "Text loss, nats a token",
            [("", TEXT, _series(lines, "text_loss"))],
            marked=_series(lines, "held_out_text_loss"),
        ),
        Curve(
            f"Image loss, squared error of the {predicted}{weighted}",
            [("", IMAGE, _series(lines, "image_loss"))],
            marked=_series(lines, "held_out_image_loss"),
        ),
        Curve("Total loss, as weighted", [("", TOTAL, _series(lines, "loss"))]),
    )


def _machine_curves(lines: list[dict[str, Any]]) -> list[Curve]:
    return _present(
        Curve("Gradient norm", [("", OTHER, _series(lines, "gradient_norm"))]),
        Curve("Learning rate", [("", OTHER, _series(lines, "learning_rate"))], smooth=False),
        Curve("Tokens a second", [("", OTHER, _series(lines, "tokens_per_second"))]),
    )


def _present(*curves: Curve) -> list[Curve]:
    return [curve for curve in curves if any(points for _, _, points in curve.series)]


def _series(lines: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(line["step"], line[name]) for line in lines if isinstance(line.get(name), int | float)]


def _draw_buckets(lines: list[dict[str, Any]]) -> Panel | None:
    """Image loss by timestep, one line a bucket; None where no step tells it."""
    series = []
    for bucket in range(TIMESTEP_BUCKETS):
        points = [
            (line["step"], values[bucket])
            for line in lines
            if (values := line.get("image_loss_by_timestep"))
            and bucket < len(values)
            and values[bucket] is not None
        ]
        percent = 100 // TIMESTEP_BUCKETS
        series.append((f"{bucket * percent} to {(bucket + 1) * percent} %", _bucket_colour(bucket), points))
    if not any(points for _, _, points in series):
        return None
    return _draw(Curve("Image loss by timestep", series), width=14.0, height=4.6)


def _bucket_colour(bucket: int) -> str:
    place = bucket / max(1, TIMESTEP_BUCKETS - 1) * (len(BUCKET_STOPS) - 1)
    low = min(int(place), len(BUCKET_STOPS) - 2)
    mixed = [round(a + (b - a) * (place - low)) for a, b in zip(*BUCKET_STOPS[low : low + 2], strict=True)]
    return "#" + "".join(f"{part:02x}" for part in mixed)


def _draw(curve: Curve, *, width: float = 4.6, height: float = 2.9) -> Panel:
    """One panel as inline SVG whose text stays text and whose colours are the page's."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # The salt makes the ids of each drawing its own: all of them stand in one page.
    salt = f"{curve.title}{width}"
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 11}):
        drawing = Figure(figsize=(width, height), layout="constrained")
        axes = drawing.add_subplot()
        _plot(axes, curve)
        _scale(axes, may_be_logarithmic=curve.smooth)
        _dress(axes)
        if len(curve.series) > 1:
            legend = drawing.legend(
                loc="outside right center", frameon=False, labelcolor=INK, title="timestep"
            )
            legend.get_title().set_color(FAINT)
        buffer = io.StringIO()
        drawing.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Panel(curve.title, _inline(buffer.getvalue(), label=curve.title))


def _plot(axes: Any, curve: Curve) -> None:
    for label, colour, points in curve.series:
        if not points:
            continue
        steps, values = _thinned(points)
        if curve.smooth and len(steps) > 20:
            if len(curve.series) == 1:
                axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.45)
            values = _smoothed(values)
        axes.plot(steps, values, color=colour, linewidth=1.8, label=label)
    if curve.marked:
        axes.plot(*zip(*curve.marked, strict=True), color=INK, linestyle="none", marker="o", markersize=4)


def _scale(axes: Any, *, may_be_logarithmic: bool) -> None:
    """A logarithmic axis where values differ by more than twentyfold, else one from zero or near the values."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    plain = FuncFormatter(lambda value, _: figure(float(value)))
    drawn = [float(value) for line in axes.lines for value in line.get_ydata()]
    if may_be_logarithmic and min(drawn) > 0 and max(drawn) / min(drawn) > 20:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        low, high = axes.get_ylim()
        axes.set_ylim(bottom=min(low, 0.0) if low < 0.2 * high else low)
        axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(plain)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _dress(axes: Any) -> None:
    axes.set_xlabel("step", color=FAINT)
    axes.tick_params(which="both", colors=FAINT, length=0)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.01)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GRID)


def _thinned(points: list[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    """At most CURVE_POINTS points, each the mean of its neighbours."""
    parts = np.array_split(np.asarray(points, dtype=float), min(CURVE_POINTS, len(points)))
    means = np.stack([part.mean(axis=0) for part in parts])
    return means[:, 0], means[:, 1]


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Mean of each point's neighbours, as many before as after, so that a steep beginning is not shifted."""
    widest = max(2, len(values) // 40)
    smooth = []
    for place in range(len(values)):
        reach = min(widest, place)
        smooth.append(values[place - reach : place + reach + 1].mean())
    return np.asarray(smooth)


def _inline(svg: str, *, label: str) -> str:
    """The <svg> element alone, scaled by the page, with its stand-in colours as CSS variables."""
    svg = svg[svg.index("<svg") :]
    for colour, variable in STYLE_COLOURS.items():
        svg = svg.replace(colour, variable)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


# ---- files ---------------------------------------------------------------------------------------------


def _json(file: Path) -> dict[str, Any]:
    return _mapping(file, json.loads)


def _yaml(file: Path) -> dict[str, Any]:
    return _mapping(file, yaml.safe_load)


def _mapping(file: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """The mapping in a file; empty if there is none, for a report says what it can."""
    try:
        values = parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _jsonl(file: Path) -> list[dict[str, Any]]:
    try:
        texts: Iterable[str] = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
    lines = []
    for text in texts:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines
