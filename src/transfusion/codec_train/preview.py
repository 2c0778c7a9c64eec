"""Fits the preview map of a codec by least squares.

I images, C channels of images, D channels that the decoder reads, E a one and both of these, N places, H/W height and
width of images, h/w of latents.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from transfusion.codec import pixels
from transfusion.codec.preview import PreviewMap

MAX_IMAGES = 1000
# Directions of the latents with less than this share of the largest variance are rounding.
_SMALLEST_VARIANCE = 1e-10


def fit_preview(pairs: Iterable[tuple[Tensor, Tensor]]) -> PreviewMap | None:
    """The linear map from latents to images, averaged down to their grid, that leaves the least squared error.

    Its sums are float64, so the order and the number of images at a time hardly matter.

    Args:
        pairs: What the decoder reads, fp32 [I, D, h, w], and the images, uint8 [I, C, H, W].

    Returns:
        The map. None where there are no images.
    """
    moment_EE, images = None, 0
    for read_IDhw, values_ICHW in pairs:
        channels, downscale = read_IDhw.shape[1], values_ICHW.shape[-1] // read_IDhw.shape[-1]
        colour_IChw = F.avg_pool2d(pixels.encode(values_ICHW), downscale)
        one_I1hw = torch.ones_like(colour_IChw[:, :1])
        together_IEhw = torch.cat([one_I1hw, read_IDhw.cpu(), colour_IChw], 1).double()
        together_EN = together_IEhw.transpose(0, 1).flatten(1)
        product_EE = together_EN @ together_EN.T
        moment_EE = product_EE if moment_EE is None else moment_EE + product_EE
        images += len(values_ICHW)
    if moment_EE is None:
        return None
    mean_E = moment_EE[0] / moment_EE[0, 0]
    covariance_EE = moment_EE / moment_EE[0, 0] - mean_E.outer(mean_E)
    read, colour = slice(1, 1 + channels), slice(1 + channels, None)
    inverse_DD = torch.linalg.pinv(covariance_EE[read, read], rtol=_SMALLEST_VARIANCE, hermitian=True)
    weight_CD = covariance_EE[colour, read] @ inverse_DD
    bias_C = mean_E[colour] - weight_CD @ mean_E[read]
    explained = (weight_CD * covariance_EE[colour, read]).sum()
    variance = covariance_EE[colour, colour].trace()
    # Images in one colour leave nothing to explain.
    share = float(explained / variance) if variance > _SMALLEST_VARIANCE else 1.0
    return PreviewMap(weight_CD.tolist(), bias_C.tolist(), downscale, share, images)
