"""The losses of a codec (paper, section 4.1; Esser et al. 2021), all over images in [-1, 1], and its discriminator.

I images, C channels, H/W height and width, h/w of latents or of the map of scores.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transfusion.codec.networks import Network
from transfusion.codec_train.codebook import quantise
from transfusion.codec_train.features import FeatureDistance, feature_distance
from transfusion.codec_train.settings import CodecTrainConfig, LossConfig

_LEFT_AWAY = "none: this loss of the paper is off"
_WIDTH, _GROUPS = 64, 8
# A ratio of gradients beyond this is not a ratio but a vanished denominator.
_MAX_RATIO = 1e4


class Reconstructed(NamedTuple):
    """made_ICHW: images in about [-1, 1]. bottleneck: the KL term or the codebook's, weighted.

    encoded_NC and token_N: of a VQ autoencoder each patch before quantisation, and the entry chosen for it.
    """

    made_ICHW: Tensor
    bottleneck: Tensor
    parts: dict[str, Tensor]
    encoded_NC: Tensor | None = None
    token_N: Tensor | None = None


def reconstruct(
    network: Network, real_ICHW: Tensor, config: CodecTrainConfig, generator: torch.Generator
) -> Reconstructed:
    """Encode and decode as in training: latents are drawn from the posterior, tokens pass gradients through."""
    if config.kind == "vq":
        encoded_IChw = network.encode(real_ICHW).latents
        found = quantise(encoded_IChw, network.quantize.embedding.weight)
        made_ICHW = network.decode(found.code_IChw, force_not_quantize=True).sample.float()
        bottleneck = found.codebook_loss + config.loss.commitment * found.commitment_loss
        parts = {"codebook": found.codebook_loss, "commitment": found.commitment_loss}
        encoded_NC = encoded_IChw.detach().float().permute(0, 2, 3, 1).flatten(0, 2)
        return Reconstructed(made_ICHW, bottleneck, parts, encoded_NC, found.token_N)
    posterior = network.encode(real_ICHW).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator).to(posterior.mean)
    made_ICHW = network.decode(posterior.mean + posterior.std * noise).sample.float()
    divergence = posterior.kl().float().mean()
    return Reconstructed(made_ICHW, config.loss.kl * divergence, {"kl": divergence})


class CodecLoss(nn.Module):
    """What the codec learns: pixels, features, identity, the discriminator's score."""

    def __init__(self, config: LossConfig) -> None:
        """Raises UserError for weights that cannot be read or do not fit."""
        super().__init__()
        self._config = config
        self.perceptual = _distance("perceptual", config)
        self.identity = _distance("identity", config)

    def forward(self, made_ICHW: Tensor, real_ICHW: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum without the discriminator's part, and each part by name, unweighted."""
        error_ICHW = made_ICHW - real_ICHW
        pixels = error_ICHW.abs() if self._config.reconstruction == "l1" else error_ICHW.square()
        parts: dict[str, Tensor] = {self._config.reconstruction: pixels.mean()}
        total = pixels.mean()
        for name in ("perceptual", "identity"):
            distance = getattr(self, name)
            if distance is not None:
                parts[name] = distance(made_ICHW, real_ICHW).mean()
                total = total + getattr(self._config, name) * parts[name]
        return total, parts

    def adversarial(self, scores: Tensor, total: Tensor, last_weight: Tensor) -> tuple[Tensor, Tensor]:
        """(weighted loss of scores of made images, its adaptive weight)"""
        loss = -scores.mean()
        adaptive = loss.new_ones(())
        if self._config.adaptive:
            adaptive = adaptive_weight(total, loss, last_weight)
        return self._config.adversarial * adaptive * loss, adaptive

    def describe(self, steps: int) -> dict[str, str]:
        """What each loss of the paper beside that of pixels stands on in a training of `steps`, for the record."""
        features = {name: _describe(name, self._config) for name in ("perceptual", "identity")}
        return features | {"adversarial": _describe_adversarial(self._config, steps)}


def _distance(name: str, config: LossConfig) -> FeatureDistance | None:
    if not getattr(config, name):
        return None
    return feature_distance(getattr(config, f"{name}_features"), getattr(config, f"{name}_weights"))


def _describe(name: str, config: LossConfig) -> str:
    kind, weight = getattr(config, f"{name}_features"), getattr(config, name)
    if kind == "none" or not weight:
        return _LEFT_AWAY
    if kind == "random":
        return f"{weight:g} x random features: fixed random convolutions, not the paper's learnt ones"
    return f"{weight:g} x {kind} from {getattr(config, f'{name}_weights')}"


def _describe_adversarial(config: LossConfig, steps: int) -> str:
    if not config.adversarial:
        return _LEFT_AWAY
    if config.adversarial_from >= steps:
        return f"{_LEFT_AWAY}, as adversarial_from {config.adversarial_from} is beyond the last step"
    adaptive = ", scaled by the ratio of the gradients" if config.adaptive else ""
    return f"{config.adversarial:g} x patch discriminator from step {config.adversarial_from}{adaptive}"


class PatchDiscriminator(nn.Module):
    """One score for each patch of an image (pix2pix): real or made. GroupNorm, so that no image sees its batch."""

    def __init__(self, channels: int, image_size: int) -> None:
        """As many strides as leave a map of at least 4 x 4, at most three."""
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, _WIDTH, 4, 2, padding=1), nn.LeakyReLU(0.2)]
        before, side = _WIDTH, image_size // 2
        while side >= 16 and before < 4 * _WIDTH:
            width = 2 * before
            layers += [nn.Conv2d(before, width, 4, 2, padding=1, bias=False), nn.GroupNorm(_GROUPS, width)]
            layers.append(nn.LeakyReLU(0.2))
            before, side = width, side // 2
        layers.append(nn.Conv2d(before, 1, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, value_ICHW: Tensor) -> Tensor:
        """Images in [-1, 1] to scores [I, 1, h, w]; above 0: real."""
        scores: Tensor = self.layers(value_ICHW)
        return scores


def discriminator_loss(real: Tensor, made: Tensor) -> Tensor:
    """The hinge loss of the scores; 0 where each is right by a margin of 1."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + made).mean())


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_weight: Tensor) -> Tensor:
    """|gradient of the reconstruction| / |gradient of the adversarial loss| at the decoder's last layer.

    So both pull alike there, whatever their scales (Esser et al. 2021, eq. 7).
    """
    (of_reconstruction,) = torch.autograd.grad(reconstruction, last_weight, retain_graph=True)
    (of_adversarial,) = torch.autograd.grad(adversarial, last_weight, retain_graph=True)
    ratio = of_reconstruction.norm() / (of_adversarial.norm() + 1e-4)
    return ratio.clamp(0, _MAX_RATIO).detach()
