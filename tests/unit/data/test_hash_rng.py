"""Counter-based numbers."""

from __future__ import annotations

import numpy as np
import pytest

from transfusion.data.planning import hash_rng
from transfusion.files import name_hash


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 17, 1000, 4097])
def test_a_permutation_is_one(size: int) -> None:
    places = hash_rng.permuted(np.arange(size), size, 3, 1)
    assert sorted(places.tolist()) == list(range(size))


def test_permutations_differ_by_key_and_are_the_same_in_parts() -> None:
    whole = hash_rng.permuted(np.arange(500), 500, 7)
    assert (whole != hash_rng.permuted(np.arange(500), 500, 8)).sum() > 450
    parts = [hash_rng.permuted(np.arange(first, first + 50), 500, 7) for first in range(0, 500, 50)]
    assert np.array_equal(np.concatenate(parts), whole)


def test_numbers_are_even_and_do_not_depend_on_company() -> None:
    numbers = hash_rng.uniform(1, 2, np.arange(20_000))
    assert numbers.min() >= 0 and numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03
    assert hash_rng.uniform(1, 2, 137)[0] == numbers[137]


def test_the_numbers_stay_what_they_are() -> None:
    """They decide what every run sees: a change here is a change of every run's data."""
    assert hash_rng.bits(0, 1, [2, 3]).tolist() == [0x74963FA799894AB9, 0xFD946AE71E2C1470]
    assert name_hash("order") == 0xDD79A144C4631E44
    assert hash_rng.permuted(range(10), 10, 0).tolist() == [5, 4, 3, 8, 6, 9, 2, 7, 0, 1]
