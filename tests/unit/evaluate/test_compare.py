"""Several runs side by side: curves over what was spent, differences only where figures compare, the same seeds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from transfusion.config import load_config
from transfusion.config.yaml_files import dump
from transfusion.errors import UserError
from transfusion.evaluate.report.compare import (
    compare,
    gather,
    markdown,
    metric_rows,
    open_runs,
    setting_rows,
)

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")


def metric(value: float, low: float, high: float, **other: Any) -> dict[str, Any]:
    known = {
        "suite": "images",
        "settings": {},
        "data": {"p": "1"},
        "how": "by <hand>",
        "higher_is_better": False,
    }
    return {"value": value, "interval": [low, high], **known, **other}


def write_run(
    folder: Path, metrics: dict[str, Any], *overrides: str, seeds: range = range(3), flops: bool = True
) -> Path:
    folder.mkdir(parents=True)
    dump(load_config(None, [f"run.name={folder.name}", *overrides]), folder / "config.yaml")
    lines = [
        {"step": step, "text_loss": 5.0 / step, "image_loss": 1.0 / step, "tokens": 1000 * step, "time": 0.0}
        | ({"flops": 2e9} if flops else {})
        for step in range(1, 31)
    ] + [{"step": step, "validation_text_loss": 6.0 / step} for step in (15, 30)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "metrics.json").write_text(json.dumps({"details": metrics}))
    drawn = folder / "evaluation" / "generated"
    drawn.mkdir(parents=True)
    index = [{"file": f"{seed}.png", "prompt": "a <cat>", "seed": seed} for seed in seeds]
    for line in index:
        pixels = np.full((8, 8, 3), len(folder.name), np.uint8)
        Image.fromarray(pixels).save(drawn / line["file"])
    (drawn / "index.jsonl").write_text("".join(json.dumps(line) + "\n" for line in index))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [
        write_run(tmp_path / "first", {"distance": metric(5.0, 4.9, 5.1), "f1": metric(0.5, 0.4, 0.6)}),
        write_run(
            tmp_path / "second",
            {
                "distance": metric(4.5, 4.4, 4.6),
                "f1": metric(0.55, 0.45, 0.65),
                "more": metric(1.0, 0.9, 1.1),
            },
            "diffusion.prediction=v",
            "model.layers=7",
            seeds=range(1, 9),
        ),
    ]


def test_the_page_is_one_file_with_both_kinds_of_curves_and_shared_seeds(
    runs: list[Path], tmp_path: Path
) -> None:
    page = compare(runs, tmp_path / "compare.html").read_text()
    assert "<h2>By tokens</h2>" in page and "<h2>By FLOPs</h2>" in page
    titles = re.findall(r"<h3>([^<]*loss[^<]*)</h3>", page)
    assert titles[:3] == [
        "Text loss, nats a token, training",
        "Text loss, nats a token, validation",
        "Image loss, training",
    ]
    assert "image losses do not compare" in page
    assert page.count("seed 1") and page.count("seed 2") and "seed 0" not in page and "seed 3" not in page
    assert "a &lt;cat&gt;" in page and "by &lt;hand&gt;" in page
    assert not re.search(r"(src|href)=\"(?!data:|#)", page) and "<script" not in page
    ids = re.findall(r'<clipPath id="([^"]+)"', page)
    assert len(ids) == len(set(ids)) >= 6
    assert "60 G" in page, "30 lines of 2e9 operations, added up"
    assert compare(runs, tmp_path / "again.html").read_text() == page


def test_without_operations_there_are_no_curves_over_them(runs: list[Path], tmp_path: Path) -> None:
    old = write_run(tmp_path / "old", {}, flops=False)
    page = compare([runs[0], old], tmp_path / "compare.html").read_text()
    assert "<h2>By tokens</h2>" in page and "<h2>By FLOPs</h2>" not in page


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (metric(4.5, 4.4, 4.6), "(-0.5, better)"),
        (metric(5.5, 5.4, 5.6), "(+0.5, worse)"),
        (metric(4.9, 4.8, 5.0), "(-0.1, within the spread)"),
        (metric(4.9, 4.8, 5.0) | {"interval": None}, "(-0.1)"),
        (metric(4.5, 4.4, 4.6, settings={"count": 5}), "(measured otherwise)"),
        (metric(4.5, 4.4, 4.6, data={"p": "2"}), "(measured otherwise)"),
        (metric(4.5, 4.4, 4.6, how="by another sampler"), "(-0.5, better)"),
    ],
)
def test_a_difference_is_told_where_figures_compare_and_judged_by_their_spread(
    tmp_path: Path, other: dict[str, Any], told: str
) -> None:
    first = write_run(tmp_path / "first", {"distance": metric(5.0, 4.9, 5.1)})
    second = write_run(tmp_path / "second", {"distance": other})
    [row] = metric_rows(open_runs([first, second]))
    assert row.differences == ["", told] and row.values[0] == "5 [4.9, 5.1]"


@pytest.mark.parametrize("modality", ["image", "sound"])
def test_losses_of_two_predictions_do_not_compare(tmp_path: Path, modality: str) -> None:
    name = f"p_{modality}_loss"
    first = write_run(tmp_path / "first", {name: metric(0.5, 0.4, 0.6, how="of the noise")})
    second = write_run(tmp_path / "second", {name: metric(0.9, 0.8, 1.0, how="of the velocity")})
    [row] = metric_rows(open_runs([first, second]))
    assert row.differences == ["", "(measured otherwise)"]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("p_denoise_error_at_0.5", {"codec": "kl 2"}),
        ("p_image_nats_per_token", {"codec": "kl 2"}),
        ("text_loss_nats_per_token", {"unit": "nats/token", "how": "over 12 tokens"}),
    ],
)
def test_figures_of_other_latents_or_other_tokens_do_not_compare(
    tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    known = metric(0.5, 0.4, 0.6, codec="kl 1", unit=changes.get("unit", ""))
    first = write_run(tmp_path / "first", {name: known, "f1": known})
    second = write_run(
        tmp_path / "second",
        {each: known | {"value": 0.9, "interval": [0.8, 1.0]} | changes for each in (name, "f1")},
    )
    rows = metric_rows(open_runs([first, second]))
    assert rows[0].differences == ["", "(measured otherwise)"]
    if "codec" in changes:
        assert rows[1].differences == ["", "(+0.4, worse)"], "images and captions are no latents"


def test_of_figures_that_tell_nothing_of_their_making_no_difference_is_told(tmp_path: Path) -> None:
    old = {"value": 0.5, "how": "by hand"}
    runs = [write_run(tmp_path / name, {"f1": old}) for name in ("first", "second")]
    assert metric_rows(open_runs(runs))[0].differences == ["", ""]


def test_image_losses_of_two_families_do_not_compare(tmp_path: Path) -> None:
    first = write_run(tmp_path / "first", {})
    second = write_run(tmp_path / "second", {})
    (second / "config.yaml").write_text("model: {family: chameleon}\n")
    assert gather(open_runs([first, second]))["several_image_losses"]
    assert not gather(open_runs([first]))["several_image_losses"]


def test_settings_that_differ_are_listed_and_names_and_places_are_not(runs: list[Path]) -> None:
    assert setting_rows(open_runs(runs)) == [
        ("model.layers", [str(load_config(None).model.layers), "7"]),
        ("diffusion.prediction", ["epsilon", "v"]),
    ]


def test_markdown_has_the_same_tables(runs: list[Path]) -> None:
    text = markdown(runs)
    assert text.startswith("| metric | first | second |\n| --- | --- | --- |\n")
    assert "| Distance | 5 [4.9, 5.1] | 4.5 [4.4, 4.6] (-0.5, better) |" in text
    assert "| More | - | 1 [0.9, 1.1] |" in text
    assert "| `diffusion.prediction` | epsilon | v |" in text
    assert markdown(runs[:1]).count("\n") == 4, "one run has metrics alone"


def test_what_cannot_be_compared_is_refused(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing is not the folder of a run"):
        compare([runs[0], tmp_path / "nothing"], tmp_path / "out.html")
    with pytest.raises(UserError, match="a run is named twice"):
        compare([runs[0], runs[0]], tmp_path / "out.html")
    many = [write_run(tmp_path / f"run-{number}", {}) for number in range(9)]
    with pytest.raises(UserError, match="9 runs do not fit side by side; name at most 8"):
        compare(many, tmp_path / "out.html")


def test_runs_of_one_name_are_told_apart_by_their_places(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / place / "run", {}) for place in ("a", "b")]
    assert [run.name for run in open_runs(runs)] == [str(run) for run in runs]
