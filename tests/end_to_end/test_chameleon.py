"""The Chameleon baseline by one switch: trained, gone on with, exported, drawn with and judged as any other model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from .conftest import Command
from .test_codec import CODEC, MODEL

COLOURS = {"red": (220, 30, 30), "blue": (30, 60, 220), "green": (30, 180, 60)}


def draw_squares(folder: Path) -> None:
    """Squares of one of three colours, captions that name it."""
    folder.mkdir()
    for number in range(120):
        name = list(COLOURS)[number % 3]
        pixels = np.full((16, 16, 3), 255, np.uint8)
        pixels[3 : 9 + number % 4, 4:12] = COLOURS[name]
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(f"a {name} square")


@pytest.mark.slow
def test_both_models_in_one_grid(transfusion: Command, tmp_path: Path) -> None:
    draw_squares(tmp_path / "own")
    (tmp_path / "model.yaml").write_text(
        MODEL.replace("runs/codec/codec", "kl/codec").replace("latents/", "kl/shards/")
    )
    vq = {
        "model": {"family": "chameleon", "patch_size": 1},
        "codec": {"kind": "vq", "folder": "vq/codec"},
        "data": {"sources": [{"name": "images", "shards": "vq/shards/*.tar"}], "sequence_length": 96},
    }
    (tmp_path / "vq.yaml").write_text(yaml.safe_dump(vq))
    transfusion("prepare", "own", "--out", "data", "--validation", "0.2")
    transfusion("tokenizer", "train", "data/train/*.tar", "--out", "tokenizer.model", "--vocabulary", "275")
    for kind in ("kl", "vq"):
        codec = CODEC.replace("kind: kl", f"kind: {kind}").replace(
            "groups: 4", "groups: 4, codebook_size: 16, code_width: 4"
        )
        (tmp_path / "codec.yaml").write_text(codec)
        transfusion("codec", "train", "codec.yaml", f"run.dir={kind}")
        transfusion("codec", "encode", f"{kind}/codec", "data/train/*.tar", "--out", f"{kind}/shards")
    images = "data.sources.0.shards=data/train/*.tar"
    transfusion("classifier", "model.yaml", "--out", "classifier.safetensors", images, "--epochs", "3")
    assert "the classifier needs images" in transfusion("classifier", "model.yaml", "--out", "no", code=2)
    grid = {
        "base": "model.yaml",
        "axes": {"model": {"transfusion": {}, "chameleon": {"base": "vq.yaml"}}},
        "suites": ["validation", "images", "captions"],
        "classifier": "classifier.safetensors",
    }
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid, sort_keys=False))
    run = ("scaling", "run", "grid.yaml", "--out", "runs")
    transfusion(*run)
    records = [json.loads(line) for line in (tmp_path / "runs" / "cells.jsonl").read_text().splitlines()]
    assert [record["cell"] for record in records] == ["transfusion", "chameleon"]
    for record in records:
        assert record["metrics"]["classifier_frechet"] > 0
        assert 0 <= record["metrics"]["caption_token_f1"] <= 1
    assert "images_image_nats_per_token" in records[1]["metrics"]
    folder = "runs/chameleon.seed-0"
    transfusion("sample", f"{folder}/export", "--prompt", "a red square", "--out", "drawn", "-n", "2")
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 2
    assert "tokens" in transfusion(
        "train", "grid.yaml#chameleon", "codec.kind=kl", "codec.folder=kl/codec", code=2
    )
    told = transfusion(
        "train", "grid.yaml#chameleon", "data.sources.0.shards=kl/shards/*.tar", "run.dir=x", code=2
    )
    assert "were made by codec" in told and not list((tmp_path / "x").glob("*.jsonl"))
