"""report.html: what a run did, as one file that needs nothing beside it.

Reads files only. What is missing is left out with a note that says how to get it.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from PIL import Image, UnidentifiedImageError

from transfusion.errors import UserError
from transfusion.evaluate.report.curves import (
    bucket_curves,
    draw,
    figure,
    figure_curves,
    loss_curves,
    loss_names,
    machine_curves,
    series,
)
from transfusion.evaluate.watch import RECORD
from transfusion.files import atomic_write_text
from transfusion.observe.metrics import read_metrics
from transfusion.observe.progress import duration
from transfusion.observe.runfolder import RunFolder

# Rows of images that suites leave, and what they are.
EVIDENCE = {
    "nearest.png": "images drawn from captions, and under each the nearest training image",
    "edits.png": "images before an instruction, what was drawn behind it, and the true images",
}
GRIDS_SHOWN = 6
PROMPTS_SHOWN = 20
IMAGES_A_PROMPT = 10
# Sounds are larger, and nobody hears ten of a word.
SOUNDS_A_PROMPT = 2
CAPTIONS_SHOWN = 40
WRONG_CAPTIONS_SHOWN = 20
WRONG_SOUNDS_HEARD = 12
# Three seconds of 16 bits at 16 kHz.
MAX_SOUND_BYTES = 100_000
# Small images are enlarged to about this many pixels a side; large ones are made smaller, for the page is
# to stay below 3 MB.
IMAGE_SIDE = 96
MAX_SIDE = 128
MAX_GRID = 900
MIN_GRID = 256
JPEG_QUALITY = 80


@dataclass(frozen=True)
class Figure:
    """An image for the page: a data: URI, its caption, and whether it is marked right or wrong.

    sound: a data: URI of the sound whose spectrogram the image is.
    """

    uri: str
    caption: str = ""
    expected: str = ""
    correct: bool | None = None
    sound: str = ""


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into the folder of a run; returns its path.

    Raises UserError if the folder is not one of a run, or if matplotlib or jinja2 is missing.
    """
    folder = RunFolder(Path(run_folder))
    if not is_run(folder.path):
        raise UserError(
            f"{folder.path} is not the folder of a run (no config.yaml, no metrics.jsonl); "
            f"give the folder that `transfusion train` wrote, such as runs/quickstart"
        )
    check_packages()
    atomic_write_text(folder.report, render("page.html", gather(folder)))
    return folder.report


def check_packages() -> None:
    """Raises UserError if what draws a page is missing, before any work."""
    for package in ("jinja2", "matplotlib"):
        try:
            import_module(package)
        except ImportError:
            raise UserError(f"the report needs {package}; run `pip install matplotlib jinja2`") from None


def render(template: str, values: dict[str, Any]) -> str:
    """The page of a template beside this file."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = figure
    return environment.get_template(template).render(values)


def is_run(path: Path) -> bool:
    """Whether a folder is one that training wrote, so that it can have a report."""
    folder = RunFolder(path)
    return folder.config.is_file() or folder.metrics.is_file()


def gather(folder: RunFolder) -> dict[str, Any]:
    """Everything that the template shows, empty where the run has none."""
    lines = read_metrics(folder.metrics)
    config = mapping(folder.config, yaml.safe_load)
    environment = mapping(folder.environment, json.loads)
    captions = jsonl(folder.path / "evaluation" / "captions.jsonl")
    generated, captioned = _generated(folder.path, captions), _captioned(folder.path, captions)
    return {
        "name": (config.get("run") or {}).get("name") or folder.path.name,
        "facts": _facts(lines, config, environment) | _starts(jsonl(folder.metrics)),
        "metrics": _metrics(mapping(folder.path / "metrics.json", json.loads)),
        "curves": [draw(curve) for curve in loss_curves(lines, config)],
        "validation": any(name.startswith("validation_") for line in lines for name in line),
        "bucket_curves": bucket_curves(lines, config),
        "machine_curves": [draw(curve) for curve in machine_curves(lines)],
        "evaluation_curves": [draw(curve) for curve in figure_curves(jsonl(folder.path / RECORD))],
        "rows": [
            Figure(uri, told)
            for name, told in EVIDENCE.items()
            if (uri := data_uri(folder.path / "evaluation" / name, largest=MAX_GRID))
        ],
        "grids": _grids(folder.samples),
        "grids_across": _across(folder.samples),
        "grid_prompts": (config.get("sample_grid") or {}).get("prompts") or [],
        "generated": generated,
        "has_sounds": any(shown.sound for _, images, *_ in generated for shown in images),
        "captions": captioned[:CAPTIONS_SHOWN],
        "captions_are_of_sounds": any(sound_of(_image(folder.path, line)) for line in captions),
        "captions_total": len(captions),
        "captions_right": sum(bool(line.get("correct")) for line in captions),
        "captions_wrong": captioned[CAPTIONS_SHOWN:],
        "environment": flat(environment),
        "config_text": folder.config.read_text(encoding="utf-8") if folder.config.is_file() else "",
    }


def _facts(
    lines: list[dict[str, Any]], config: dict[str, Any], environment: dict[str, Any]
) -> dict[str, Any]:
    model = config.get("model") or {}
    gpus = environment.get("gpus") or []
    machine = f"{len(gpus)} x {gpus[0]['name']}" if gpus else environment.get("cpu") or ""
    facts: dict[str, Any] = {
        "layers": model.get("layers"),
        "width": model.get("hidden_size"),
        "planned_steps": (config.get("train") or {}).get("steps"),
        "machine": machine,
        "has_other_media": bool(config.get("modalities")),
        "processes": environment.get("processes"),
        "steps": 0,
    }
    if lines:
        # The newest line may be one of validation losses alone.
        last = next((line for line in reversed(lines) if "tokens" in line), lines[-1])
        endings = {name: _ending(lines, f"{name}_loss") for name in loss_names(lines)}
        facts |= {
            "steps": lines[-1]["step"],
            "endings": {name: value for name, value in endings.items() if value is not None},
            **{name: last.get(name) for name in ("tokens", "images", "skipped", "faults")},
        }
    return facts


def _starts(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """How often the run was started, and the time from the first line to the last of each start, added up.

    lines: all that were written, those of steps that a later start did again among them.
    """
    times: dict[Any, list[float]] = {}
    for line in lines:
        times.setdefault(line.get("attempt"), []).append(line.get("time") or 0.0)
    seconds = sum(max(stamps) - min(stamps) for stamps in times.values())
    return {"starts": len(times), "duration": duration(seconds)}


def _ending(lines: list[dict[str, Any]], name: str) -> float | None:
    """Mean over the last twentieth of the lines that have it."""
    values = [value for _, value in series(lines, name)]
    return float(np.mean(values[-max(1, len(values) // 20) :])) if values else None


def _metrics(values: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for name, entry in values.get("details", values).items():
        fields = entry if isinstance(entry, dict) else {"value": entry}
        if isinstance(fields.get("value"), int | float | str | None):
            label = name.replace("_", " ")
            empty = {"value": None, "unit": "", "threshold": None, "passed": None, "how": ""}
            row = {**empty, **fields, "label": label[:1].upper() + label[1:]}
            if row["threshold"] is not None:
                higher = fields.get("higher_is_better")
                sense = "" if higher is None else "at least " if higher else "below "
                row["threshold"] = sense + figure(row["threshold"])
            rows.append(row)
    return rows


def flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested values as rows of names and words."""
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            rows += flat(value, f"{prefix}{name} ")
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


def _grids(samples: Path) -> list[Figure]:
    """The first grid, the last, and some evenly between."""
    files = sorted(samples.glob("step_*.png"), key=_step_of)
    if len(files) > GRIDS_SHOWN:
        chosen = np.linspace(0, len(files) - 1, GRIDS_SHOWN).round().astype(int)
        files = [files[index] for index in chosen]
    found = [(file, data_uri(file, smallest=MIN_GRID, largest=MAX_GRID)) for file in files]
    return [Figure(uri, f"step {_step_of(file):,}") for file, uri in found if uri]


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


class Prompt(NamedTuple):
    """What was made of a prompt: the first as listed, none picked, and how many there are. real: such as was wanted."""

    prompt: str
    images: list[Figure]
    total: int
    real: list[Figure]


def _generated(folder: Path, captions: list[dict[str, Any]]) -> list[Prompt]:
    """For each prompt in order. Beside sounds stands a real one, of which the caption should be the prompt."""
    generated = folder / "evaluation" / "generated"
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for line in jsonl(generated / "index.jsonl"):
        by_prompt.setdefault(str(line.get("prompt", "")), []).append(line)
    shown = []
    for prompt, lines in list(by_prompt.items())[:PROMPTS_SHOWN]:
        files = [generated / str(line.get("file", "")) for line in lines]
        most = SOUNDS_A_PROMPT if sound_of(files[0]) else IMAGES_A_PROMPT
        found = [
            Figure(uri, f"seed {line.get('seed', '?')}", sound=sound_uri(file))
            for line, file in zip(lines[:most], files, strict=False)
            if (uri := data_uri(file))
        ]
        real = [
            line for line in captions if line.get("expected") == prompt and sound_of(_image(folder, line))
        ]
        if found:
            shown.append(Prompt(prompt, found, len(lines), [_real(folder, line) for line in real[:1]]))
    return shown


def _real(folder: Path, line: dict[str, Any]) -> Figure:
    file = _image(folder, line)
    return Figure(data_uri(file), "a real one", sound=sound_uri(file))


def _captioned(folder: Path, lines: list[dict[str, Any]]) -> list[Figure]:
    """The first captions as listed, and behind them further wrong ones. Of sounds the first wrong ones can be heard."""
    wrong = [number for number, line in enumerate(lines) if line.get("correct") is False]
    further = [number for number in wrong if number >= CAPTIONS_SHOWN][:WRONG_CAPTIONS_SHOWN]
    return [
        Figure(
            uri=data_uri(_image(folder, line)),
            caption=str(line.get("caption", "")),
            expected="" if line.get("expected") is None else str(line["expected"]),
            correct=line.get("correct"),
            sound=sound_uri(_image(folder, line)) if number in wrong[:WRONG_SOUNDS_HEARD] else "",
        )
        for number, line in enumerate(lines)
        if number < CAPTIONS_SHOWN or number in further
    ]


def _image(folder: Path, line: dict[str, Any]) -> Path:
    """Of a line of captions.jsonl."""
    return folder / str(line.get("image", ""))


def sound_of(picture: Path) -> Path | None:
    """The WAV beside a picture, which is that sound's spectrogram. None: there is none."""
    sound = picture.with_suffix(".wav")
    return sound if sound.is_file() else None


def sound_uri(picture: Path) -> str:
    """The sound of a picture as a data: URI; "" where there is none, or it is too long for a page."""
    sound = sound_of(picture)
    if sound is None or sound.stat().st_size > MAX_SOUND_BYTES:
        return ""
    return f"data:audio/wav;base64,{base64.b64encode(sound.read_bytes()).decode()}"


def data_uri(file: Path, *, smallest: int = IMAGE_SIDE, largest: int = MAX_SIDE) -> str:
    """An image as a data: URI, with sides between `smallest` and `largest`; "" if it cannot be read."""
    try:
        with Image.open(file) as opened:
            image = opened.convert("L" if opened.mode in ("1", "L", "I", "I;16") else "RGB")
    except (OSError, UnidentifiedImageError, ValueError):
        return ""
    longest = max(image.size)
    if longest < smallest:
        factor = -(-smallest // longest)
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    elif longest > largest:
        image.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    kind = "jpeg" if longest >= MAX_SIDE and image.mode == "RGB" else "png"
    # Each kind passes over the other's option.
    image.save(buffer, kind, quality=JPEG_QUALITY, optimize=kind == "png")
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def mapping(file: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """The mapping in a file; empty if there is none, for a report says what it can."""
    try:
        values = parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def jsonl(file: Path) -> list[dict[str, Any]]:
    """The objects of a file of lines; what is torn is left out."""
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
