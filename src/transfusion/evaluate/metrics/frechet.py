"""The Fréchet distance between two sets of features, each taken as a Gaussian (Dowson and Landau, 1982).

N features, F their dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class Gaussian(NamedTuple):
    """Mean [F] and unbiased covariance [F, F]."""

    mean: Floats
    covariance: Floats


def gaussian_of(features_NF: NDArray[np.floating]) -> Gaussian:
    """The Gaussian of at least two features."""
    features = np.asarray(features_NF, np.float64)
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features must be [N, F] with N at least 2, got {list(features.shape)}")
    return Gaussian(features.mean(0), np.atleast_2d(np.cov(features, rowvar=False)))


def frechet_distance(left: Gaussian, right: Gaussian) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), the squared distance that FID also reports.

    The trace of the root is the sum of the roots of the eigenvalues of C1^(1/2) C2 C1^(1/2), which is symmetric, so
    that no complex root and no small term on the diagonal is needed.
    """
    return distance_from(left)(right)


def distance_from(left: Gaussian) -> Callable[[Gaussian], float]:
    """`frechet_distance` from one Gaussian to any number of others. Its root is taken once."""
    values, vectors = np.linalg.eigh(left.covariance)
    root = (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T

    def distance(right: Gaussian) -> float:
        shared = np.linalg.eigvalsh(root @ right.covariance @ root).clip(min=0.0)
        traces = np.trace(left.covariance) + np.trace(right.covariance) - 2.0 * np.sqrt(shared).sum()
        return float(((left.mean - right.mean) ** 2).sum() + traces)

    return distance
