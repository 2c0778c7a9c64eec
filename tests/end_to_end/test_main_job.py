"""Prepare, train under ZeRO-3, export, sample, caption, evaluate, report: the commands of the README."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from transfusion.observe.metrics import read_metrics

ROOT = Path(__file__).parents[2]


def test_the_run_folder_holds_what_it_should(workplace: Any, trained: str) -> None:
    run = workplace.folder / trained
    for name in ("config.yaml", "env.json", "metrics.jsonl", "log.txt", "samples", "checkpoints", "export"):
        assert (run / name).exists(), name
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 8))
    for line in lines:
        assert line["loss"] > 0 and line["text_loss"] > 0 and line["image_loss"] > 0
        assert len(line["image_loss_by_timestep"]) == 10
        assert line["gradient_norm"] > 0 and line["skipped"] == 0
    assert lines[-1]["validation_text_loss"] > 0 and lines[-1]["validation_image_loss"] > 0
    # At step 0, at every save, and at the end.
    assert [path.stem for path in sorted((run / "samples").glob("*.png"))] == [
        f"step_{step:07d}" for step in (0, 3, 6, 7)
    ]
    environment = json.loads((run / "env.json").read_text())
    assert "torch" in environment["packages"]


@pytest.mark.slow
def test_sample_writes_images_and_an_index(workplace: Any, trained: str) -> None:
    model = f"{trained}/export"
    command = [
        "sample",
        model,
        "--prompt",
        "a handwritten three",
        "--prompt",
        "the digit 7",
        "-n",
        "2",
        "--cfg",
        "3",
    ]
    workplace.run(*command, "--steps", "3", "--seed", "5", "--out", "images")
    folder = workplace.folder / "images"
    index = [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]
    assert [entry["seed"] for entry in index] == [5, 6, 7, 8]
    assert [entry["prompt"] for entry in index] == ["a handwritten three"] * 2 + ["the digit 7"] * 2
    for entry in index:
        with Image.open(folder / entry["file"]) as image:
            assert (image.size, image.mode) == ((8, 8), "L")
    # The same seed draws the same image, in whatever company.
    alone = ["sample", model, "--prompt", "the digit 7", "--cfg", "3", "--steps", "3", "--seed", "7"]
    workplace.run(*alone, "--out", "alone")
    assert (workplace.folder / "alone" / "0000.png").read_bytes() == (folder / "0002.png").read_bytes()


@pytest.mark.slow
def test_caption_prints_one_object_a_line(workplace: Any, trained: str) -> None:
    workplace.run(
        "sample", f"{trained}/export", "--prompt", "a", "-n", "2", "--steps", "1", "--out", "to-caption"
    )
    images = ["to-caption/0000.png", "to-caption/0001.png"]
    out = workplace.run("caption", f"{trained}/export", *images, "--json", "--max-tokens", "4")
    objects = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert [entry["image"] for entry in objects] == images
    assert all(isinstance(entry["caption"], str) for entry in objects)


@pytest.mark.slow
def test_evaluation_and_report(workplace: Any, trained: str) -> None:
    suites = ["--suite", "validation", "--suite", "digits"]
    out = workplace.run("eval", f"{trained}/export", *suites, "--out", trained)
    metrics = json.loads((workplace.folder / trained / "metrics.json").read_text())
    for name in (
        "generation_accuracy", "generation_diversity", "caption_accuracy", "text_loss_nats_per_token",
        "text_loss_nats_per_byte", "bigram_nats_per_token", "bigram_nats_per_byte", "classifier_accuracy_on_real",
    ):  # fmt: skip
        assert name in out
        assert metrics[name] == metrics["details"][name]["value"]
        assert metrics["details"][name]["how"]
    assert metrics["classifier_accuracy_on_real"] > 0.98
    # Seven steps teach nothing: the figures must say so.
    assert metrics["details"]["generation_accuracy"]["passed"] is False
    assert metrics["details"]["text_loss_nats_per_token"]["passed"] is False
    workplace.run("eval", f"{trained}/export", *suites, "--out", trained, "--check", code=3)
    workplace.run("report", trained)
    page = (workplace.folder / trained / "report.html").read_text()
    assert "Generation accuracy" in page and "data:image/png;base64" in page
    # Nothing is fetched: names of XML vocabularies are the only addresses in it.
    assert not re.search(r"""(?:src|href)=["']?https?:|url\(["']?https?:""", page)


@pytest.mark.slow
@pytest.mark.parametrize("document", ["guides/generation", "guides/data", "guides/kernel"])
def test_the_python_of_the_documents_runs(
    document: str, workplace: Any, trained: str, tmp_path: Path
) -> None:
    text = (ROOT / "docs" / f"{document}.md").read_text(encoding="utf-8")
    (tmp_path / "script.py").write_text("\n".join(re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "data").mkdir()
    for path in (workplace.folder / "data").iterdir():
        (tmp_path / "data" / path.name).symlink_to(path)
    Image.new("RGB", (16, 16), "red").save(tmp_path / "tomato.png")
    (tmp_path / "model").symlink_to(workplace.folder / trained / "export")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(workplace.folder / trained)
    ended = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stdout, ended.stderr
