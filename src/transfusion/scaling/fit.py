"""Power laws of a metric in training FLOPs, their uncertainty, and how many FLOPs one model needs to match another.

A law is `metric = a * flops^b`, a line through the logarithms of the points (paper, section 4.2 and figure 5). Its
uncertainty is a bootstrap of the residuals: new points on the line, each with a residual drawn with replacement and
enlarged by sqrt(n / (n - 2)), since a line through n points leaves residuals that are too small.

N points, R resamples, Q places.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from transfusion.errors import UserError

Floats = NDArray[np.float64]

RESAMPLES = 2000
LEVEL = 0.95
# Below this share of resamples in which the parity exists, its interval is not told.
_DEFINED = 0.95


@dataclass(frozen=True, slots=True, eq=False)
class Law:
    """log metric = intercept + exponent * (log flops - centre). The resamples have a pair each, [R].

    Between intercept and exponent at the mean of the points there is no correlation.
    """

    intercept: float
    exponent: float
    centre: float
    residual: float
    points: int
    intercept_R: Floats
    exponent_R: Floats

    def at(self, flops: Sequence[float] | Floats) -> Floats:
        """The metric at these FLOPs, [Q]."""
        log_Q = np.log(np.asarray(flops, np.float64)) - self.centre
        values: Floats = np.exp(self.intercept + self.exponent * log_Q)
        return values

    def band(self, flops: Sequence[float] | Floats, level: float = LEVEL) -> tuple[Floats, Floats]:
        """Lower and upper bound of the law (not of new points) at these FLOPs, each [Q]."""
        log_Q = np.log(np.asarray(flops, np.float64)) - self.centre
        lines_RQ = self.intercept_R[:, None] + self.exponent_R[:, None] * log_Q
        low_Q, high_Q = np.exp(np.quantile(lines_RQ, _tails(level), axis=0))
        return low_Q, high_Q

    def exponent_interval(self, level: float = LEVEL) -> tuple[float, float]:
        """Bounds of the exponent."""
        low, high = np.quantile(self.exponent_R, _tails(level))
        return float(low), float(high)


@dataclass(frozen=True, slots=True)
class Parity:
    """FLOPs that the one model needs to reach what the other has at `flops`, divided by `flops`.

    interval: None where in more than 5 % of the resamples the law does not get better with FLOPs, so that there is
    no such number. ratio: NaN where that holds of the law itself.
    """

    ratio: float
    interval: tuple[float, float] | None
    flops: float
    defined: float


def fit_law(
    flops: Sequence[float], metric: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES
) -> Law:
    """The law through N points. Raises UserError for fewer than three, one size only, or values not above zero."""
    x_N, y_N = np.asarray(flops, np.float64), np.asarray(metric, np.float64)
    if not (np.all(np.isfinite(x_N)) and np.all(np.isfinite(y_N)) and np.all(x_N > 0) and np.all(y_N > 0)):
        raise UserError("a power law needs positive finite FLOPs and values; leave the other points out")
    if len(x_N) < 3 or np.ptp(np.log(x_N)) == 0:
        raise UserError(f"a power law needs three points at two or more budgets, got {len(x_N)} points")
    log_N, value_N = np.log(x_N), np.log(y_N)
    centre = float(log_N.mean())
    intercept, exponent = _line(log_N - centre, value_N)
    fitted_N = intercept + exponent * (log_N - centre)
    residual_N = value_N - fitted_N
    enlarged_N = residual_N * math.sqrt(len(x_N) / (len(x_N) - 2))
    drawn_RN = np.random.default_rng(seed).integers(0, len(x_N), (resamples, len(x_N)))
    intercept_R, exponent_R = _line(log_N - centre, fitted_N + enlarged_N[drawn_RN])
    return Law(
        intercept=float(intercept),
        exponent=float(exponent),
        centre=centre,
        residual=float(np.sqrt((residual_N**2).sum() / (len(x_N) - 2))),
        points=len(x_N),
        intercept_R=intercept_R,
        exponent_R=exponent_R,
    )


def parity(law: Law, other: Law, flops: float, *, higher_is_better: bool, level: float = LEVEL) -> Parity:
    """How many times the FLOPs of `other` the model of `law` needs to reach what `other` has at `flops`."""
    sign = 1.0 if higher_is_better else -1.0
    goal = other.intercept + other.exponent * (math.log(flops) - other.centre)
    goal_R = other.intercept_R + other.exponent_R * (math.log(flops) - other.centre)
    # The laws' resamples are independent, also where the same seed drew both.
    goal_R = np.roll(goal_R, len(goal_R) // 2)
    ratio = math.nan
    if sign * law.exponent > 0:
        ratio = math.exp((goal - law.intercept) / law.exponent + law.centre - math.log(flops))
    good_R = sign * law.exponent_R > 0
    defined = float(good_R.mean())
    interval = None
    if defined >= _DEFINED:
        needed = (goal_R[good_R] - law.intercept_R[good_R]) / law.exponent_R[good_R] + law.centre
        # A slope of nearly nothing reaches the goal at numbers beyond floating point.
        low, high = np.exp(np.clip(np.quantile(needed - math.log(flops), _tails(level)), -700, 700))
        interval = (float(low), float(high))
    return Parity(ratio, interval, flops, defined)


def crossing(one: Law, other: Law) -> float:
    """FLOPs at which two laws give the same; NaN where their exponents are equal."""
    if one.exponent == other.exponent:
        return math.nan
    ahead = (other.intercept - other.exponent * other.centre) - (one.intercept - one.exponent * one.centre)
    # Slopes of nearly the same meet at numbers beyond floating point.
    return math.exp(min(max(ahead / (one.exponent - other.exponent), -700.0), 700.0))


def _line(x_N: Floats, y_N: Floats) -> tuple[Floats, Floats]:
    """Intercepts and slopes of least squares for values [..., N] at centred places [N]."""
    slope = (y_N @ x_N) / (x_N @ x_N)
    return y_N.mean(-1), slope


def _tails(level: float) -> tuple[float, float]:
    return (1 - level) / 2, (1 + level) / 2
