"""What is measured of reconstructions: each figure against its definition, and the files that hold it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from transfusion.cli.codec import codec_app
from transfusion.codec import open_codec
from transfusion.codec_train.images import ImageSet
from transfusion.codec_train.measure import psnr
from transfusion.codec_train.report import ssim, write_report
from transfusion.config import CodecConfig
from transfusion.errors import UserError
from transfusion.evaluate.metrics.frechet import frechet_distance, gaussian_of

Settings = Callable[..., CodecConfig]


class _Means(torch.nn.Module):
    """In the place of the Inception network: three features an image."""

    def forward(self, value: Tensor, return_features: bool) -> Tensor:
        assert return_features and value.dtype == torch.uint8
        return value.double().mean([2, 3])


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("features") / "means.pt"
    torch.jit.script(_Means()).save(str(path))
    return path


def test_psnr_is_that_of_each_image() -> None:
    real = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    made = real.clone()
    made[0, 0, 0, 0] = 16
    assert psnr(made, real).tolist() == pytest.approx([20 * np.log10(255 / 4), 20 * np.log10(255e3)])


def test_ssim_is_that_of_every_window() -> None:
    real, made = (torch.randint(0, 256, (1, 2, 12, 13), dtype=torch.uint8) for _ in range(2))
    place = np.arange(11) - 5
    window = np.exp(-(place[:, None] ** 2 + place**2) / (2 * 1.5**2))
    window /= window.sum()
    found = []
    for channel in range(2):
        a, b = (each[0, channel].double().numpy() for each in (real, made))
        for row in range(2):
            for column in range(3):
                one, other = (each[row : row + 11, column : column + 11] for each in (a, b))
                x, y = (window * one).sum(), (window * other).sum()
                spread = (window * (one - x) ** 2).sum() + (window * (other - y) ** 2).sum()
                shared = (window * (one - x) * (other - y)).sum()
                c1, c2 = 2.55**2, 7.65**2
                found.append((2 * x * y + c1) * (2 * shared + c2) / ((x * x + y * y + c1) * (spread + c2)))
    assert ssim(made, real).item() == pytest.approx(np.mean(found)) and ssim(
        real, real
    ).item() == pytest.approx(1)


def test_a_report_holds_what_was_measured(
    shards: Path, kl_folder: Path, settings: Settings, features: Path, tmp_path: Path
) -> None:
    config, out = settings(kl_folder), tmp_path / "deep" / "judged"
    found = write_report(config, [f"{shards}/*.tar"], out, rfid_weights=features)
    images = ImageSet([f"{shards}/*.tar"], channels=3, image_size=16)
    real, codec = torch.cat(list(images.in_order(32))), open_codec(config)
    images.close()
    made = codec.decode(codec.encode(real))
    assert found.images == 11 and found.psnr == pytest.approx(psnr(made, real).mean().item())
    assert found.ssim == pytest.approx(ssim(made, real).mean().item())
    means = [gaussian_of(each.double().mean((2, 3)).numpy()) for each in (real, made)]
    assert found.rfid == pytest.approx(frechet_distance(*means)) and found.rfid > 1
    record = json.loads(out.with_suffix(".json").read_text())
    assert (record["psnr"], record["left_out"]) == (found.psnr, 1)
    # Two rows of pairs, the worst image first and above what was made of it.
    grid = np.asarray(Image.open(out.with_suffix(".png")))
    worst = real[psnr(made, real).argmin()].permute(1, 2, 0).numpy()
    assert grid.shape == (2 * (2 * 16 + 6), 8 * 18 + 2, 3) and np.array_equal(grid[2:18, 2:18], worst)
    assert f"{found.psnr:.2f} dB" in out.with_suffix(".html").read_text()


def test_the_commands_take_what_they_say(
    shards: Path, kl_folder: Path, vq_folder: Path, features: Path, tmp_path: Path
) -> None:
    def run(*words: str | Path) -> str:
        done = CliRunner().invoke(codec_app, [str(word) for word in words], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    every = f"{shards}/0000[01].tar"
    said = run("report", vq_folder, every, "--out", tmp_path / "vq", "--limit", "4", "--image-size", "8")
    assert "images     4" in said and "rFID       not measured" in said and "dead entries, perplexity" in said
    assert json.loads((tmp_path / "vq.json").read_text())["codec"]["image_size"] == 8
    run("report", kl_folder, every, "--out", tmp_path / "kl", "--rfid-weights", features)
    assert json.loads((tmp_path / "kl.json").read_text())["rfid"] > 0
    said = run("encode", kl_folder, every, "--out", tmp_path / "latents", "--image-size", "8")
    assert "11 images in 2 shards" in said and "left out: 1 x image_corrupt" in said
    assert json.loads((tmp_path / "latents" / "00000_latents.json").read_text())["image_size"] == 8
    run(
        "fetch",
        vq_folder.parent,
        "--subfolder",
        vq_folder.name,
        "--out",
        tmp_path / "fetched",
    )
    assert json.loads((tmp_path / "fetched" / "config.json").read_text())["_class_name"] == "VQModel"


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"rfid_weights": "nowhere.pt"}, "--rfid-weights nowhere.pt is not a TorchScript file"),
        ({"rfid_weights": "strange.pt"}, "--rfid-weights strange.pt is not FID's Inception network"),
        ({"device": "gpu"}, "device 'gpu' does not exist"),
        ({"shards": ["nowhere/*.tar"]}, "nowhere"),
    ],
)
def test_what_cannot_be_judged_is_refused(
    shards: Path,
    kl_folder: Path,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    values: dict[str, object],
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.jit.script(torch.nn.ReLU()).save("strange.pt")
    arguments = {"shards": [f"{shards}/*.tar"], **values}
    if "rfid_weights" in arguments:
        arguments["rfid_weights"] = Path(str(arguments["rfid_weights"]))
    with pytest.raises(UserError, match=told):
        write_report(settings(kl_folder), out=tmp_path / "out", **arguments)  # type: ignore[arg-type]
    assert not list(tmp_path.glob("out*"))
