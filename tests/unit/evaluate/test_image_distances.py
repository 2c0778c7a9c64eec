"""Kernel distance, precision and recall: against plain loops, against figures of torch-fidelity, and where they end."""

from __future__ import annotations

import numpy as np
import pytest

from transfusion.evaluate.metrics.bootstrap import FEW_RESAMPLES, interval, mean_interval
from transfusion.evaluate.metrics.kernel_distance import kernel_distance, squared_mmd
from transfusion.evaluate.metrics.precision_recall import precision_recall


def two_sets() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.RandomState(0)
    return random.standard_normal((40, 6)), 1.2 * random.standard_normal((50, 6)) + 0.3


def test_the_discrepancy_is_that_of_plain_loops_over_pairs() -> None:
    left, right = (each[:7] for each in two_sets())

    def kernel(one: np.ndarray, other: np.ndarray) -> float:
        return float((one @ other / 6 + 1) ** 3)

    pairs = [(i, j) for i in range(7) for j in range(7)]
    within = sum(kernel(each[i], each[j]) for each in (left, right) for i, j in pairs if i != j)
    across = sum(kernel(left[i], right[j]) for i, j in pairs)
    assert squared_mmd(left, right) == pytest.approx(within / 42 - 2 * across / 49, rel=1e-12)


def test_the_kernel_distance_is_that_of_torch_fidelity() -> None:
    """Its kid_features_to_metric gave these for the same features; tests/oracles asks it anew."""
    found = kernel_distance(*two_sets(), subsets=10, size=20)
    assert found.mean == pytest.approx(-0.252718842874475, rel=1e-10)
    assert found.deviation == pytest.approx(0.21573969556096712, rel=1e-10)


def test_a_subset_is_not_larger_than_what_there_is() -> None:
    for size in (1, 41):
        with pytest.raises(ValueError, match=f"subsets of {size} cannot be drawn from 40 and 50"):
            kernel_distance(*two_sets(), subsets=1, size=size)


def test_precision_and_recall_are_those_of_plain_loops_and_of_torch_fidelity() -> None:
    drawn, real = two_sets()

    def inside(features: np.ndarray, others: np.ndarray) -> list[float]:
        radius = [sorted(np.linalg.norm(others - other, axis=1))[3] for other in others]
        return [float((np.linalg.norm(others - each, axis=1) <= radius).any()) for each in features]

    found = precision_recall(drawn, real)
    assert found.precise_N.tolist() == inside(drawn, real)
    assert found.recalled_M.tolist() == inside(real, drawn)
    assert (found.precise_N.mean(), found.recalled_M.mean()) == pytest.approx((0.975, 0.74))


def test_images_of_one_kind_are_precise_and_recall_little() -> None:
    real = np.random.default_rng(0).normal(size=(200, 4))
    one_kind = 0.1 * np.random.default_rng(1).normal(size=(200, 4))
    found = precision_recall(one_kind, real)
    assert found.precise_N.mean() > 0.99 and found.recalled_M.mean() < 0.1
    with pytest.raises(ValueError, match="3 and 200 features have not 3 neighbours"):
        precision_recall(one_kind[:3], real)


def test_few_resamples_give_an_interval_about_as_wide_as_many() -> None:
    values = np.random.default_rng(0).normal(size=500)
    few = interval(500, lambda chosen: float(values[chosen].mean()), resamples=FEW_RESAMPLES)
    many = mean_interval(values.tolist())
    assert few is not None and many is not None
    assert sum(few) / 2 == pytest.approx(values.mean())
    assert few[1] - few[0] == pytest.approx(many[1] - many[0], rel=0.4)
