"""Intervals are as wide as theory says, hold the truth as often as they claim, and say nothing of one sample."""

from __future__ import annotations

import numpy as np
import pytest

from transfusion.evaluate.metrics import bootstrap
from transfusion.evaluate.metrics.bootstrap import interval, mean_interval, ratio_interval
from transfusion.evaluate.metrics.frechet import frechet_distance, gaussian_of


def test_of_a_mean_it_is_as_wide_as_the_normal_law_says() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    found = mean_interval(values.tolist())
    assert found is not None
    half = 1.96 * values.std() / 20
    assert found == pytest.approx((values.mean() - half, values.mean() + half), abs=0.15 * half)
    assert found == mean_interval(values.tolist()), "the same values give the same interval"


def test_a_ratio_resamples_sums_and_counts_together() -> None:
    counts = np.random.default_rng(1).integers(1, 100, 200).astype(float)
    found = ratio_interval((2.5 * counts).tolist(), counts.tolist())
    assert found == pytest.approx((2.5, 2.5)), "each sample has the same ratio: nothing could be off"


def test_it_holds_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(2)
    held = 0
    for _ in range(300):
        found = mean_interval(generator.exponential(1.0, 80).tolist())
        assert found is not None
        held += found[0] <= 1.0 <= found[1]
    assert 0.88 <= held / 300 <= 0.98


def test_a_distance_of_distributions_lies_within_its_own_interval() -> None:
    """Repeated samples enlarge it in every resample, so that plain quantiles would lie above it."""
    generator = np.random.default_rng(3)
    features, other = generator.normal(size=(100, 16)), gaussian_of(generator.normal(size=(500, 16)))

    def distance(chosen: np.ndarray) -> float:
        return frechet_distance(gaussian_of(features[chosen]), other)

    found, value = interval(100, distance), distance(np.arange(100))
    assert found is not None and found[0] < value < found[1]
    resampled = [distance(generator.integers(0, 100, 100)) for _ in range(50)]
    assert min(resampled) > value


def test_a_sample_that_counts_nothing_is_none() -> None:
    assert ratio_interval([2.0, 0.0, 6.0], [1.0, 0.0, 2.0]) == ratio_interval([2.0, 6.0], [1.0, 2.0])
    assert ratio_interval([0.0, 0.0, 5.0], [0.0, 0.0, 5.0]) is None, "one sample tells no spread"


def test_resamples_are_counted_a_few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(4).normal(size=50).tolist()
    at_once = mean_interval(values)
    monkeypatch.setattr(bootstrap, "_BLOCK", 350)
    assert max(map(len, bootstrap._times(50, 20, 0))) == 7
    assert mean_interval(values) == pytest.approx(at_once, abs=1e-12)


def test_one_sample_has_none() -> None:
    assert mean_interval([1.0]) is None and interval(1, lambda chosen: 0.0) is None
