"""How much of images a codec gives back: PSNR, SSIM, rFID where weights are named, and the images themselves.

I images, C channels, H/W height and width, F features.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
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
from transfusion.files import atomic_write_text
from transfusion.observe.environment import describe_environment
from transfusion.parallel.environment import find_device

_AT_ONCE = 32
_SHOWN_EACH = 8
# Wang et al. 2004: a Gaussian window of 11 pixels and deviation 1.5.
_WINDOW, _DEVIATION, _K1, _K2 = 11, 1.5, 0.01, 0.03


class Reconstruction(NamedTuple):
    """Means over images. rfid: None without weights. use: of the codebook; None: there is none."""

    images: int
    psnr: float
    psnr_deviation: float
    ssim: float
    rfid: float | None
    use: codebook.CodebookUse | None

    def describe(self) -> list[str]:
        """A line for each figure."""
        lines = [
            f"images     {self.images}",
            f"PSNR       {self.psnr:.2f} dB, mean of the images (deviation {self.psnr_deviation:.2f})",
            f"SSIM       {self.ssim:.4f}",
            "rFID       "
            + (f"{self.rfid:.2f}" if self.rfid is not None else "not measured: no --rfid-weights"),
        ]
        if self.use is not None:
            lines.append(
                f"codebook   {100 * self.use.used:.1f} % used, {self.use.dead} dead entries,"
                f" perplexity {self.use.perplexity:.0f}"
            )
        return lines


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
    images = ImageSet(shards, channels=codec.channels, image_size=codec.image_size, workers=2)
    try:
        features = _feature_network(rfid_weights, device) if rfid_weights else None
        found, shown = _measure(codec, images, features, limit, device)
    finally:
        images.close()
    record = {
        **found._asdict(),
        "use": found.use._asdict() if found.use else None,
        "left_out": images.left_out,
        "codec": codec.as_dict(),
        "shards": list(shards),
        "environment": describe_environment(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(out.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
    png = _png(_grid(shown))
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


def frechet_distance(one_IF: Tensor, other_IF: Tensor) -> float:
    """Of the normal distributions with the means and covariances of both sets of features."""
    one, other = one_IF.double(), other_IF.double()
    covariances = torch.cov(one.T), torch.cov(other.T)
    # The trace of the root of a product is the sum of the roots of its eigenvalues.
    eigenvalues = torch.linalg.eigvals(covariances[0] @ covariances[1])
    root_trace = eigenvalues.real.clamp(min=0).sqrt().sum()
    shift = (one.mean(0) - other.mean(0)).square().sum()
    return float(shift + covariances[0].trace() + covariances[1].trace() - 2 * root_trace)


def _measure(
    codec: CodecConfig,
    images: ImageSet,
    features: Callable[[Tensor], Tensor] | None,
    limit: int,
    device: str,
) -> tuple[Reconstruction, list[tuple[float, Tensor, Tensor]]]:
    """The figures, and the worst, middle and best images as (PSNR, real, made)."""
    there_and_back, chosen_K = _round_trip(codec, device)
    measured: list[tuple[float, Tensor, Tensor]] = []
    similar: list[Tensor] = []
    seen: list[tuple[Tensor, Tensor]] = []
    for real_ICHW in images.in_order(_AT_ONCE, limit):
        made_ICHW = there_and_back(real_ICHW)
        measured += zip(psnr(made_ICHW, real_ICHW).tolist(), real_ICHW, made_ICHW, strict=True)
        similar.append(ssim(made_ICHW, real_ICHW))
        if features is not None:
            seen.append((features(real_ICHW), features(made_ICHW)))
    if not measured:
        raise UserError("no image of these shards can be decoded; `transfusion data index` shows why")
    figures = torch.tensor([figure for figure, _, _ in measured])
    found = Reconstruction(
        len(measured),
        figures.mean().item(),
        figures.std(correction=0).item(),
        torch.cat(similar).mean().item(),
        frechet_distance(*(torch.cat(part) for part in zip(*seen, strict=True))) if seen else None,
        codebook.use(chosen_K) if len(chosen_K) else None,
    )
    measured.sort(key=lambda each: each[0])
    middle = max(0, (len(measured) - _SHOWN_EACH) // 2)
    chosen = [*range(_SHOWN_EACH), *range(middle, middle + _SHOWN_EACH), *range(-_SHOWN_EACH, 0)]
    if len(measured) < len(chosen):
        return found, measured
    return found, [measured[number] for number in chosen]


def _round_trip(codec: CodecConfig, device: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """(images there and back, how often each entry of the codebook was chosen so far)"""
    opened, chosen_K = open_codec(codec, device), torch.zeros(codec.codebook_size)

    def there_and_back(real_ICHW: Tensor) -> Tensor:
        encoded = opened.encode(real_ICHW.to(device))
        if codec.codebook_size:
            chosen_K.add_(torch.bincount(encoded.flatten().cpu(), minlength=codec.codebook_size))
        return opened.decode(encoded).cpu()

    return there_and_back, chosen_K


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


def _grid(shown: Sequence[tuple[float, Tensor, Tensor]]) -> np.ndarray:
    """Rows of eight images, under each what the codec made of it: uint8 [H, W, C], on grey."""
    gap = 2
    channels, height, width = shown[0][1].shape
    rows = -(-len(shown) // _SHOWN_EACH)
    canvas = np.full(
        (rows * (2 * height + 3 * gap), _SHOWN_EACH * (width + gap) + gap, channels), 128, np.uint8
    )
    for number, (_, real_CHW, made_CHW) in enumerate(shown):
        row, column = divmod(number, _SHOWN_EACH)
        left, top = gap + column * (width + gap), gap + row * (2 * height + 3 * gap)
        canvas[top : top + height, left : left + width] = real_CHW.permute(1, 2, 0)
        top += height + gap // 2
        canvas[top : top + height, left : left + width] = made_CHW.permute(1, 2, 0)
    return canvas


def _png(values_HWC: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(values_HWC.squeeze(-1) if values_HWC.shape[-1] == 1 else values_HWC).save(stream, "PNG")
    return stream.getvalue()


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
