"""Codecs: exactly what diffusers makes of the same folder, and refused where the folder is not what it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from transfusion.codec import open_codec
from transfusion.config import CodecConfig, Config, load_config
from transfusion.config.codec_folder import WEIGHTS
from transfusion.errors import UserError


@torch.no_grad()
def test_latents_and_images_are_those_of_diffusers(
    kl_folder: Path, settings: Callable[..., CodecConfig], images: torch.Tensor
) -> None:
    from diffusers import AutoencoderKL

    # With gradients on, attention is computed by another kernel.
    theirs = AutoencoderKL.from_pretrained(str(kl_folder)).requires_grad_(False)
    codec = open_codec(settings(kl_folder))
    latents = codec.encode(images)
    mean = theirs.encode(images.float() / 127.5 - 1).latent_dist.mode()
    assert latents.shape == (3, 4, 4, 4) and torch.equal(latents, (mean - 0.25) * 0.5)
    given = torch.randn(3, 4, 4, 4)
    made = ((theirs.decode(given / 0.5 + 0.25).sample + 1) * 127.5).round().clamp(0, 255).byte()
    assert torch.equal(codec.decode(given), made)
    # Drawn latents are read again without a detour over the image.
    assert codec.as_context(given) is given
    assert codec.bound is None and not any(each.requires_grad for each in codec.network.parameters())  # type: ignore[attr-defined]


@torch.no_grad()
def test_tokens_and_images_are_those_of_diffusers(
    vq_folder: Path, settings: Callable[..., CodecConfig], images: torch.Tensor
) -> None:
    from diffusers import VQModel

    theirs = VQModel.from_pretrained(str(vq_folder))
    codec = open_codec(settings(vq_folder))
    tokens = codec.encode(images)
    wanted = theirs.quantize(theirs.encode(images.float() / 127.5 - 1).latents)[2][2]
    assert tokens.shape == (3, 4, 4) and torch.equal(tokens.flatten(), wanted) and codec.codebook_size == 32
    assert len(tokens.unique()) > 3
    made = theirs(images.float() / 127.5 - 1).sample
    # Through the token alone: diffusers adds and takes away the encoded patch on its way, which rounds.
    difference = codec.decode(tokens).int() - ((made + 1) * 127.5).round().clamp(0, 255).int()
    assert difference.abs().max() <= 1


def test_a_configuration_is_filled_in_from_the_folder(kl_folder: Path, vq_folder: Path) -> None:
    words = ["codec.kind=kl", f"codec.folder={kl_folder}", "codec.image_size=32", "model.patch_size=2"]
    config = load_config(None, words)
    assert (config.codec.depth, config.codec.downscale) == (4, 4)
    assert (config.codec.scale, config.codec.shift, config.patches_per_image) == ((0.5,), (0.25,), 16)
    # What is stored with a run needs the folder no more, and says the same when it is there.
    assert Config.model_validate(config.as_dict()) == config
    assert load_config(None, [*words, f"codec.fingerprint={config.codec.fingerprint}"]) == config
    measured = load_config(None, [*words, "codec.scale=0.18215", "codec.shift=[0,1,0,1]"]).codec
    assert measured.scale == (0.18215,) and measured.fingerprint != config.codec.fingerprint
    words = ["model.family=chameleon", "codec.kind=vq", f"codec.folder={vq_folder}"]
    tokens = load_config(None, words)
    assert tokens.codec.codebook_size == 32


def test_channel_statistics_are_applied_as_pipelines_do(
    kl_folder: Path, settings: Callable[..., CodecConfig], tmp_path: Path, images: torch.Tensor
) -> None:
    folder = Path(shutil.copytree(kl_folder, tmp_path / "kl"))
    values = json.loads((folder / "config.json").read_text())
    mean, deviation = [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 4.0, 8.0]
    values |= {"latents_mean": mean, "latents_std": deviation}
    (folder / "config.json").write_text(json.dumps(values))
    raw = open_codec(settings(kl_folder)).encode(images) / 0.5 + 0.25
    wanted = (raw - torch.tensor(mean).view(4, 1, 1)) * 0.5 / torch.tensor(deviation).view(4, 1, 1)
    torch.testing.assert_close(open_codec(settings(folder)).encode(images), wanted)


def test_all_that_does_not_fit_is_told_at_once(kl_folder: Path) -> None:
    words = ["codec.kind=vq", "codec.channels=1", "codec.latent_channels=8", f"codec.folder={kl_folder}"]
    with pytest.raises(UserError) as told:
        load_config(None, [*words, "codec.fingerprint=abcd", "train.steps=0"])
    text = str(told.value)
    for part in (
        "codec.kind is vq, but",
        "channels is 1",
        "latent_channels is 8",
        "fingerprint is abcd",
        "steps",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["codec.kind=kl"], "needs codec.folder"),
        (["codec.folder=x"], "codec.folder belongs to an autoencoder"),
        (["codec.scale=2"], "codec.scale belongs to an autoencoder"),
        (["codec.kind=kl", "codec.folder=nowhere"], "nowhere is not an autoencoder: config.json: No such file"),
        (["codec.kind=kl", "codec.folder=KL", "codec.image_size=18"], "multiple of codec.downscale 4"),
        (["codec.kind=kl", "codec.folder=KL", "codec.image_size=36"], "codec.downscale 4 must be a multiple of model"),
        (["codec.kind=kl", "codec.folder=KL", "codec.shift=[1,2]"], "one number or 4, one per channel, got 2"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(kl_folder: Path, words: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        load_config(None, [word.replace("=KL", f"={kl_folder}") for word in words])


def test_weights_are_all_there_or_none(
    kl_folder: Path, settings: Callable[..., CodecConfig], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(kl_folder, tmp_path / "kl"))
    before, weights = settings(folder), load_file(folder / WEIGHTS)
    save_file({name: each for name, each in weights.items() if "conv_out" not in name}, folder / WEIGHTS)
    with pytest.raises(UserError, match=f"does not match codec.fingerprint {before.fingerprint}"):
        open_codec(before)
    with pytest.raises(UserError, match=r"has missing weights: decoder\.conv_out\.bias"):
        open_codec(settings(folder))
    save_file({**weights, "more": torch.zeros(1)}, folder / WEIGHTS)
    with pytest.raises(UserError, match="has unexpected weights: more"):
        open_codec(settings(folder))
    save_file({**weights, "quant_conv.bias": torch.zeros(3)}, folder / WEIGHTS)
    with pytest.raises(UserError, match=r"has mismatched weights: quant_conv\.bias|cannot be loaded"):
        open_codec(settings(folder))
    (folder / WEIGHTS).write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot be read"):
        open_codec(settings(folder))
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors is missing, and pickles are not loaded"):
        open_codec(before)


def test_a_codec_says_what_it_makes(
    kl_folder: Path, vq_folder: Path, settings: Callable[..., CodecConfig]
) -> None:
    made = [open_codec(config) for config in (CodecConfig(), settings(kl_folder), settings(vq_folder))]
    assert [(codec.codebook_size, codec.bound) for codec in made] == [(0, 1.0), (0, None), (32, None)]


@pytest.mark.parametrize("channels", [4, 16])
def test_published_numbers_of_channels_load(
    tmp_path: Path,
    write_folder: Callable[..., Path],
    settings: Callable[..., CodecConfig],
    images: torch.Tensor,
    channels: int,
) -> None:
    folder = write_folder("kl", tmp_path / "kl", latent_channels=channels, widths=(8, 16))
    config = settings(folder)
    assert config.latent_shape(16, 16) == (channels, 8, 8)
    assert open_codec(config).encode(images).shape == (3, channels, 8, 8)


def test_fetch_writes_a_folder_of_our_own(
    kl_folder: Path, settings: Callable[..., CodecConfig], tmp_path: Path, images: torch.Tensor
) -> None:
    from transfusion.codec.networks import fetch_network

    (tmp_path / "published").mkdir()
    shutil.copytree(kl_folder, tmp_path / "published" / "vae")
    fetch_network(str(tmp_path / "published"), tmp_path / "mine", subfolder="vae")
    mine = open_codec(settings(tmp_path / "mine")).encode(images)
    assert torch.equal(mine, open_codec(settings(kl_folder)).encode(images))
    with pytest.raises(UserError, match="nowhere cannot be fetched"):
        fetch_network(str(tmp_path / "nowhere"), tmp_path / "other")
    assert not (tmp_path / "other").exists()
