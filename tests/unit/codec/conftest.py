"""Tiny autoencoders as diffusers saves them, and shards of images."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from transfusion.codec.networks import new_network, save_network
from transfusion.config import CodecConfig
from transfusion.config.codec_folder import completed
from transfusion.data.shards.webdataset import write_shards

SIZES: dict[str, Any] = {"channels": 3, "latent_channels": 4, "widths": (8, 8, 8), "layers": 1, "groups": 4}


def write_autoencoder(kind: Any, folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A network with random weights that all matter, images of 16 pixels to 4 x 4."""
    torch.manual_seed(seed)
    codebook = {"codebook_size": 32, "code_width": 3} if kind == "vq" else {}
    network = new_network(kind, attention=True, image_size=16, **{**SIZES, **codebook, **changes})
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    statistics = {"scaling_factor": 0.5, "shift_factor": 0.25} if kind == "kl" else {}
    save_network(network, folder, **statistics)
    return folder


@pytest.fixture(scope="session")
def write_folder() -> Callable[..., Path]:
    return write_autoencoder


@pytest.fixture(scope="session")
def kl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_autoencoder("kl", tmp_path_factory.mktemp("kl"))


@pytest.fixture(scope="session")
def vq_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_autoencoder("vq", tmp_path_factory.mktemp("vq"))


@pytest.fixture
def settings() -> Callable[..., CodecConfig]:
    """settings(folder, **values) -> the section `codec` as a loaded configuration has it."""

    def make(folder: Path, **values: Any) -> CodecConfig:
        problems: list[str] = []
        kind = "vq" if "VQModel" in (folder / "config.json").read_text() else "kl"
        plain = completed({"kind": kind, "folder": str(folder), "image_size": 16, **values}, problems)
        assert problems == []
        return CodecConfig.model_validate(plain)

    return make


@pytest.fixture
def images() -> torch.Tensor:
    """uint8 [3, 3, 16, 16]"""
    return torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of six images of smooth colours, the last of which cannot be decoded, and a text."""
    folder = tmp_path_factory.mktemp("shards")
    random = np.random.default_rng(0)

    def sample(number: int) -> dict[str, bytes]:
        stream = io.BytesIO()
        corners = random.integers(0, 256, (2, 2, 3), dtype=np.uint8)
        Image.fromarray(corners).resize((16, 16), Image.Resampling.BILINEAR).save(stream, "PNG")
        data = stream.getvalue()
        caption = f"image {number}"
        return {
            "json": json.dumps({"caption": caption}).encode(),
            # Its head is whole, its pixels are not.
            "png": data[: len(data) // 2] + bytes(len(data) - len(data) // 2) if number == 11 else data,
            "txt": caption.encode(),
        }

    samples = [sample(number) for number in range(12)]
    write_shards([*samples, {"txt": b"a text without an image"}], folder, per_shard=6)
    return folder


def members(folder: Path) -> dict[str, bytes]:
    """All members of a folder's shards, by name."""
    found = {}
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    return found


def tar_of(path: Path, members: list[tuple[str, bytes]], **header: int) -> bytes:
    """A shard of these members, and its bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as writer:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for field, value in header.items():
                setattr(member, field, value)
            writer.addfile(member, io.BytesIO(data))
    return path.read_bytes()


def pair_of(key: str, shade: int) -> list[tuple[str, bytes]]:
    """An image in one shade of red and its caption."""
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), (shade, 0, 0)).save(stream, "PNG")
    return [(f"{key}.png", stream.getvalue()), (f"{key}.txt", f"shade {shade}".encode())]
