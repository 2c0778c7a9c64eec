"""The benchmark of codecs, small: the PCA is one, and a difference to diffusers is seen."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import codec as benchmark
from transfusion.codec.networks import new_network, save_network
from transfusion.codec_train.images import ImageSet
from transfusion.codec_train.settings import CodecTrainConfig
from transfusion.config.load import load_as
from transfusion.data.shards.webdataset import write_shards


@pytest.fixture
def images(tmp_path: Path) -> ImageSet:
    """Mixtures of three patterns, so that three components say all but what rounding adds."""
    random = np.random.default_rng(0)
    patterns = random.random((3, 8, 8, 3)) / 3
    samples = []
    for weights in random.random((20, 3)):
        stream = io.BytesIO()
        values = (255 * np.tensordot(weights, patterns, 1)).round().astype(np.uint8)
        Image.fromarray(values).save(stream, "PNG")
        samples.append({"png": stream.getvalue(), "txt": b"a mixture"})
    write_shards(samples, tmp_path / "shards", per_shard=20)
    return ImageSet(f"{tmp_path}/shards/*.tar", channels=3, image_size=8)


def test_components_that_say_all_give_all_back(images: ImageSet) -> None:
    one, three = (benchmark.pca_psnr(images, images, components) for components in (1, 3))
    assert three > 50 > one


def test_a_difference_to_diffusers_is_seen(images: ImageSet, tmp_path: Path) -> None:
    sizes = {
        "channels": 3,
        "latent_channels": 4,
        "widths": (8, 8),
        "layers": 1,
        "groups": 4,
        "attention": True,
    }
    for kind, codebook in (("kl", {}), ("vq", {"codebook_size": 16, "code_width": 3})):
        torch.manual_seed(0)
        network = new_network(kind, image_size=8, **sizes, **codebook)  # type: ignore[arg-type]
        save_network(network, tmp_path / kind, **({"scaling_factor": 0.5} if kind == "kl" else {}))
        codec = benchmark.settings(tmp_path / kind)
        assert benchmark.equal_to_diffusers(codec, images) == {"encoded": True, "images": True}
    values = {"kind": "kl", "folder": str(tmp_path / "kl"), "image_size": 8, "scale": 0.25}
    other = benchmark.CodecConfig.model_validate(benchmark.completed(values, []))
    assert not benchmark.equal_to_diffusers(other, images)["encoded"]


@pytest.mark.parametrize("name", benchmark.CONFIGS)
def test_a_codec_that_is_missing_is_trained(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(benchmark.subprocess, "run", lambda command, check: asked.append(command))
    folder = benchmark.trained(name, Path("data"), tmp_path)
    [[_, _, _, codec, train, config, *overrides]] = asked
    resolved = load_as(CodecTrainConfig, config, overrides)
    assert (codec, train) == ("codec", "train") and folder == Path(resolved.run.folder) / "codec"
    assert resolved.images.shards == "data/train/*.tar" and resolved.images.validation == "data/val/*.tar"
    assert resolved.kind == name.removeprefix("emoji-") and resolved.images.image_size == 64
    folder.mkdir(parents=True)
    assert benchmark.trained(name, Path("data"), tmp_path) == folder and len(asked) == 1


def test_each_bar_can_be_missed() -> None:
    kl = {
        "psnr": 26.5,
        "equal_to_diffusers": {"encoded": True, "images": True},
        "trained": {"cpu_seconds": 2000.0},
    }
    assert all(benchmark.verdict({"emoji-kl": kl}).values())
    changes = (
        {"psnr": 25.9},
        {"equal_to_diffusers": {"encoded": False}},
        {"trained": {"cpu_seconds": 4900.0}},
    )
    for change in changes:
        assert list(benchmark.verdict({"emoji-kl": kl | change}).values()).count(False) == 1
