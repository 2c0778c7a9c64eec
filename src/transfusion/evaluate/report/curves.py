"""The curves of a report, as inline SVG.

Colours are names of CSS variables, so that one image serves light, dark and paper.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from transfusion.config import DiffusionConfig
from transfusion.config.objectives import COMPARED
from transfusion.families import FAMILIES
from transfusion.observe.metrics import EVALUATED, VALIDATED
from transfusion.schema import TIMESTEP_BUCKETS
from transfusion.sequence.sizes import IMAGE as IMAGE_MODALITY

CURVE_POINTS = 400
_BY_TIMESTEP = "_loss_by_timestep"
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
class Panel:
    """A drawn curve: inline SVG and the heading above it."""

    title: str
    svg: str


@dataclass(frozen=True)
class Curve:
    """One panel: series of (label, colour, points), raw and smoothed.

    marked: points shown each for itself. legend: heading of the labels, which are shown beside it. x: below the axis.
    """

    title: str
    series: Sequence[tuple[str, str, list[tuple[float, float]]]]
    smooth: bool = True
    marked: Sequence[tuple[float, float]] = ()
    legend: str = ""
    x: str = "step"


@dataclass(frozen=True)
class BucketCurve:
    """The loss of a modality by timestep."""

    panel: Panel
    modality: str
    predicts_noise: bool


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


def loss_curves(lines: list[dict[str, Any]], config: dict[str, Any]) -> list[Curve]:
    """One for each loss of the model's family, and the total."""
    return _present(
        *(
            Curve(
                ", ".join(filter(None, (f"{name.capitalize()} loss", unit(name, config)))),
                [("", TEXT if name == "text" else IMAGE, series(lines, f"{name}_loss"))],
                marked=series(lines, f"validation_{name}_loss"),
            )
            for name in loss_names(lines)
        ),
        Curve("Total loss, as weighted", [("", TOTAL, series(lines, "loss"))]),
    )


def loss_names(lines: list[dict[str, Any]]) -> list[str]:
    """Names of the losses of a family, such as "text" and "image", in the order in which they were written."""
    names = dict.fromkeys(name for line in lines for name in line if name.endswith("_loss"))
    return [name.removesuffix("_loss") for name in names if not name.startswith((VALIDATED, EVALUATED))]


def unit(name: str, config: dict[str, Any]) -> str:
    """What a loss is counted in; empty where nobody tells."""
    family = FAMILIES.get((config.get("model") or {}).get("family", "transfusion"))
    counted = family.image_metric(DiffusionConfig()).unit if family else ""
    if name == "text" or (name == IMAGE_MODALITY and counted == "nats/token"):
        return "nats a token"
    diffusion = _diffusion(name, config)
    if diffusion is None or family is None:
        return ""
    weighted = ", by min-SNR" if diffusion.get("loss_weight") == "min-snr" else ""
    return f"squared error of the {COMPARED.get(_prediction(diffusion), '')}{weighted}"


def _diffusion(name: str, config: dict[str, Any]) -> dict[str, Any] | None:
    """The section of the images, or of another modality. None: nobody declares it."""
    sections = {each.get("name"): each for each in config.get("modalities") or ()} | {IMAGE_MODALITY: config}
    return sections[name].get("diffusion") or {} if name in sections else None


def _prediction(diffusion: dict[str, Any]) -> Any:
    return diffusion.get("prediction", "epsilon")


def machine_curves(lines: list[dict[str, Any]]) -> list[Curve]:
    """How the optimiser and the machine went."""
    return _present(
        Curve("Gradient norm", [("", OTHER, series(lines, "gradient_norm"))]),
        Curve("Learning rate", [("", OTHER, series(lines, "learning_rate"))], smooth=False),
        Curve("Tokens a second", [("", OTHER, series(lines, "tokens_per_second"))]),
    )


def figure_curves(lines: list[dict[str, Any]]) -> list[Curve]:
    """Figures of several checkpoints, by their names."""
    lines = sorted((line for line in lines if "step" in line), key=lambda line: line["step"])
    names = dict.fromkeys(name for line in lines for name in line if name != "step") if len(lines) > 1 else ()
    return _present(
        *(
            Curve(name.replace("_", " ").capitalize(), [("", OTHER, series(lines, name))], smooth=False)
            for name in names
        )
    )


def _present(*curves: Curve) -> list[Curve]:
    return [curve for curve in curves if any(points for _, _, points in curve.series)]


def series(lines: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """(step, value) of the lines that have it."""
    return [(line["step"], line[name]) for line in lines if isinstance(line.get(name), int | float)]


def bucket_curves(lines: list[dict[str, Any]], config: dict[str, Any]) -> list[BucketCurve]:
    """Loss by timestep of images and of each further modality, one line a bucket, where a step tells it."""
    names = dict.fromkeys(name for line in lines for name in line if name.endswith(_BY_TIMESTEP))
    found = []
    for name in names:
        buckets = []
        for bucket in range(TIMESTEP_BUCKETS):
            points = [
                (line["step"], values[bucket])
                for line in lines
                if (values := line.get(name)) and bucket < len(values) and values[bucket] is not None
            ]
            percent = 100 // TIMESTEP_BUCKETS
            label = f"{bucket * percent} to {(bucket + 1) * percent} %"
            buckets.append((label, _bucket_colour(bucket), points))
        if any(points for _, _, points in buckets):
            modality = name.removesuffix(_BY_TIMESTEP)
            curve = Curve(f"{modality.capitalize()} loss by timestep", buckets, legend="timestep")
            diffusion = _diffusion(modality, config)
            predicts_noise = diffusion is not None and _prediction(diffusion) == "epsilon"
            found.append(BucketCurve(draw(curve, width=14.0, height=4.6), modality, predicts_noise))
    return found


def _bucket_colour(bucket: int) -> str:
    place = bucket / max(1, TIMESTEP_BUCKETS - 1) * (len(BUCKET_STOPS) - 1)
    parts = (np.interp(place, range(len(BUCKET_STOPS)), stops) for stops in zip(*BUCKET_STOPS, strict=True))
    return "#" + "".join(f"{round(part):02x}" for part in parts)


def draw(curve: Curve, *, width: float = 4.6, height: float = 2.9) -> Panel:
    """One panel as inline SVG whose text stays text and whose colours are the page's."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # The salt makes the ids of each drawing its own: all of them stand in one page.
    salt = f"{curve.title}{width}{curve.x}"
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 11}):
        drawing = Figure(figsize=(width, height), layout="constrained")
        axes = drawing.add_subplot()
        _plot(axes, curve)
        _scale(axes, curve)
        _dress(axes, curve.x)
        if curve.legend:
            legend = drawing.legend(
                loc="outside right center", frameon=False, labelcolor=INK, title=curve.legend
            )
            legend.get_title().set_color(FAINT)
        buffer = io.StringIO()
        drawing.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    # The <svg> element alone, scaled by the page, with its stand-in colours as CSS variables.
    _, element, svg = buffer.getvalue().partition("<svg ")
    for colour, variable in STYLE_COLOURS.items():
        svg = svg.replace(colour, variable)
    return Panel(curve.title, f'{element}role="img" aria-label="{curve.title}" {svg}')


def _plot(axes: Any, curve: Curve) -> None:
    for label, colour, points in curve.series:
        if not points:
            continue
        steps, values = _thinned(points)
        if curve.smooth and len(steps) > 20:
            if len(curve.series) == 1:
                axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.45)
            values = _smoothed(values)
        alone = "o" if len(steps) == 1 else None
        axes.plot(steps, values, color=colour, linewidth=1.8, marker=alone, label=label)
    if curve.marked:
        axes.plot(*zip(*curve.marked, strict=True), color=INK, linestyle="none", marker="o", markersize=4)


def _scale(axes: Any, curve: Curve) -> None:
    """A logarithmic axis where values differ by more than twentyfold, else one from zero or near the values."""
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    plain = FuncFormatter(lambda value, _: figure(float(value)))
    drawn = [float(value) for line in axes.lines for value in line.get_ydata()]
    if curve.smooth and min(drawn) > 0 and max(drawn) / min(drawn) > 20:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        low, high = axes.get_ylim()
        axes.set_ylim(bottom=min(low, 0.0) if low < 0.2 * high else low)
        axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(plain)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    steps = FuncFormatter(lambda value, _: f"{value:,.0f}")
    axes.xaxis.set_major_formatter(steps if curve.x == "step" else EngFormatter())


def _dress(axes: Any, x: str) -> None:
    axes.set_xlabel(x, color=FAINT)
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
