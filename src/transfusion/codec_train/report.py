"""How much of images a codec gives back: PSNR, SSIM, rFID where weights are named, and the images themselves.

I images, C channels, H/W height and width, F features.
"""

from __future__ import annotations

import base64
import contextlib
import html
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from transfusion.codec import open_codec
from transfusion.codec_train import codebook
from transfusion.codec_train.images import ImageSet
from transfusion.codec_train.measure import psnr
from transfusion.config import CodecConfig
from transfusion.errors import UserError
from transfusion.evaluate.metrics.frechet import frechet_distance, gaussian_of
from transfusion.files import atomic_write_text
from transfusion.observe.environment import describe_environment
from transfusion.parallel.environment import find_device

_AT_ONCE = 32
_SHOWN_EACH = 8
# Wang et al. 2004: a Gaussian window of 11 pixels and deviation 1.5.
_WINDOW, _DEVIATION, _K1, _K2 = 11, 1.5, 0.01, 0.03


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """Means over images. rfid: None without weights. use: of the codebook; None: there is none."""

    images: int
    psnr: float
    psnr_deviation: float
    ssim: float
    rfid: float | None
    use: codebook.CodebookUse | None

    def describe(self) -> list[str]:
        """A line for each figure."""
        rfid = (
            "not measured: needs --rfid-weights and two images" if self.rfid is None else f"{self.rfid:.2f}"
        )
        return [
            f"images     {self.images}",
            f"PSNR       {self.psnr:.2f} dB, mean of the images (deviation {self.psnr_deviation:.2f})",
            f"SSIM       {self.ssim:.4f}",
            f"rFID       {rfid}",
            *([f"codebook   {self.use}"] if self.use else []),
        ]


def write_report(
    codec: CodecConfig,
    shards: Sequence[str],
    out: Path,
    *,
    rfid_weights: Path | None = None,
    limit: int = 0,
    device: str = "cpu",
) -> Reconstruction:
    """Write OUT.json, OUT.png and OUT.html for what `out` names without its extension.

    rfid_weights: TorchScript of the Inception network of FID, called as (uint8 [I, 3, H, W], return_features=True).
    Raises UserError.
    """
    device = str(find_device(device))
    size = {"channels": codec.channels, "image_size": codec.image_size}
    with contextlib.closing(ImageSet(shards, **size, workers=2)) as images:
        features = _feature_network(rfid_weights, device) if rfid_weights else None
        found, shown = _measure(codec, images, features, limit, device)
    record = {
        **asdict(found),
        "left_out": images.left_out,
        "codec": codec.as_dict(),
        "shards": list(shards),
        "environment": describe_environment(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(out.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
    stream = io.BytesIO()
    Image.fromarray(_grid(shown).permute(1, 2, 0).squeeze(-1).numpy()).save(stream, "PNG")
    png = stream.getvalue()
    out.with_suffix(".png").write_bytes(png)
    atomic_write_text(out.with_suffix(".html"), _page(found, codec, png))
    return found


def ssim(made_ICHW: Tensor, real_ICHW: Tensor) -> Tensor:
    """Structural similarity of each uint8 image (Wang et al. 2004), mean over channels and whole windows: [I]."""
    side = min(_WINDOW, *made_ICHW.shape[-2:])
    place = torch.arange(side, dtype=torch.float64) - (side - 1) / 2
    bell = torch.exp(-place.square() / (2 * _DEVIATION**2))
    window = (bell[:, None] * bell / bell.sum() ** 2)[None, None]

    def mean(value_ICHW: Tensor) -> Tensor:
        images, channels, height, width = value_ICHW.shape
        smooth = F.conv2d(value_ICHW.reshape(-1, 1, height, width), window)
        return smooth.view(images, channels, *smooth.shape[-2:])

    a, b = made_ICHW.double(), real_ICHW.double()
    mean_a, mean_b = mean(a), mean(b)
    variance_a, variance_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    c1, c2 = (_K1 * 255) ** 2, (_K2 * 255) ** 2
    above = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return (above / ((mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2))).mean((1, 2, 3))


def _measure(
    codec: CodecConfig,
    images: ImageSet,
    features: Callable[[Tensor], Tensor] | None,
    limit: int,
    device: str,
) -> tuple[Reconstruction, list[tuple[float, Tensor, Tensor]]]:
    """The figures, and the worst, middle and best images as (PSNR, real, made)."""
    opened, chosen_K = open_codec(codec, device), torch.zeros(codec.codebook_size)
    measured: list[tuple[float, Tensor, Tensor]] = []
    similar: list[Tensor] = []
    seen: list[tuple[Tensor, Tensor]] = []
    for real_ICHW in images.in_order(_AT_ONCE, limit):
        encoded = opened.encode(real_ICHW.to(device))
        if codec.codebook_size:
            chosen_K += torch.bincount(encoded.flatten().cpu(), minlength=codec.codebook_size)
        made_ICHW = opened.decode(encoded).cpu()
        measured += zip(psnr(made_ICHW, real_ICHW).tolist(), real_ICHW, made_ICHW, strict=True)
        similar.append(ssim(made_ICHW, real_ICHW))
        if features is not None:
            seen.append((features(real_ICHW), features(made_ICHW)))
    if not measured:
        raise UserError("no image of these shards can be decoded; `transfusion data index` shows why")
    figures = torch.tensor([figure for figure, _, _ in measured])
    rfid = None
    if seen and len(measured) > 1:
        rfid = frechet_distance(*(gaussian_of(torch.cat(part).numpy()) for part in zip(*seen, strict=True)))
    found = Reconstruction(
        len(measured),
        figures.mean().item(),
        figures.std(correction=0).item(),
        torch.cat(similar).mean().item(),
        rfid,
        codebook.use(chosen_K) if len(chosen_K) else None,
    )
    measured.sort(key=lambda image: image[0])
    each = _SHOWN_EACH
    if len(measured) < 3 * each:
        return found, measured
    middle = (len(measured) - each) // 2
    return found, measured[:each] + measured[middle : middle + each] + measured[-each:]


def _feature_network(weights: Path, device: str) -> Callable[[Tensor], Tensor]:
    try:
        network: Any = torch.jit.load(str(weights), map_location=device).eval()
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--rfid-weights {weights} is not a TorchScript file: {reason}") from None

    @torch.no_grad()
    def features(value_ICHW: Tensor) -> Tensor:
        try:
            found_IF: Tensor = network(
                value_ICHW.expand(-1, 3, -1, -1).to(device), return_features=True
            ).cpu()
        except (RuntimeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"--rfid-weights {weights} is not FID's Inception network: {reason}") from None
        return found_IF

    return features


def _grid(shown: Sequence[tuple[float, Tensor, Tensor]]) -> Tensor:
    """Rows of eight images, under each what the codec made of it: uint8 [C, H, W], on grey."""
    gap = 2
    channels, height, width = shown[0][1].shape
    rows = -(-len(shown) // _SHOWN_EACH)
    shape = (channels, rows * (2 * height + 3 * gap), _SHOWN_EACH * (width + gap) + gap)
    canvas_CHW = torch.full(shape, 128, dtype=torch.uint8)
    for number, (_, real_CHW, made_CHW) in enumerate(shown):
        row, column = divmod(number, _SHOWN_EACH)
        left, top = gap + column * (width + gap), gap + row * (2 * height + 3 * gap)
        for image_CHW in (real_CHW, made_CHW):
            canvas_CHW[:, top : top + height, left : left + width] = image_CHW
            top += height + gap // 2
    return canvas_CHW


def _page(found: Reconstruction, codec: CodecConfig, png: bytes) -> str:
    lines = html.escape("\n".join(found.describe()))
    facts = html.escape(json.dumps(codec.as_dict(), indent=1))
    data = base64.b64encode(png).decode()
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>Reconstruction</title>\n'
        "<style>body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
        "img{width:100%;image-rendering:pixelated}pre{overflow:auto}</style>\n"
        f"<h1>Reconstruction by {html.escape(codec.folder or codec.kind)}</h1>\n<pre>{lines}</pre>\n"
        "<p>Each image above its reconstruction: the worst, the median and the best by PSNR.</p>\n"
        f'<img alt="images and reconstructions" src="data:image/png;base64,{data}">\n'
        f"<h2>Codec</h2>\n<pre>{facts}</pre>\n</html>\n"
    )
