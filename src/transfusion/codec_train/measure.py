"""What is measured of a codec's latents and of its reconstructions.

I images, C channels, H/W height and width, h/w of latents, K entries of a codebook.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from transfusion.codec import pixels as codec_pixels
from transfusion.codec.networks import Network
from transfusion.codec.preview import PreviewMap
from transfusion.codec_train import codebook
from transfusion.codec_train.images import ImageSet
from transfusion.codec_train.preview import MAX_IMAGES, fit_preview

_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class Statistics:
    """Of the posterior's means, or of the patches before quantisation; over all channels and by channel.

    use: of the codebook over these images; None: there is none.
    """

    images: int
    mean: float
    deviation: float
    channel_means: list[float]
    channel_deviations: list[float]
    use: codebook.CodebookUse | None

    def diffusers_config(self) -> dict[str, float]:
        """Under the names by which pipelines apply them: latents are (z - shift_factor) * scaling_factor."""
        if self.use is not None:
            return {}
        return {"shift_factor": self.mean, "scaling_factor": 1 / self.deviation}

    def describe(self) -> str:
        """One line."""
        text = f"latents of {self.images} images have mean {self.mean:.4f} and deviation {self.deviation:.4f}"
        return f"{text}; {self.use}" if self.use else text


@torch.no_grad()
def latent_statistics(
    network: Network, images: ImageSet, device: torch.device, kind: str, limit: int
) -> Statistics:
    """Over the first `limit` images."""
    parts, chosen_K = [], torch.zeros(network.config.num_vq_embeddings if kind == "vq" else 0)
    for values_ICHW in images.in_order(_AT_ONCE, limit):
        latent_IChw = _latents(network, values_ICHW, device)
        if kind == "vq":
            token_N = network.quantize(latent_IChw)[2][2]
            chosen_K += torch.bincount(token_N.cpu(), minlength=len(chosen_K))
        parts.append(latent_IChw.double().cpu())
    latent_IChw = torch.cat(parts)
    by_channel = latent_IChw.transpose(0, 1).flatten(1)
    return Statistics(
        len(latent_IChw),
        latent_IChw.mean().item(),
        latent_IChw.std().item(),
        by_channel.mean(1).tolist(),
        by_channel.std(1).tolist(),
        codebook.use(chosen_K) if kind == "vq" else None,
    )


@torch.no_grad()
def preview_map(network: Network, images: ImageSet, device: torch.device, kind: str) -> PreviewMap | None:
    """Fitted on the first images."""

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for values_ICHW in images.in_order(_AT_ONCE, MAX_IMAGES):
            latent_IChw = _latents(network, values_ICHW, device)
            yield network.quantize(latent_IChw)[0] if kind == "vq" else latent_IChw, values_ICHW

    return fit_preview(pairs())


def psnr(made_ICHW: Tensor, real_ICHW: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each uint8 image, in dB [I]; of one that is exact, that of an error of 1e-3."""
    error_I = (made_ICHW.double() - real_ICHW.double()).square().mean((1, 2, 3))
    return 10 * torch.log10(255**2 / error_I.clamp(min=1e-6))


@torch.no_grad()
def reconstruction_psnr(network: Network, images: ImageSet, device: torch.device, limit: int = 0) -> float:
    """Mean of the images' PSNR, in dB."""
    found = []
    for values_ICHW in images.in_order(_AT_ONCE, limit):
        made_ICHW = network.decode(_latents(network, values_ICHW, device)).sample
        found.append(psnr(codec_pixels.decode(made_ICHW).cpu(), values_ICHW))
    return torch.cat(found).mean().item()


def _latents(network: Network, values_ICHW: Tensor, device: torch.device) -> Tensor:
    """The posterior's means, or the patches before quantisation."""
    encoded = network.encode(codec_pixels.encode(values_ICHW.to(device)))
    latent_IChw: Tensor = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
    return latent_IChw
