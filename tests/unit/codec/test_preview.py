"""Previews: the least squared error in closed form, whatever the order; stored with a codec and never in its way."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from transfusion.codec import open_autoencoder, open_codec
from transfusion.codec.pixels import PixelCodec, encode
from transfusion.codec.preview import PreviewMap, read_preview, write_preview
from transfusion.codec_train.encode import add_preview, encode_shards
from transfusion.codec_train.preview import fit_preview
from transfusion.config import CodecConfig
from transfusion.config.codec_folder import PREVIEW, WEIGHTS, folder_files
from transfusion.data.images.decode import decode
from transfusion.errors import UserError

from .conftest import members, pair_of, tar_of

Settings = Callable[..., CodecConfig]
MAP = PreviewMap([[0.1, 0.2, 0.3, 0.4]] * 3, [0.0, 0.1, 0.2], downscale=4, explained=0.5, images=7)
# Of a codebook with entries of three numbers.
MAP_OF_CODES = PreviewMap([[0.1, 0.2, 0.3]] * 3, [0.0, 0.1, 0.2], downscale=4, explained=0.5, images=7)


def squares(images: int, height: int = 16, width: int = 16) -> tuple[Tensor, Tensor]:
    """(colours fp32 [I, 3, h, w], uint8 images [I, 3, H, W] of squares of 4 pixels in these colours)."""
    value_IChw = torch.randint(0, 256, (images, 3, height // 4, width // 4), dtype=torch.uint8)
    return encode(value_IChw), value_IChw.repeat_interleave(4, 2).repeat_interleave(4, 3)


@pytest.fixture
def kl(kl_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(kl_folder, tmp_path / "kl"))


@pytest.fixture
def vq(vq_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(vq_folder, tmp_path / "vq"))


def test_a_linear_map_is_recovered_exactly() -> None:
    torch.manual_seed(0)
    colour_IChw, values_ICHW = squares(20)
    # Five channels that vary in three directions, far from zero, and a sixth that does not vary.
    read_IDhw = F.conv2d(colour_IChw, torch.randn(6, 3, 1, 1)) + 7.0
    read_IDhw[:, 5] = 11.0
    found = fit_preview([(read_IDhw, values_ICHW)])
    assert found is not None and (found.downscale, found.images) == (4, 20)
    assert found.explained == pytest.approx(1, abs=1e-9)
    weight_CD, bias_C = torch.tensor(found.weight_CD), torch.tensor(found.bias_C)
    made_IChw = torch.einsum("cd,idhw->ichw", weight_CD, read_IDhw) + bias_C[:, None, None]
    torch.testing.assert_close(made_IChw, colour_IChw, atol=1e-4, rtol=0)
    # A channel about which nothing is known counts for nothing.
    assert weight_CD[:, 5].abs().max() < 1e-4
    # An image in one colour comes back, at its size.
    flat_IDhw = read_IDhw[:, :, :1, :1].expand(-1, -1, 4, 6)
    wanted = values_ICHW[:, :, :1, :1].expand(-1, -1, 16, 24)
    assert (found.image(flat_IDhw).int() - wanted.int()).abs().max() <= 1


def test_it_is_the_least_squared_error_and_says_how_much_it_explains() -> None:
    torch.manual_seed(0)
    colour_IChw, values_ICHW = squares(50)
    read_IDhw = F.conv2d(colour_IChw, torch.randn(4, 3, 1, 1)) + torch.randn(50, 4, 4, 4)
    found = fit_preview([(read_IDhw, values_ICHW)])
    assert found is not None
    read_ND, colour_NC = (
        each.permute(0, 2, 3, 1).flatten(0, 2).double().numpy() for each in (read_IDhw, colour_IChw)
    )
    with_one = np.concatenate([read_ND, np.ones((len(read_ND), 1))], 1)
    wanted, left, _, _ = np.linalg.lstsq(with_one, colour_NC, rcond=None)
    np.testing.assert_allclose(found.weight_CD, wanted[:-1].T, atol=1e-6)
    np.testing.assert_allclose(found.bias_C, wanted[-1], atol=1e-6)
    total = ((colour_NC - colour_NC.mean(0)) ** 2).sum()
    assert found.explained == pytest.approx(1 - left.sum() / total, abs=1e-6) and found.explained < 0.9


def test_neither_order_nor_number_at_a_time_matters() -> None:
    torch.manual_seed(0)
    pairs = [
        (torch.randn(4, 5, height // 4, 4), squares(4, height)[1])
        for height in (16, 16, 32)  # Images of several sizes.
    ]
    one_by_one = [
        pair
        for pair in zip(*(torch.cat(part).split(1) for part in zip(*pairs[:2], strict=True)), strict=True)
    ]
    one, other = fit_preview(pairs), fit_preview([pairs[2], *one_by_one[::-1]])
    assert one is not None and other is not None and one.images == other.images == 12
    np.testing.assert_allclose(one.weight_CD, other.weight_CD, rtol=1e-10)
    np.testing.assert_allclose(one.bias_C, other.bias_C, rtol=1e-10)
    assert one.explained == pytest.approx(other.explained)


def test_images_in_one_colour_and_none_at_all() -> None:
    grey = torch.full((2, 1, 8, 8), 100, dtype=torch.uint8)
    found = fit_preview([(torch.randn(2, 3, 4, 4), grey)])
    assert found is not None and found.explained == 1
    assert torch.equal(found.image(torch.randn(2, 3, 4, 4)), grey)
    assert fit_preview([]) is None


def test_pixels_are_their_own_preview(images: Tensor) -> None:
    codec = PixelCodec()
    latents = codec.encode(images) + 0.1 * torch.randn(3, 3, 16, 16)
    assert torch.equal(codec.preview(latents), codec.decode(latents))
    assert torch.equal(codec.preview(codec.encode(images)), images)


def test_a_folder_keeps_its_map_and_stays_the_same_codec(
    kl: Path, settings: Settings, images: Tensor
) -> None:
    from diffusers import AutoencoderKL

    before, bare = settings(kl), folder_files(kl)
    with pytest.raises(
        UserError, match=rf"{kl} has no preview map; .* `transfusion codec encode {kl} SHARDS"
    ):
        open_codec(before).preview(torch.randn(3, 4, 4, 4))
    write_preview(kl, MAP)
    assert read_preview(kl) == MAP and settings(kl) == before
    # What a run and its export copy.
    assert [path.name for path in folder_files(kl) if path not in bare] == [PREVIEW]
    codec = open_codec(before)
    latents = codec.encode(images)
    made = codec.preview(latents)
    assert made.shape == images.shape and made.dtype == torch.uint8
    # The map is of what the decoder reads, so other statistics of the latents leave it as it is.
    rescaled = open_codec(settings(kl, scale=[2.0], shift=[1.0]))
    assert (rescaled.preview(rescaled.encode(images)).int() - made.int()).abs().max() <= 1
    mean = AutoencoderKL.from_pretrained(str(kl)).encode(encode(images)).latent_dist.mode()
    assert (MAP.image(mean).int() - made.int()).abs().max() <= 1


def test_a_map_of_other_weights_or_a_damaged_one_is_none(kl: Path, settings: Settings) -> None:
    write_preview(kl, MAP)
    text = (kl / PREVIEW).read_text()
    for damaged in ("", "[]", "{}", text.replace("bias_C", "bias")):
        (kl / PREVIEW).write_text(damaged)
        assert read_preview(kl) is None
        open_codec(settings(kl))
    (kl / PREVIEW).write_text(text)
    save_file({name: 2 * value for name, value in load_file(kl / WEIGHTS).items()}, kl / WEIGHTS)
    with pytest.raises(UserError, match="has no preview map"):
        open_codec(settings(kl)).preview(torch.randn(1, 4, 4, 4))


def test_a_code_has_the_colour_of_its_entry(vq: Path, settings: Settings) -> None:
    write_preview(vq, MAP_OF_CODES)
    codec = open_autoencoder(settings(vq))
    token_Ihw = torch.arange(32).view(2, 4, 4)
    entry_KD = codec.network.quantize.embedding.weight
    colour_KC = entry_KD @ torch.tensor(MAP_OF_CODES.weight_CD).T + torch.tensor(MAP_OF_CODES.bias_C)
    for token in (0, 31):
        flat = codec.preview(torch.full((1, 4, 4), token))
        wanted = ((colour_KC[token] + 1) * 127.5).round().clamp(0, 255)
        assert flat.shape == (1, 3, 16, 16)
        assert (flat - wanted.view(1, 3, 1, 1)).abs().max() <= 1
    made = codec.preview(token_Ihw)
    assert made.shape == (2, 3, 16, 16) and made.dtype == torch.uint8


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_encoding_fits_the_map_once(
    kind: str, request: pytest.FixtureRequest, shards: Path, settings: Settings, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(kind)
    config, out = settings(folder), tmp_path / "out"
    records = encode_shards(config, [f"{shards}/*.tar"], out)
    found = add_preview(config, out, records)
    codec = open_autoencoder(config)
    pairs = []
    for name, data in members(shards).items():
        # The one before the last has no latents.
        if name.endswith(".png") and not name.startswith("000010005"):
            values = torch.from_numpy(decode(data, channels=3, image_size=16))[None]
            pairs.append((codec.decoder_input(codec.encode(values)), values))
    wanted = fit_preview(pairs)
    assert found is not None and wanted is not None and found.images == wanted.images == 11
    assert found == read_preview(folder) and found.explained == pytest.approx(wanted.explained, abs=1e-3)
    one, other = (each.image(pairs[0][0]).int() for each in (found, wanted))
    assert (one - other).abs().max() <= 2
    assert f"preview map of 11 images explains {found.explained:.1%}" in found.describe()
    # It stays as it is, and the latents stay those of this codec.
    (folder / PREVIEW).touch()
    state = (folder / PREVIEW).stat().st_mtime_ns
    seen: list[bool] = []
    again = encode_shards(config, [f"{shards}/*.tar"], out, progress=lambda *told: seen.append(told[2]))
    assert add_preview(config, out, again) is None and seen == [True] * 3
    assert (folder / PREVIEW).stat().st_mtime_ns == state


def test_latents_are_written_where_no_map_can_be(
    shards: Path, kl: Path, settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = settings(kl)
    texts = encode_shards(config, [f"{shards}/00002.tar"], tmp_path / "texts")
    assert add_preview(config, tmp_path / "texts", texts) is None and not (kl / PREVIEW).exists()
    (kl / PREVIEW).mkdir()
    records = encode_shards(config, [f"{shards}/00000.tar"], tmp_path / "out")
    assert add_preview(config, tmp_path / "out", records) is None
    assert [line for line in caplog.messages if "gets no preview map: Is a directory" in line]


def test_latents_that_overflowed_are_passed_over(kl: Path, settings: Settings, tmp_path: Path) -> None:
    shard, config = tmp_path / "s" / "00000.tar", settings(kl)
    tar_of(shard, pair_of("000", 10) + pair_of("001", 200))
    records = encode_shards(config, [str(shard)], tmp_path / "out")
    stored = members(tmp_path / "out")
    stream = io.BytesIO()
    np.save(stream, np.full((4, 4, 4), np.inf, np.float16))
    tar_of(tmp_path / "out" / "00000.tar", [*(stored | {"000.latent.npy": stream.getvalue()}).items()])
    found = add_preview(config, tmp_path / "out", records)
    assert found is not None and found.images == 1 and np.isfinite(found.weight_CD).all()
