"""Settings that are swept: every combination once, what is kept of a sweep that was killed, table and figure."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from pairs import source, write_pairs
from PIL import Image

from transfusion.errors import UserError
from transfusion.evaluate import sweep as sweeping
from transfusion.evaluate.report.sweep import draw
from transfusion.evaluate.suites.settings import ImagesSuite, PerplexitySuite, TextToImageSuite
from transfusion.evaluate.sweep import Point, sweep, table

Open = Callable[..., Path]
FIXED = ["samples.max_tokens=2", "samples.captions=4", "samples.count=2"]
OVER = ["samples.guidance=1,4", "samples.steps=1,2"]


@pytest.fixture
def model(open_model: Open, tmp_path: Path) -> Path:
    return open_model(
        {"validation": [source(write_pairs(tmp_path / "pairs", ["a red one", "a blue one"] * 3))]}
    )


def detail(value: float, *, higher: bool = True) -> dict[str, object]:
    return {"value": value, "higher_is_better": higher, "interval": None}


def test_every_combination_is_measured_once_and_drawn(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    points = sweep(model, OVER, out, overrides=FIXED)
    assert [point.name for point in points] == [
        f"samples.guidance={scale},samples.steps={steps}" for scale in (1, 4) for steps in (1, 2)
    ]
    for point in points:
        made = point.figures["caption_token_f1"]
        assert made["settings"]["steps"] == int(point.settings["samples.steps"])
        assert made["settings"]["guidance"] == float(point.settings["samples.guidance"])
        assert len(list((out / point.name / "evaluation" / "generated").glob("*.png"))) == 2
    with Image.open(out / "sweep.png") as figure:
        assert figure.width > 400


def test_a_killed_sweep_goes_on_and_measures_what_has_changed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, measured = tmp_path / "sweep", list[str]()
    measure = sweeping.measure_into

    def noted(folder: Path, *arguments: object, **named: object) -> object:
        measured.append(folder.name.replace("samples.", ""))
        if len(measured) == 3:
            raise KeyboardInterrupt
        return measure(folder, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(sweeping, "measure_into", noted)
    with pytest.raises(KeyboardInterrupt):
        sweep(model, OVER, out, overrides=FIXED)
    sweep(model, OVER, out, overrides=FIXED)
    assert measured == [
        "guidance=1,steps=1", "guidance=1,steps=2", "guidance=4,steps=1", "guidance=4,steps=1", "guidance=4,steps=2"
    ]  # fmt: skip
    measured[:] = ["", "", ""]
    # A further value, and then another seed.
    points = sweep(model, [*OVER[:1], "samples.steps=1,2,3"], out, overrides=FIXED)
    assert measured[3:] == ["guidance=1,steps=3", "guidance=4,steps=3"] and len(points) == 6
    sweep(model, OVER, out, overrides=[*FIXED, "samples.seed=7"])
    assert len(measured) == 3 + 2 + 4
    assert len(json.loads((out / "sweep.json").read_text())) == 6, "those of other values stay"


@pytest.mark.parametrize(
    ("over", "overrides", "words"),
    [
        ([], [], "nothing is swept"),
        (["samples.steps=4"], [], "no list of values"),
        (["samples.steps"], [], "no list of values"),
        (["samples.steps=4,,5"], [], "no list of values"),
        (["samples.steps=4,4"], [], "a value twice"),
        (["samples.steps=4,5", "samples.steps=6,7"], [], "its key twice"),
        (["pictures.steps=4,5"], [], "no suite named 'pictures'"),
        (["samples.pace=4,5"], [], "samples.pace"),
        (["samples.steps=4,few"], [], "samples.steps"),
        (["images.classifier=a/b,c/d"], [], "paths cannot be swept"),
        (["samples.steps=4,5"], ["samples.steps=6"], "is swept too"),
        (["samples.steps=4,5"], ["digits.count=6"], "is of no suite that is swept; leave it out"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(
    model: Path, tmp_path: Path, over: list[str], overrides: list[str], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        sweep(model, over, tmp_path / "sweep", overrides=overrides)
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("scales", ["1,4", "4,1"])
def test_a_figure_that_one_point_lacks_is_left_out_there(model: Path, tmp_path: Path, scales: str) -> None:
    points = sweep(model, [f"samples.guidance={scales}"], tmp_path / "sweep", overrides=FIXED)
    lines = table(points).splitlines()
    column = [cell.strip() for cell in lines[0].split("|")].index("distance_of_guidance")
    cells = {line.split("|")[1].strip(): line.split("|")[column].strip() for line in lines[2:]}
    assert cells["1"] == "-" and float(cells["4"].strip("*")) > 0
    assert (tmp_path / "sweep" / "sweep.png").is_file()


def test_a_sweep_in_another_order_has_its_own_headings(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    sweep(model, OVER, out, overrides=FIXED)
    again = sweep(model, [OVER[1], "samples.guidance=1,4,2"], out, overrides=FIXED)
    assert all(list(point.settings) == ["samples.steps", "samples.guidance"] for point in again)
    rows = [line.split("|")[1:3] for line in table(again).splitlines()[2:]]
    assert rows == [[f" {steps} ", f" {scale} "] for steps in (1, 2) for scale in (1, 4, 2)]


def test_the_files_that_settings_name_are_part_of_a_point(tmp_path: Path) -> None:
    file = tmp_path / "networks" / "one.safetensors"
    file.parent.mkdir()
    file.write_text("weights")
    chosen = [
        ImagesSuite(classifier=str(file)),
        TextToImageSuite(clip=str(file.parent)),
        PerplexitySuite(texts=[str(file)]),
    ]
    before = [sweeping._files_of(settings) for settings in chosen]
    assert all(list(found) == [str(file)] for found in before)
    file.write_text("other weights")
    assert all(sweeping._files_of(settings) != found for settings, found in zip(chosen, before, strict=True))
    assert sweeping._files_of(ImagesSuite()) == {}


def test_a_damaged_record_is_named(model: Path, tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text("[{")
    with pytest.raises(UserError, match=r"sweep\.json is damaged; delete it"):
        sweep(model, OVER, tmp_path, overrides=FIXED)


def test_the_table_has_what_differs_and_marks_the_best() -> None:
    points = [
        Point({"images.guidance": scale}, {"near": detail(near, higher=False), "real": detail(2.0)}, "")
        for scale, near in (("1", 3.25), ("2", 1.5), ("5", 4.0))
    ]
    assert table(points).splitlines() == [
        "| images.guidance | near |", "|---|---|", "| 1 | 3.25 |", "| 2 | **1.5** |", "| 5 | 4 |"
    ]  # fmt: skip


def test_values_that_are_no_numbers_and_figures_all_alike_are_drawn(tmp_path: Path) -> None:
    points = [
        ({"images.sampler": sampler, "images.steps": steps}, {"near": detail(2.0)})
        for sampler in ("ddim", "dpmpp_2m")
        for steps in ("4", "50")
    ]
    for out in (tmp_path / "one.png", tmp_path / "two.png"):
        draw(points, out)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
