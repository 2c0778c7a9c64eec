"""The Fréchet distance against closed forms and against scipy's root of a matrix."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import sqrtm

from transfusion.evaluate.metrics.frechet import Gaussian, frechet_distance, gaussian_of


def test_it_equals_the_formula_with_scipys_root() -> None:
    generator = np.random.default_rng(0)
    one, other = (
        gaussian_of(generator.normal(size=(50, 8)) @ generator.normal(size=(8, 8))) for _ in range(2)
    )
    root = sqrtm(one.covariance @ other.covariance)
    shift = ((one.mean - other.mean) ** 2).sum()
    expected = shift + np.trace(one.covariance + other.covariance - 2 * root.real)
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(other, one) == pytest.approx(expected, rel=1e-9)


def test_diagonal_gaussians_have_a_closed_form() -> None:
    one = Gaussian(np.array([1.0, 0.0]), np.diag([4.0, 9.0]))
    other = Gaussian(np.array([0.0, 2.0]), np.diag([1.0, 25.0]))
    # (1 + 4) + (2 - 1)^2 + (3 - 5)^2
    assert frechet_distance(one, other) == pytest.approx(10.0)


def test_features_are_at_no_distance_of_themselves_even_where_they_span_less_than_their_space() -> None:
    features = np.random.default_rng(0).normal(size=(5, 16))
    assert frechet_distance(gaussian_of(features), gaussian_of(features[::-1])) == pytest.approx(0, abs=1e-6)


def test_the_covariance_is_unbiased() -> None:
    assert gaussian_of(np.array([[0.0], [2.0]])).covariance == pytest.approx(np.array([[2.0]]))
    with pytest.raises(ValueError, match="at least 2"):
        gaussian_of(np.ones((1, 4)))
