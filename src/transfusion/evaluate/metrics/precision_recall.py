"""Improved precision and recall of drawn images (Kynkäänniemi et al., 2019, section 2).

N and M features, F their dimension.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NEIGHBOURS = 3
# Features that are compared with all others at once.
_BLOCK = 1024


class PrecisionRecall(NamedTuple):
    """precise_N: which drawn features lie among the real ones. recalled_M: which real ones lie among those drawn."""

    precise_N: NDArray[np.float64]
    recalled_M: NDArray[np.float64]


def precision_recall(
    drawn_NF: NDArray[np.floating], real_MF: NDArray[np.floating], *, neighbours: int = NEIGHBOURS
) -> PrecisionRecall:
    """1 where a feature lies in the ball of one of the other side, else 0. The means are precision and recall.

    The ball of a feature reaches to its neighbour of that number on its own side. Raises ValueError where a side has
    too few features for that.
    """
    drawn, real = (torch.as_tensor(np.asarray(each, np.float64)) for each in (drawn_NF, real_MF))
    if min(len(drawn), len(real)) <= neighbours:
        raise ValueError(f"{len(drawn)} and {len(real)} features have not {neighbours} neighbours each")
    return PrecisionRecall(_within(drawn, real, neighbours), _within(real, drawn, neighbours))


def _within(features_NF: Tensor, others_MF: Tensor, neighbours: int) -> NDArray[np.float64]:
    """[N]: 1 where a feature lies in the ball of one of the others."""
    # The nearest one is the feature itself.
    radius_M = torch.cat(
        [torch.cdist(part, others_MF).kthvalue(neighbours + 1).values for part in others_MF.split(_BLOCK)]
    )
    inside = [(torch.cdist(part, others_MF) <= radius_M).any(1) for part in features_NF.split(_BLOCK)]
    return torch.cat(inside).double().numpy()
