"""The patch discriminator (pix2pix), and what both sides of it learn.

I images, C channels, H/W height and width, h/w of the map of scores.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_WIDTH, _MAX_WIDTH, _GROUPS = 64, 512, 8
# A ratio of gradients beyond this is not a ratio but a vanished denominator.
_MAX_RATIO = 1e4


class PatchDiscriminator(nn.Module):
    """One score for each patch of an image: real or made. GroupNorm, so that no image sees its batch."""

    def __init__(self, channels: int, image_size: int) -> None:
        """As many strides as leave a map of at least 4 x 4, at most three."""
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, _WIDTH, 4, 2, padding=1), nn.LeakyReLU(0.2)]
        before, side = _WIDTH, image_size // 2
        while side >= 16 and before < 4 * _WIDTH:
            width = min(2 * before, _MAX_WIDTH)
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
