"""Shards of captioned images of noise."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from transfusion.data.shards.webdataset import write_shards


def png(size: tuple[int, int], seed: int) -> bytes:
    stream = io.BytesIO()
    values = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    Image.fromarray(values).save(stream, format="PNG")
    return stream.getvalue()


def write_pairs(folder: Path, captions: Sequence[str], sizes: Sequence[tuple[int, int]] = ((8, 8),)) -> str:
    """Shards of captioned images whose sizes take turns; a pattern that names them."""
    samples = [
        {"png": png(sizes[number % len(sizes)], number), "txt": caption.encode()}
        for number, caption in enumerate(captions)
    ]
    write_shards(samples, folder, per_shard=25)
    return f"{folder}/*.tar"


def source(shards: str, name: str = "pairs") -> dict[str, str]:
    return {"name": name, "shards": shards}
