"""Autoencoders' folders that mean something else than they seem to: refused by name, never read in part."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from transfusion.codec.networks import fetch_network, load_network
from transfusion.config.codec_folder import CONFIG, INDEX, STEM, WEIGHTS, read_facts
from transfusion.errors import UserError

PARTS = [f"{STEM}-0000{number}-of-00002.safetensors" for number in (1, 2)]


@pytest.fixture
def folder(kl_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(kl_folder, tmp_path / "vae"))


def refused(folder: Path, tmp_path: Path, words: str) -> None:
    """By both doors: loading, and fetching, which leaves nothing."""
    with pytest.raises(UserError, match=words):
        load_network(folder)
    with pytest.raises(UserError, match=words):
        fetch_network(str(folder), tmp_path / "fetched")
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def change_config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps(values))


def split(folder: Path) -> None:
    """In place of the single file, two parts and their index."""
    weights = load_file(folder / WEIGHTS)
    halves = [dict(list(weights.items())[place::2]) for place in (0, 1)]
    for part, half in zip(PARTS, halves, strict=True):
        save_file(half, folder / part)
    places = {name: part for part, half in zip(PARTS, halves, strict=True) for name in half}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / WEIGHTS).unlink()


def test_another_class(tmp_path: Path) -> None:
    from diffusers import AutoencoderTiny

    widths = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    AutoencoderTiny(**widths, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).save_pretrained(
        tmp_path / "tiny"
    )
    refused(tmp_path / "tiny", tmp_path, "is not that of an AutoencoderKL or a VQModel")


def test_a_tensor_that_is_missing_or_left_over(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    save_file({name: each for name, each in weights.items() if name != "quant_conv.bias"}, folder / WEIGHTS)
    refused(folder, tmp_path, r"has missing weights: quant_conv\.bias")
    save_file({**weights, "encoder.conv_in.weight_scale": torch.ones(1)}, folder / WEIGHTS)
    refused(folder, tmp_path, r"has unexpected weights: encoder\.conv_in\.weight_scale")


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int64]
)
def test_numbers_that_need_a_scale(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    weights = load_file(folder / WEIGHTS)
    weights["encoder.conv_in.weight"] = weights["encoder.conv_in.weight"].to(dtype)
    save_file(weights, folder / WEIGHTS)
    refused(
        folder,
        tmp_path,
        r"encoder\.conv_in\.weight is stored as .*, and only F64, F32, F16, BF16 can be read",
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floats_of_other_widths_are_read(folder: Path, dtype: torch.dtype) -> None:
    weights = load_file(folder / WEIGHTS)
    save_file({name: each.to(dtype) for name, each in weights.items()}, folder / WEIGHTS)
    found = load_network(folder).state_dict()
    assert {each.dtype for each in found.values()} == {torch.float32}
    for name, each in weights.items():
        torch.testing.assert_close(found[name], each.to(dtype).float(), rtol=0, atol=0)


@pytest.mark.parametrize("key", ["quantization_config", "latent_multiplier", "use_tanh"])
def test_a_setting_that_diffusers_would_pass_over(folder: Path, tmp_path: Path, key: str) -> None:
    change_config(folder, **{key: {"bits": 8}})
    refused(folder, tmp_path, f"{key} in config.json is no setting of AutoencoderKL in diffusers")


def test_parts_are_read_as_one_file(folder: Path, tmp_path: Path, kl_folder: Path) -> None:
    split(folder)
    wanted = load_network(kl_folder).state_dict()
    for name, each in load_network(folder).state_dict().items():
        assert torch.equal(each, wanted[name])
    fetch_network(str(folder), tmp_path / "fetched")
    for name, each in load_network(tmp_path / "fetched").state_dict().items():
        assert torch.equal(each, wanted[name])


def test_two_truths(folder: Path, tmp_path: Path, kl_folder: Path) -> None:
    split(folder)
    shutil.copy(kl_folder / WEIGHTS, folder)
    refused(
        folder, tmp_path, f"it holds {STEM}.safetensors beside {PARTS[0]}.*delete the former files, {INDEX}"
    )
    (folder / INDEX).unlink()
    refused(folder, tmp_path, f"it holds {PARTS[0]} beside {WEIGHTS}")


@pytest.mark.parametrize("harm", ["unnamed", "elsewhere", "gone", "empty", "torn"])
def test_parts_that_their_index_does_not_fit(folder: Path, tmp_path: Path, harm: str) -> None:
    split(folder)
    index = json.loads((folder / INDEX).read_text())
    places = index["weight_map"]
    if harm == "unnamed":
        shutil.copy(folder / PARTS[0], folder / f"{STEM}-00003-of-00003.safetensors")
        words = "it holds .*-00003-of-00003.safetensors beside"
    elif harm == "elsewhere":
        places[next(name for name in places if places[name] == PARTS[0])] = PARTS[1]
        words = f"{INDEX} does not fit: "
    elif harm == "gone":
        (folder / PARTS[1]).unlink()
        words = f"{PARTS[1]} is missing"
    elif harm == "empty":
        places.clear()
        words = f"{INDEX} names no weights"
    else:
        words = f"{INDEX} cannot be read"
    (folder / INDEX).write_text("{" if harm == "torn" else json.dumps(index))
    refused(folder, tmp_path, words)


def test_a_pointer_in_place_of_the_file(folder: Path, tmp_path: Path) -> None:
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5000\n")
    refused(folder, tmp_path, "is a pointer of Git LFS; run `git lfs pull`")


def test_fetching_never_mixes_two_networks(kl_folder: Path, vq_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fetch_network(str(kl_folder), out)
    with pytest.raises(UserError, match="exists; name another folder, or remove it"):
        fetch_network(str(vq_folder), out)
    assert read_facts(out).kind == "kl"


def test_a_variant_of_the_weights_stands_beside_them_in_peace(
    folder: Path, write_folder: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copy(folder / WEIGHTS, folder / f"{STEM}.fp16.safetensors")
    load_network(folder)
