"""Pins what must stay the same while code is moved: batches, losses, drawn images and an exported folder.

    .venv/bin/python campaigns/pinned.py OUT.json [--against BEFORE.json]

Trains the quickstart's configuration for 50 steps, with the licence of this project as text, in one process and under
ZeRO-3 on two. Writes hashes of 20 batches on one rank and on two, the losses of both runs, hashes of ten images drawn
from the first, and one of each file that it exports. With `--against` it names what differs from a record made before,
and exits with 3. Floating point gives the same bits on one machine only: compare records of one. Takes a minute.
`tests/assets/pinned.json` is such a record, and `tests/end_to_end/test_pinned.py` holds every change against it.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file

from transfusion.config import load_config
from transfusion.data.loading.loader import Loader
from transfusion.sequence.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
CONFIG = str(ROOT / "configs" / "train" / "quickstart.yaml")
BATCHES, STEPS, IMAGES = 20, 50, 10
LOSSES = ("loss", "text_loss", "image_loss", "gradient_norm")
DIFFERENT = 3


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--against", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pinned = pin(Path(folder))
    arguments.out.write_text(json.dumps(pinned, indent=1) + "\n", encoding="utf-8")
    if not arguments.against:
        return 0
    before = json.loads(arguments.against.read_text(encoding="utf-8"))
    changed = [name for name in sorted(before.keys() | pinned.keys()) if before.get(name) != pinned.get(name)]
    print("different: " + ", ".join(changed) if changed else "nothing is different")
    return DIFFERENT if changed else 0


def pin(folder: Path) -> dict[str, Any]:
    """Everything that is compared, by name."""
    prepare(folder)
    pinned: dict[str, Any] = {
        "batches, one rank": batches(folder, 1),
        "batches, two ranks": batches(folder, 2),
        "losses, one process": losses(folder, processes=1),
        "losses, ZeRO-3": losses(folder, processes=2),
    }
    run(folder, "export", "runs/1", "--out", "model")
    for file in sorted((folder / "model").iterdir()):
        pinned[f"export, {file.name}"] = (
            weights(file) if file.suffix == ".safetensors" else digest(file.read_bytes())
        )
    drawing = (
        "--prompt",
        "a handwritten three",
        "-n",
        str(IMAGES),
        "--cfg",
        "3",
        "--steps",
        "10",
        "--sampler",
        "ddpm",
        "--seed",
        "0",
    )
    run(folder, "sample", "model", "--out", "images", *drawing)
    pinned["images"] = [
        digest(Image.open(file).tobytes()) for file in sorted((folder / "images").glob("*.png"))
    ]
    return pinned


def prepare(folder: Path) -> None:
    """Digits, the licence as text and a tokenizer, where the quickstart has its own."""
    paragraphs = (ROOT / "LICENSE").read_text(encoding="utf-8").split("\n\n")
    lines = [json.dumps({"text": paragraph.strip()}) for paragraph in paragraphs if paragraph.strip()]
    (folder / "texts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    run(folder, "prepare", "digits", "--out", "data/quickstart/digits")
    run(folder, "prepare", "texts.jsonl", "--out", "data/quickstart/text")
    shards = ("data/quickstart/digits/train/*.tar", "data/quickstart/text/train/*.tar")
    made = ("--out", "data/quickstart/tokenizer.model", "--vocabulary", "512")
    run(folder, "tokenizer", "train", *shards, *made)


def run(folder: Path, *command: str, processes: int = 1) -> None:
    """A command of the package, as a user would type it in `folder`."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), "-m", "transfusion", *command],
        cwd=folder, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
    )  # fmt: skip


def batches(folder: Path, ranks: int) -> list[str]:
    """A hash of each batch that each rank is given."""
    data = folder / "data" / "quickstart"
    tokenizer = Tokenizer(data / "tokenizer.model")
    kinds = ("digits", "text")
    shards = [f"data.sources.{i}.shards={data}/{kind}/train/*.tar" for i, kind in enumerate(kinds)]
    config = load_config(CONFIG, [f"data.tokenizer={data}/tokenizer.model", *shards])
    config = config.with_vocabulary(tokenizer.vocabulary)
    hashes = []
    for rank in range(ranks):
        with Loader(config, config.data.sources, tokenizer, rank=rank, world_size=ranks) as loader:
            for _ in range(BATCHES // ranks):
                hashed = hashlib.sha256()
                for part in parts(loader.next_step()):
                    hashed.update(part)
                hashes.append(hashed.hexdigest())
    return hashes


def parts(value: Any) -> Iterator[bytes]:
    """The bytes of all tensors and numbers inside, in order. Names are left out: they may change."""
    if isinstance(value, torch.Tensor):
        yield f"{value.dtype}{tuple(value.shape)}".encode()
        yield value.contiguous().numpy().tobytes()
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            held = getattr(value, field.name)
            # These came after the first pins. `kind` says only what the type of the values says too. The others are
            # None where nothing is new, and an image was number 1 of the modalities before it had its name.
            if field.name == "modality" and held == "image":
                held = 1
            if field.name in ("kind", "is_empty") or (
                held is None and field.name in ("is_context_I", "value_I", "second")
            ):
                continue
            yield from parts(held)
    elif isinstance(value, (list, tuple)):
        for member in value:
            yield from parts(member)
    else:
        yield repr(value.value if isinstance(value, enum.Enum) else value).encode()


def losses(folder: Path, processes: int) -> list[list[float]]:
    """`LOSSES` of each step of a training in so many processes, which leaves its run in runs/PROCESSES."""
    out = f"runs/{processes}"
    settings = (f"run.dir={out}", f"train.steps={STEPS}", "train.threads=1", "sample_grid.prompts=[]")
    run(folder, "train", CONFIG, *settings, processes=processes)
    lines = (folder / out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    # Validation losses stand in lines of their own.
    return [[line[name] for name in LOSSES] for line in map(json.loads, lines) if "loss" in line]


def weights(file: Path) -> str:
    """A hash of all weights in the order of their bytes: their names may change."""
    tensors = load_file(file).values()
    return digest(b"".join(sorted(tensor.contiguous().numpy().tobytes() for tensor in tensors)))


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
