"""Images as the latents of an autoencoder, from nothing to drawn images, by the commands a user would type."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from transfusion.observe.metrics import read_metrics

from .conftest import Command

CODEC = (
    "kind: kl\n"
    "network: {widths: [8, 8], layers: 1, latent_channels: 4, groups: 4, attention: false}\n"
    "loss: {perceptual_features: none, adversarial: 0.0}\n"
    "optimizer: {learning_rate: 3.0e-3, warmup_steps: 0}\n"
    "images: {image_size: 16, shards: data/train/*.tar, validation: data/validation/*.tar}\n"
    "steps: 4\nbatch: 4\nthreads: 1\n"
)
MODEL = (
    "model: {layers: 1, hidden_size: 32, heads: 1, patch_size: 2}\n"
    "codec: {kind: kl, folder: runs/codec/codec, image_size: 16}\n"
    "data:\n"
    "  tokenizer: tokenizer.model\n"
    "  sources: [{name: images, shards: latents/*.tar}]\n"
    "  validation: [{name: images, shards: data/validation/*.tar}]\n"
    "  sequence_length: 64\n"
    "  global_batch_size: 2\n"
    "train: {steps: 2, threads: 1, precision: fp32}\n"
    "sample_grid: {per_prompt: 1, steps: 2}\n"
)


def draw_images(folder: Path) -> None:
    """Smooth colours, a caption beside each."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(24):
        corners = Image.fromarray(random.integers(0, 256, (2, 2, 3), dtype=np.uint8))
        corners.resize((20, 24), Image.Resampling.BILINEAR).save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(f"colours, number {number}")


def test_from_images_to_latents_to_images(transfusion: Command, tmp_path: Path) -> None:
    draw_images(tmp_path / "own")
    (tmp_path / "codec.yaml").write_text(CODEC)
    (tmp_path / "model.yaml").write_text(MODEL)
    transfusion("prepare", "own", "--out", "data", "--validation", "0.3")
    transfusion("tokenizer", "train", "data/train/*.tar", "--out", "tokenizer.model", "--vocabulary", "290")
    said = transfusion("codec", "train", "codec.yaml", "run.dir=runs/codec")
    for loss in ("perceptual", "identity", "adversarial"):
        assert f"{loss} loss: none: this loss of the paper is off" in said
    encode = ("codec", "encode", "runs/codec/codec", "data/train/*.tar", "--out", "latents")
    assert "preview map of" in said
    # A codec that came without its map gets one.
    Path("runs/codec/codec/preview.json").unlink()
    said = transfusion(*encode)
    assert "already there" not in said and "preview map of" in said
    said = transfusion(*encode)
    assert "already there" in said and "preview map of" not in said
    transfusion(
        "codec", "report", "runs/codec/codec", "data/validation/*.tar", "--out", "judged", "--limit", "3"
    )
    assert json.loads(Path("judged.json").read_text())["images"] == 3 and Path("judged.html").exists()

    transfusion("train", "model.yaml", "run.dir=runs/model")
    # Stored latents were trained on, and validation images encoded on the way.
    assert read_metrics(Path("runs/model/metrics.jsonl"))[-1]["validation_image_loss"] > 0
    transfusion("export", "runs/model", "--out", "model")
    sample = ("sample", "model", "--prompt", "colours", "--cfg", "2", "--steps", "3", "--seed", "5", "--out")
    transfusion(*sample, "drawn")
    with Image.open("drawn/0000.png") as image:
        assert (image.size, image.mode) == ((16, 16), "RGB")
    assert Path("model/codec/preview.json").read_bytes() == Path("runs/codec/codec/preview.json").read_bytes()

    # The export stands alone: it has the codec, and draws the same wherever the first one went.
    shutil.rmtree("runs")
    transfusion(*sample, "again")
    assert Path("again/0000.png").read_bytes() == Path("drawn/0000.png").read_bytes()
    said = transfusion("caption", "model", "drawn/0000.png", "--json", "--max-tokens", "3")
    assert json.loads(said.splitlines()[-1])["image"] == "drawn/0000.png"

    # Another codec's latents, in one line and before anything is written.
    transfusion("codec", "train", "codec.yaml", "run.dir=runs/codec", "run.seed=1")
    said = transfusion("train", "model.yaml", "run.dir=runs/other", code=2)
    assert "made by codec" in said and len(said.strip().splitlines()) == 1
    assert not Path("runs/other/checkpoints").exists()
