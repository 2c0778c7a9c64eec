"""The kernel distance between two sets of features, as KID takes it (Binkowski et al., 2018, section 3.2).

N and M features, F their dimension, S of each in a subset.
"""

from __future__ import annotations

from statistics import fmean, pstdev
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# What torch-fidelity draws its subsets with.
SEED = 2020


class KernelDistance(NamedTuple):
    """Mean and deviation over the subsets. Near zero the mean may be below it, since the estimate is unbiased."""

    mean: float
    deviation: float


def kernel_distance(
    left_NF: NDArray[np.floating], right_MF: NDArray[np.floating], *, subsets: int, size: int
) -> KernelDistance:
    """Of subsets of so many features of each side, drawn without replacement as torch-fidelity draws them.

    Raises ValueError for a subset of fewer than two features, or of more than there are.
    """
    left, right = np.asarray(left_NF, np.float64), np.asarray(right_MF, np.float64)
    if not 2 <= size <= min(len(left), len(right)):
        raise ValueError(f"subsets of {size} cannot be drawn from {len(left)} and {len(right)} features")
    random = np.random.RandomState(SEED)
    found = []
    for _ in range(subsets):
        left_SF = left[random.choice(len(left), size, replace=False)]
        right_SF = right[random.choice(len(right), size, replace=False)]
        found.append(squared_mmd(left_SF, right_SF))
    return KernelDistance(fmean(found), pstdev(found))


def squared_mmd(left_SF: Floats, right_SF: Floats) -> float:
    """The squared maximum mean discrepancy of as many features of each side, unbiased (Gretton et al., 2012, eq. 3)."""
    size = len(left_SF)
    within = sum(_without_diagonal(_kernel(each, each)) for each in (left_SF, right_SF))
    return float(within / (size * (size - 1)) - 2 * _kernel(left_SF, right_SF).mean())


def _kernel(left_SF: Floats, right_SF: Floats) -> Floats:
    """(x y / F + 1)^3 of each pair, [S, S]."""
    return (left_SF @ right_SF.T / left_SF.shape[1] + 1.0) ** 3


def _without_diagonal(kernel_SS: Floats) -> float:
    return float(kernel_SS.sum() - np.trace(kernel_SS))
