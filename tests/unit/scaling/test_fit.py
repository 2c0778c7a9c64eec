"""Laws with known exponents: found again, with intervals that hold them as often as they say."""

from __future__ import annotations

import math

import numpy as np
import pytest

from transfusion.errors import UserError
from transfusion.scaling.fit import Law, fit_law, parity

BUDGETS = np.repeat([1e12, 4e12, 1.6e13], 3)


def points(a: float, b: float, noise: float, seed: int) -> np.ndarray:
    return a * BUDGETS**b * np.exp(noise * np.random.default_rng(seed).standard_normal(len(BUDGETS)))


def test_points_on_a_line_give_its_law_exactly() -> None:
    law = fit_law(BUDGETS.tolist(), (7.5 * BUDGETS**-0.3).tolist())
    assert law.exponent == pytest.approx(-0.3, abs=1e-12)
    assert law.at([5e13])[0] == pytest.approx(7.5 * 5e13**-0.3)
    low, high = law.band([5e13])
    assert low[0] == pytest.approx(high[0])
    assert law.residual < 1e-12


def test_the_line_is_the_one_of_least_squares() -> None:
    values = points(3.0, -0.2, 0.3, seed=1)
    slope, intercept = np.polyfit(np.log(BUDGETS), np.log(values), 1)
    law = fit_law(BUDGETS.tolist(), values.tolist())
    assert law.exponent == pytest.approx(slope)
    assert law.at([1.0])[0] == pytest.approx(math.exp(intercept))


def test_the_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Band, exponent and parity at 90 %, in 200 worlds; with nine points a bootstrap holds a little less."""
    worlds, level = 200, 0.9
    hits = np.zeros(3)
    truth = (1.0 / 2.0) ** (1.0 / 0.25)
    for world in range(worlds):
        one = fit_law(BUDGETS.tolist(), points(10.0, -0.25, 0.1, seed=world).tolist(), resamples=300)
        other = fit_law(
            BUDGETS.tolist(), points(20.0, -0.25, 0.1, seed=world + 10_000).tolist(), resamples=300
        )
        low, high = one.band([3e13], level)
        hits[0] += low[0] <= 10.0 * 3e13**-0.25 <= high[0]
        low, high = one.exponent_interval(level)
        hits[1] += low <= -0.25 <= high
        found = parity(one, other, 1.6e13, higher_is_better=False, level=level)
        assert found.interval is not None
        hits[2] += found.interval[0] <= truth <= found.interval[1]
    assert (hits / worlds > 0.82).all() and (hits / worlds < 0.97).all(), hits / worlds


def test_parity_of_exact_laws_is_the_ratio_of_their_flops() -> None:
    one = exact(2.0, -0.5)
    other = exact(6.0, -0.5)
    # Three times worse at exponent -1/2: nine times the FLOPs.
    assert parity(one, other, 1e13, higher_is_better=False).ratio == pytest.approx(1 / 9)
    assert parity(other, one, 1e13, higher_is_better=False).ratio == pytest.approx(9)
    found = parity(exact(0.001, 0.1), exact(0.0005, 0.1), 1e13, higher_is_better=True)
    assert found.ratio == pytest.approx(2.0**-10)
    assert found.interval == pytest.approx((found.ratio, found.ratio))


def test_a_law_that_gets_worse_has_no_parity() -> None:
    found = parity(exact(2.0, 0.5), exact(6.0, -0.5), 1e13, higher_is_better=False)
    assert math.isnan(found.ratio) and found.interval is None and found.defined == 0


def test_the_resamples_of_two_laws_are_independent() -> None:
    values = points(10.0, -0.25, 0.1, seed=3).tolist()
    one, other = fit_law(BUDGETS.tolist(), values), fit_law(BUDGETS.tolist(), values)
    found = parity(one, other, 1.6e13, higher_is_better=False)
    # The same draws on both sides would leave an interval of no width.
    assert found.interval is not None and found.interval[1] > 1.3 * found.interval[0]


@pytest.mark.parametrize(
    ("flops", "metric", "words"),
    [
        ([1.0, 2.0], [1.0, 2.0], "three points"),
        ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0], "two or more budgets"),
        ([1.0, 2.0, 3.0], [1.0, 0.0, 2.0], "positive"),
        ([1.0, 2.0, 3.0], [1.0, math.nan, 2.0], "positive"),
    ],
)
def test_points_without_a_law_are_refused(flops: list[float], metric: list[float], words: str) -> None:
    with pytest.raises(UserError, match=words):
        fit_law(flops, metric)


def exact(a: float, b: float) -> Law:
    return fit_law(BUDGETS.tolist(), (a * BUDGETS**b).tolist())
