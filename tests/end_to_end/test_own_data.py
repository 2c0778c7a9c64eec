"""The guide's walk-through for one's own images, command by command, on a few images and steps."""

from __future__ import annotations

import json
import random
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SMALLER = [
    "model.layers=1", "model.hidden_size=64", "model.heads=2", "data.global_batch_size=2", "data.micro_batch_size=2",
    "train.steps=2", "train.precision=fp32", "train.threads=1",
]  # fmt: skip


def draw_images(folder: Path) -> None:
    """Coloured circles and squares of odd sizes, each with a caption beside it."""
    folder.mkdir()
    choose = random.Random(0)
    for number in range(60):
        color, shape = choose.choice(["red", "green", "blue"]), choose.choice(["circle", "square"])
        image = Image.new("RGB", (choose.randint(20, 60), choose.randint(20, 60)), "white")
        pen = ImageDraw.Draw(image)
        (pen.ellipse if shape == "circle" else pen.rectangle)((5, 5, 18, 18), fill=color)
        image.save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(f"a {color} {shape}")


def commands() -> list[list[str]]:
    """The lines of the first block of the guide."""
    section = (ROOT / "docs/guides/data.md").read_text(encoding="utf-8").split("```")[1]
    return [
        shlex.split(line, comments=True)[1:]
        for line in section.splitlines()
        if line.startswith("transfusion ")
    ]


def test_the_walk_through_of_the_guide(workplace: Any, tmp_path: Path) -> None:
    place = type(workplace)(tmp_path)
    draw_images(tmp_path / "FOLDER")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "photo.jpg").write_bytes((tmp_path / "FOLDER" / "000.png").read_bytes())
    said = {}
    for command in commands():
        arguments = [re.sub(r"^(2048|8|100)$", lambda match: {"2048": "300", "8": "2", "100": "3"}[match[0]], part)
                     for part in command]  # fmt: skip
        if command[0] == "prepare":
            arguments += ["--validation", "0.2"]
        if command[0] == "train":
            arguments = [part for part in arguments if not part.startswith("train.steps")] + SMALLER
        if command[0] != "doctor":
            said[command[0]] = place.run(*arguments)
    assert {
        "prepare",
        "data",
        "tokenizer",
        "train",
        "export",
        "sample",
        "caption",
        "eval",
        "report",
    } <= said.keys()
    assert len(list((tmp_path / "images").glob("*.png"))) == 2
    assert json.loads(said["caption"].splitlines()[-1])["image"] == "photo.jpg"
    metrics = json.loads((tmp_path / "runs/own/metrics.json").read_text())
    assert {"images_image_loss", "caption_token_f1"} <= metrics.keys()
    page = (tmp_path / "runs/own/report.html").read_text(encoding="utf-8")
    evidence = tmp_path / "runs/own/evaluation"
    drawn = (evidence / "generated" / "index.jsonl").read_text().splitlines()
    said_of = (evidence / "captions.jsonl").read_text().splitlines()
    assert drawn and said_of and page.count("data:image/png") == len(drawn) + len(said_of)
    assert "Text loss, nats a token" in page
