"""How far a figure might be off because other samples could have been drawn: bootstrap intervals (Efron, 1979).

N samples, R resamples, B of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Interval = tuple[float, float]
Floats = NDArray[np.float64]

LEVEL = 0.95
# Of a mean, of a distance, and of a distance that takes seconds. FEW have no quantiles: see `_around`.
RESAMPLES, COSTLY_RESAMPLES, FEW_RESAMPLES = 2000, 200, 20
# Counts of samples in resamples that are in memory at once.
_BLOCK = 2**22


def ratio_interval(sums_N: Sequence[float], counts_N: Sequence[float], *, seed: int = 0) -> Interval | None:
    """The interval of the sum of all sums over that of all counts. None for fewer than two samples.

    A sample that counts nothing is none: alone in a resample it would have no ratio.
    """
    sums, counts = np.asarray(sums_N, np.float64), np.asarray(counts_N, np.float64)
    sums, counts = sums[counts > 0], counts[counts > 0]
    if len(sums) < 2:
        return None
    ratios = [(times_BN @ sums) / (times_BN @ counts) for times_BN in _times(len(sums), RESAMPLES, seed)]
    return _around(sums.sum() / counts.sum(), np.concatenate(ratios))


def mean_interval(values_N: Sequence[float], *, seed: int = 0) -> Interval | None:
    """The interval of the mean. None for fewer than two values."""
    return ratio_interval(values_N, np.ones(len(values_N)).tolist(), seed=seed)


def interval(
    count: int,
    statistic: Callable[[NDArray[np.int64]], float],
    *,
    seed: int = 0,
    resamples: int = COSTLY_RESAMPLES,
) -> Interval | None:
    """The interval of a costly statistic of the samples of these numbers, [N]. None for fewer than two."""
    if count < 2:
        return None
    generator = np.random.default_rng(seed)
    found = [statistic(generator.integers(0, count, count)) for _ in range(resamples)]
    return _around(statistic(np.arange(count)), np.array(found))


def _times(count: int, resamples: int, seed: int) -> Iterator[Floats]:
    """How often each sample is in each resample, [B, N], a few resamples at once."""
    generator = np.random.default_rng(seed)
    block = max(1, _BLOCK // count)
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        yield generator.multinomial(count, np.full(count, 1 / count), size).astype(np.float64)


def _around(value: float, resampled_R: Floats) -> Interval:
    """The value with the spread of its resamples.

    Not their quantiles as they are: repeated samples move a distance of distributions up in all resamples. Of few
    resamples the deviation is taken, and the normal law.
    """
    tail = (1 - LEVEL) / 2
    if len(resampled_R) <= FEW_RESAMPLES:
        half = NormalDist().inv_cdf(1 - tail) * resampled_R.std(ddof=1)
        return float(value - half), float(value + half)
    low, high = np.quantile(resampled_R - resampled_R.mean(), [tail, 1 - tail])
    return float(value + low), float(value + high)
