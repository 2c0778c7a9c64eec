"""The report: one file, nothing fetched, everything escaped, and every part may be missing."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from transfusion.config import load_config
from transfusion.config.yaml_files import dump
from transfusion.errors import UserError
from transfusion.evaluate.report.curves import figure
from transfusion.evaluate.report.page import data_uri, write_report
from transfusion.observe.metrics import MetricsLog, StepMetrics
from transfusion.observe.runfolder import RunFolder

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

HOSTILE = '<script>alert("caption")</script> & <b>bold</b>'


def log_steps(folder: RunFolder, steps: range) -> None:
    with MetricsLog(folder.metrics) as log:
        for step in steps:
            buckets = [0.5 / (step + 1) + 0.1] * 9 + [None]
            log.append(
                StepMetrics(
                    step=step,
                    loss=3.0,
                    losses={"text": 2.5 / step, "image": None if step % 3 == 0 else 0.1},
                    series={"image_by_timestep": buckets},
                    gradient_norm=1.0,
                    learning_rate=1e-3,
                    skipped=int(step >= 5),
                    faults=step // 20,
                    tokens=step * 1000,
                    images=step * 10,
                    tokens_per_second=1e4,
                    data_wait=0.0,
                    memory_gib=1.0,
                )
            )
            if step % 10 == 0:
                log.append_validation(step, {"text": 2.0})


def make_image(path: Path, *, size: int = 8, colour: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(size).integers(0, 256, (size, size, 3) if colour else (size, size))
    Image.fromarray(values.astype(np.uint8)).save(path)


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "runs" / "first")
    config = load_config(None, ["run.name=first", "codec.image_size=8", "sample_grid.prompts=[a three]"])
    folder.create(config, arguments=["transfusion", "train", "<argument>"])
    return folder


@pytest.fixture
def whole_run(run: RunFolder) -> RunFolder:
    log_steps(run, range(1, 41))
    for step in range(0, 100, 10):
        make_image(run.grid(step), size=40)
    evaluation = run.path / "evaluation"
    write_lines(
        evaluation / "generated" / "index.jsonl",
        [{"file": f"{k}.png", "prompt": HOSTILE if k < 3 else "a two", "seed": k} for k in range(15)],
    )
    for k in range(15):
        make_image(evaluation / "generated" / f"{k}.png")
    make_image(evaluation / "validation" / "0.png")
    write_lines(
        evaluation / "captions.jsonl",
        [
            {
                "image": "evaluation/validation/0.png",
                "caption": HOSTILE if k == 0 else "a one",
                "expected": "a two",
                "correct": k % 10 != 0,
            }
            for k in range(60)
        ],
    )
    (run.path / "metrics.json").write_text(
        json.dumps(
            {
                "generation_accuracy": {
                    "value": 0.97,
                    "threshold": 0.95,
                    "passed": True,
                    "how": "by an SVC",
                    "higher_is_better": True,
                },
                "text_loss": {
                    "value": 3.4,
                    "unit": "nats/token",
                    "threshold": 3.1,
                    "passed": False,
                    "higher_is_better": False,
                    "how": HOSTILE,
                },
                "odd": [1, 2],
                "bare": 5,
            }
        )
    )
    return run


class Page(HTMLParser):
    """Collects what a page would run, fetch and show."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "srcset")]

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(path: Path) -> Page:
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == [], "every element is closed"
    return page


def test_the_whole_report_is_one_file_that_fetches_nothing(whole_run: RunFolder) -> None:
    path = write_report(whole_run.path)
    assert path == whole_run.report and path.stat().st_size < 3_000_000
    page = read(path)
    assert page.addresses and all(address.startswith("data:image/") for address in page.addresses)
    html = path.read_text()
    assert not re.search(r"@import|url\((?!#)", html)
    assert "script" not in page.tags and "link" not in page.tags


def test_figures_of_checkpoints_and_rows_of_images_are_shown_where_there_are_any(
    whole_run: RunFolder,
) -> None:
    assert "Figures of its checkpoints" not in (page := write_report(whole_run.path).read_text())
    assert "Images beside others" not in page
    lines = [{"step": step, "caption_token_f1": step / 100, "rare": 1.0} for step in (10, 20)]
    write_lines(whole_run.path / "evaluations.jsonl", lines)
    make_image(whole_run.path / "evaluation" / "nearest.png", size=300, colour=True)
    text = " ".join(read(write_report(whole_run.path)).text.split())
    assert "Figures of its checkpoints" in text and "Caption token f1" in text and "Rare" in text
    assert "Images beside others" in text and "under each the nearest training image" in text


def test_text_of_users_is_escaped(whole_run: RunFolder) -> None:
    html = write_report(whole_run.path).read_text()
    assert "<script" not in html and "<b>bold" not in html
    assert HOSTILE in Page(html).text


def test_what_was_measured_stands_in_it(whole_run: RunFolder) -> None:
    text = " ".join(read(write_report(whole_run.path)).text.split())
    assert "40,000 tokens and 400 images in 40 of 250,000 steps" in text
    assert "1 step was skipped" in text and "2 samples could not be read" in text
    assert "Dots: validation data" in text
    assert "0.97" in text and "at least 0.95" in text and "by an SVC" in text and "met" in text
    assert "below 3.1" in text and "missed" in text
    assert "54 of 60 are right" in text
    assert "10 of 12" in text, "of a prompt's images the first are shown and all are counted"
    assert "Image loss by timestep" in text and "80 to 90 %" in text
    assert "<argument>" in text
    assert "gradient_clip: 1.0" in text


def test_the_time_is_that_of_all_starts_also_of_steps_that_were_done_again(run: RunFolder) -> None:
    """A start that is killed before its first checkpoint leaves lines that the next one writes anew."""
    step = {"loss": 3.0, "text_loss": 2.0, "tokens": 1000, "images": 10}
    starts = [(1, range(100, 401, 100)), (2, range(5000, 5061, 20)), (3, [9000])]
    write_lines(
        run.metrics,
        [
            {"step": number + 1, **step, "time": float(time), "attempt": attempt}
            for attempt, times in starts
            for number, time in enumerate(times)
        ],
    )
    text = " ".join(read(write_report(run.path)).text.split())
    assert "which took 6m 00s (all 3 starts together, without the time between them)" in text
    write_lines(run.metrics, [{"step": 1, **step, "time": 5.0, "attempt": 1}])
    assert "which took 0s on" in " ".join(read(write_report(run.path)).text.split())


@pytest.mark.parametrize(
    ("family", "losses", "titles"),
    [
        (
            "transfusion",
            ("text", "image"),
            ["Text loss, nats a token", "Image loss, squared error of the noise"],
        ),
        ("chameleon", ("text", "image"), ["Text loss, nats a token", "Image loss, nats a token"]),
        ("of-somebody", ("text", "trace"), ["Text loss, nats a token", "Trace loss"]),
    ],
)
def test_each_loss_of_a_family_has_a_curve_with_its_unit(
    run: RunFolder, family: str, losses: tuple[str, ...], titles: list[str]
) -> None:
    run.config.write_text(f"model: {{family: {family}}}\n")
    lines: list[dict[str, Any]] = [
        {"step": step, "loss": 3.0, "tokens": step, "images": 0, "time": 0.0, "attempt": 1}
        | {f"{name}_loss": 1.0 + step for name in losses}
        for step in range(1, 4)
    ]
    validation = {f"validation_{name}_loss": 2.0 for name in losses}
    # What a suite of a training found is no loss of the training.
    found = {"step": 4, "eval_pairs_image_loss": 0.5, "time": 1.0, "attempt": 1}
    write_lines(run.metrics, [*lines, {"step": 4, **validation, "time": 1.0, "attempt": 1}, found])
    html = write_report(run.path).read_text(encoding="utf-8")
    assert re.findall(r"<h3>([^<]*)</h3>", html) == [*titles, "Total loss, as weighted"]
    text = " ".join(Page(html).text.split())
    assert "3 tokens and 0 images in 4 steps" in text and "Dots: validation data" in text
    assert f"the {losses[1]} loss at 4" in text


MODALITIES = "[{name: sound, kind: mel, shapes: [1x1024], patch: 1x1024, diffusion: {prediction: flow}}]"


def test_each_modality_has_its_losses_by_timestep_too(run: RunFolder) -> None:
    config = ["run.name=first", "diffusion.prediction=v", f"modalities={MODALITIES}"]
    dump(load_config(None, config), run.config)
    buckets = [0.5] * 9 + [None]
    line = {"loss": 3.0, "sound_loss": 1.0, "tokens": 1, "images": 7, "time": 0.0, "attempt": 1}
    line |= {"image_loss": None, "image_loss_by_timestep": [None] * 10, "sound_loss_by_timestep": buckets}
    write_lines(run.metrics, [{"step": 1, **line}, {"step": 2, "validation_sound_loss": 2.0}])
    html = write_report(run.path).read_text(encoding="utf-8")
    losses = ["Sound loss, squared error of the flow velocity", "Total loss, as weighted"]
    assert re.findall(r"<h3>([^<]*)</h3>", html) == [*losses, "Sound loss by timestep"]
    text = " ".join(Page(html).text.split())
    assert "1 tokens and 7 images and other media" in text and "a nearly clean sound" in text
    assert "Predicting the noise" not in text
    write_lines(run.metrics, [{"step": 1, **line, "image_loss_by_timestep": buckets}])
    html = write_report(run.path).read_text(encoding="utf-8")
    assert "<h3>Image loss by timestep</h3>" in html and "a nearly clean image" in html


@pytest.fixture
def heard_run(run: RunFolder) -> RunFolder:
    """Spoken words: three of each, the first of which is real too, and the second too long for a page."""
    evaluation = run.path / "evaluation"
    for number in range(6):
        make_image(evaluation / "generated" / f"{number}.png")
        make_image(evaluation / "validation" / f"{number}.png")
        for kind in ("generated", "validation"):
            (evaluation / kind / f"{number}.wav").write_bytes(b"RIFF" + bytes([number]) * 20)
    (evaluation / "generated" / "4.wav").write_bytes(bytes(200_000))
    words = ["one"] * 3 + ["two"] * 3
    write_lines(
        evaluation / "generated" / "index.jsonl",
        [{"file": f"{k}.png", "prompt": word, "seed": k} for k, word in enumerate(words)],
    )
    write_lines(
        evaluation / "captions.jsonl",
        [
            {"image": f"evaluation/validation/{k}.png", "caption": "one", "expected": "one", "correct": k < 4}
            for k in range(6)
        ],
    )
    return run


def test_sounds_are_seen_and_heard_and_real_ones_stand_beside_them(heard_run: RunFolder) -> None:
    page = read(write_report(heard_run.path))
    sounds = [address for address in page.addresses if not address.startswith("data:image/")]
    assert all(address.startswith("data:audio/wav;base64,") for address in sounds)
    heard = [base64.b64decode(address.partition(",")[2])[-1] for address in sounds]
    # Two of each word but the long one, a real one where there is such a word, and what was written down wrongly.
    assert heard == [0, 1, 0, 3, 4, 5] and page.tags.count("audio") == 6
    assert page.tags.count("img") == 2 + 1 + 2 + 6
    text = " ".join(page.text.split())
    assert "Sounds from texts" in text and "2 of 3" in text and "a real one" in text
    assert "Transcriptions of validation sounds" in text and "4 of 6 are right" in text


def test_where_sounds_were_measured_and_then_images_the_page_is_of_images(whole_run: RunFolder) -> None:
    html = write_report(whole_run.path).read_text(encoding="utf-8")
    assert "Images from captions" in html and "Captions from validation images" in html
    assert "audio" not in html and "and other media" not in html


def test_the_first_and_the_last_grid_are_shown_and_few_between(whole_run: RunFolder) -> None:
    steps = re.findall(r"<figcaption>step (\d+)</figcaption>", write_report(whole_run.path).read_text())
    assert steps[0] == "0" and steps[-1] == "90" and len(steps) == 6


def test_colours_are_the_pages_own(whole_run: RunFolder) -> None:
    html = write_report(whole_run.path).read_text()
    assert "var(--text-series)" in html and "var(--ink)" in html
    assert not re.search(r"#0[1-4]0[1-4]0[1-4]", html), "no stand-in colour is left"
    ids = re.findall(r'<clipPath id="([^"]+)"', html)
    assert len(ids) == len(set(ids)) > 3, "the drawings do not take each other's clip paths"


def test_the_same_run_gives_the_same_bytes(whole_run: RunFolder) -> None:
    assert write_report(whole_run.path).read_bytes() == write_report(whole_run.path).read_bytes()


def test_a_run_that_only_began_has_a_report(run: RunFolder) -> None:
    text = read(write_report(run.path)).text
    assert "No step has been logged yet" in text and "transfusion eval" in text


@pytest.mark.parametrize(
    ("diffusion", "title"),
    [
        ({}, "squared error of the noise<"),
        ({"prediction": "flow"}, "squared error of the flow velocity<"),
        ({"prediction": "v", "loss_weight": "min-snr"}, "squared error of the velocity, by min-SNR<"),
    ],
)
def test_the_image_loss_is_named_by_the_objective(
    run: RunFolder, diffusion: dict[str, str], title: str
) -> None:
    log_steps(run, range(1, 3))
    dump(load_config(None, [f"diffusion.{key}={value}" for key, value in diffusion.items()]), run.config)
    page = write_report(run.path).read_text(encoding="utf-8")
    assert title in page
    assert ("Predicting the noise is hardest" in page) == (not diffusion)


def test_one_step_and_no_config_are_enough(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    log_steps(folder, range(1, 2))
    text = read(write_report(folder.path)).text
    assert "1,000 tokens" in text and "config.yaml is missing" in text


def test_broken_parts_are_left_out(whole_run: RunFolder) -> None:
    (whole_run.path / "metrics.json").write_text('{"torn')
    (whole_run.path / "evaluation" / "captions.jsonl").write_bytes(b'{"image": "no.png", "capt\xff')
    whole_run.grid(0).write_text("not an image")
    (whole_run.path / "evaluation" / "generated" / "0.png").unlink()
    with open(whole_run.metrics, "a") as file:
        file.write('{"step": 41, "lo')
    text = read(write_report(whole_run.path)).text
    assert "No metrics.json yet" in text


def test_a_folder_of_something_else_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not the folder of a run"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="not the folder of a run"):
        write_report(tmp_path / "missing")


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_a_missing_package_is_told_with_the_remedy(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match="pip install matplotlib jinja2"):
        write_report(run.path)


def decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_small_images_grow_without_blur(tmp_path: Path) -> None:
    make_image(tmp_path / "small.png")
    grown = np.asarray(decoded(data_uri(tmp_path / "small.png")))
    assert grown.shape == (96, 96)
    small = np.asarray(Image.open(tmp_path / "small.png"))
    assert (grown == small.repeat(12, 0).repeat(12, 1)).all()


def test_large_images_shrink(tmp_path: Path) -> None:
    make_image(tmp_path / "large.png", size=512, colour=True)
    uri = data_uri(tmp_path / "large.png")
    assert uri.startswith("data:image/jpeg") and max(decoded(uri).size) == 128
    assert data_uri(tmp_path / "missing.png") == ""


def test_a_run_of_large_images_stays_below_three_megabytes(run: RunFolder) -> None:
    folder = run.path / "evaluation" / "generated"
    make_image(folder / "one.png", size=256, colour=True)
    write_lines(folder / "index.jsonl", [{"file": "one.png", "prompt": str(k // 10)} for k in range(400)])
    assert write_report(run.path).stat().st_size < 3_000_000


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.96512, "0.9651"),
        (3, "3"),
        (6_553_600, "6,553,600"),
        (0.0, "0"),
        (1e-5, "1e-05"),
        (123456.7, "123,457"),
        (float("nan"), "-"),
        (None, "-"),
        ("below 3", "below 3"),
        (True, "True"),
    ],
)
def test_figures_are_readable(value: Any, text: str) -> None:
    assert figure(value) == text
