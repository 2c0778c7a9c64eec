"""The laws of the timesteps."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest

from transfusion.config import DiffusionConfig
from transfusion.data.planning import hash_rng
from transfusion.sequence.timesteps import TimestepLaw, shifted

UNIFORMS = hash_rng.uniform(7, np.arange(20_000))


def law_of(diffusion: DiffusionConfig) -> TimestepLaw:
    return TimestepLaw(
        diffusion.timestep_sampling,
        diffusion.timestep_shift,
        diffusion.steps,
        diffusion.logit_mean,
        diffusion.logit_std,
    )


def levels(limit: int = 1000, **fields: Any) -> np.ndarray:
    """Noise levels in (0, 1) drawn under a law, at the middle of their timesteps."""
    law = law_of(DiffusionConfig(**fields))
    drawn = np.array([law.draw(uniform, limit) for uniform in UNIFORMS.tolist()])
    assert drawn.min() >= 0 and drawn.max() < limit
    return (drawn + 0.5) / law.steps


def logit(level: np.ndarray) -> np.ndarray:
    return np.log(level / (1 - level))


def test_no_shift_lifts_noise_above_all_noise() -> None:
    for hundredths in range(1, 2000):
        assert shifted(1.0, hundredths / 100) <= 1
    assert shifted(1.0, 0.1) == pytest.approx(1)


@pytest.mark.parametrize("limit", [1000, 500, 1])
def test_the_uniform_law_is_the_scaled_number(limit: int) -> None:
    law = law_of(DiffusionConfig())
    expected = (UNIFORMS * limit).astype(np.int64)
    assert [law.draw(uniform, limit) for uniform in UNIFORMS.tolist()] == expected.tolist()


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_the_logit_normal_law_is_normal_in_the_logit(shift: float) -> None:
    """A shift moves the logit by its logarithm and changes nothing else."""
    drawn = logit(levels(prediction="flow", timestep_sampling="logit-normal", timestep_shift=shift))
    assert abs(drawn.mean() - math.log(shift)) < 0.03 and abs(drawn.std() - 1) < 0.03
    below = np.array([(drawn < math.log(shift) + z).mean() for z in (-2, -1, 0, 1, 2)])
    expected = [NormalDist().cdf(z) for z in (-2, -1, 0, 1, 2)]
    np.testing.assert_allclose(below, expected, atol=0.02)


def test_the_logit_has_the_mean_and_deviation_that_are_set() -> None:
    """The law of Li and He (2025, table 9): mostly noise, seldom either end."""
    fields = {"timestep_sampling": "logit-normal", "logit_mean": 0.8, "logit_std": 0.8}
    drawn = logit(levels(prediction="x", **fields))
    assert abs(drawn.mean() - 0.8) < 0.03 and abs(drawn.std() - 0.8) < 0.03


def test_a_shifted_uniform_law_has_the_shifted_quantiles() -> None:
    drawn = levels(prediction="flow", timestep_shift=3.0)
    for share in (0.1, 0.5, 0.9):
        assert abs(np.quantile(drawn, share) - shifted(share, 3.0)) < 0.01
    assert shifted(0.5, 3.0) == 0.75 and shifted(shifted(0.3, 3.0), 1 / 3.0) == pytest.approx(0.3)


@pytest.mark.parametrize(
    "fields",
    [
        {"timestep_sampling": "logit-normal"},
        {"timestep_shift": 3.0},
        {"timestep_sampling": "logit-normal", "timestep_shift": 3.0},
        {"timestep_sampling": "logit-normal", "logit_mean": 0.8, "logit_std": 0.5},
    ],
)
def test_a_limit_leaves_the_law_as_it_is_below(fields: dict[str, Any]) -> None:
    whole, below = levels(prediction="flow", **fields), levels(limit=500, prediction="flow", **fields)
    part = whole[whole < 0.5]
    for share in (0.1, 0.5, 0.9):
        assert abs(np.quantile(below, share) - np.quantile(part, share)) < 0.02


@pytest.mark.parametrize("uniform", [0.0, 2.0**-53, 1 - 2.0**-53])
@pytest.mark.parametrize("limit", [1, 500, 1000])
@pytest.mark.parametrize("shift", [1.0, 0.01, 100.0])
def test_the_ends_stay_in_range(uniform: float, limit: int, shift: float) -> None:
    law = TimestepLaw("logit-normal", shift, 1000)
    assert 0 <= law.draw(uniform, limit) < limit
