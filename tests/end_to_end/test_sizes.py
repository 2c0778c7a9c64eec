"""Images of three shapes in one run: trained together, drawn in the shape asked for, or in the one that fits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from transfusion.generate import Pipeline
from transfusion.observe.metrics import read_metrics

from .conftest import Command

MODEL = (
    "model: {layers: 2, hidden_size: 64, heads: 2, patch_size: 4, position: 2d}\n"
    "codec: {channels: 3, image_sizes: [16x16, 16x32, 32x16]}\n"
    "data:\n"
    "  tokenizer: tokenizer.model\n"
    "  sources: [{name: images, shards: data/train/*.tar}]\n"
    "  sequence_length: 128\n"
    "  global_batch_size: 4\n"
    "  caption_first: 0.9\n"
    "optimizer: {learning_rate: 2.0e-3, warmup_steps: 5, ema_decay: 0}\n"
    "diffusion: {prediction: flow}\n"
    "train: {steps: 200, threads: 1, precision: fp32}\n"
    "log: {every: 10}\n"
    "sample_grid: {prompts: [wide red], sizes: [16x32, 32x16], steps: 3}\n"
)
SHAPES = {"wide red": (40, 20), "tall blue": (20, 42), "even green": (24, 25)}


def draw_images(folder: Path) -> None:
    """One colour, a little darker or lighter each, in a shape that its caption tells."""
    folder.mkdir()
    for number in range(24):
        channel, (caption, size) = number % 3, list(SHAPES.items())[number % 3]
        colour = [30, 30, 30]
        colour[(0, 2, 1)[channel]] = 200 + number
        Image.new("RGB", size, tuple(colour)).save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(caption)


@pytest.mark.slow
def test_from_images_of_three_shapes_to_drawn_ones(transfusion: Command, tmp_path: Path) -> None:
    draw_images(tmp_path / "own")
    (tmp_path / "model.yaml").write_text(MODEL)
    transfusion("prepare", "own", "--out", "data", "--validation", "0.1")
    transfusion("tokenizer", "train", "data/train/*.tar", "--out", "tokenizer.model", "--vocabulary", "280")
    transfusion("train", "model.yaml", "run.dir=run")
    metrics = read_metrics(Path("run/metrics.jsonl"))
    assert metrics[-1]["image_loss"] < 0.5 * metrics[0]["image_loss"]
    with Image.open(next(Path("run").glob("**/*.png"))) as grid:
        assert grid.height > grid.width, "a row of the grid for each size"
    transfusion("export", "run", "--out", "model")
    sample = ("sample", "model", "--prompt", "wide red", "--cfg", "1", "--steps", "25", "--out")
    for size, shape in (("16x32", (32, 16)), ("32x16", (16, 32))):
        transfusion(*sample, size, "--size", size)
        with Image.open(f"{size}/0000.png") as image:
            assert image.size == shape
            red, green, blue = np.asarray(image).mean((0, 1))
            assert size == "32x16" or red > 1.5 * max(green, blue), (red, green, blue)
    said = transfusion(*sample, "refused", "--size", "8x8", code=2)
    assert "choose 16x16 or 16x32 or 32x16" in said and not Path("refused").exists()
    assert "--size: 'wide' is not a size" in transfusion(*sample, "refused", "--size", "wide", code=2)

    # Nothing but its caption tells the model which shape to begin.
    prompts = [[caption] for caption in SHAPES]
    answers = Pipeline.from_export("model").generate(
        prompts, max_tokens=8, max_images=1, steps=2, guidance=1.0
    )
    assert [answer[1].shape[1:] for answer in answers] == [(16, 32), (32, 16), (16, 16)]  # type: ignore[union-attr]

    said = transfusion("caption", "model", *(f"{size}/0000.png" for size in ("16x32", "32x16")), "--json")
    assert [json.loads(line)["image"] for line in said.splitlines()[-2:]] == [
        "16x32/0000.png",
        "32x16/0000.png",
    ]
    Image.new("RGB", (400, 10)).save("strip.png")
    assert "strip.png: it is more than 20" in transfusion("caption", "model", "strip.png", code=2)
