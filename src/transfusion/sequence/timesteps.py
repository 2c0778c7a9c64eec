"""The law of the timesteps: from a uniform number, a hash of the sample, to the timestep of its image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

# Finished and prompted images are read as what they are: the least noise that training knows.
CLEAN_TIMESTEP = 0

_NORMAL = NormalDist()
# Half of the spacing of the uniform numbers, in the place of 0, whose quantile is infinite.
_MIN_SHARE = 2.0**-54


def shifted(level: float, shift: float) -> float:
    """A noise level in [0, 1], moved towards 1 by a shift above 1 (Esser et al., 2024, eq. 23).

    On a straight path it divides the ratio of signal to noise by the shift; 1 / shift undoes it.
    """
    # Rounding would lift the highest level above 1.
    return min(shift * level / (1 + (shift - 1) * level), 1.0)


@dataclass(frozen=True, slots=True)
class TimestepLaw:
    """Noise levels in [0, 1), cut into `steps` timesteps.

    Uniform, or the logistic function of a normal number (Esser et al., 2024, eq. 19); then shifted.
    """

    law: Literal["uniform", "logit-normal"]
    shift: float
    steps: int
    logit_mean: float = 0.0
    logit_std: float = 1.0

    def draw(self, uniform: float, limit: int) -> int:
        """The timestep for a number in [0, 1), by the law given that it lies below `limit`."""
        if self.law == "uniform" and self.shift == 1:
            return int(uniform * limit)
        share = 1.0 if limit == self.steps else self._share_below(limit / self.steps)
        return min(int(self._level(uniform * share) * self.steps), limit - 1)

    def _level(self, share: float) -> float:
        """The level below which this share of all levels lies."""
        if self.law == "logit-normal":
            logit = self.logit_mean + self.logit_std * _NORMAL.inv_cdf(max(share, _MIN_SHARE))
            # Beyond that a level is 0 or 1 to the last bit.
            share = 1 / (1 + math.exp(-min(max(logit, -700.0), 700.0)))
        return shifted(share, self.shift)

    def _share_below(self, level: float) -> float:
        """The share of all levels below one in (0, 1): the inverse of `_level`."""
        level = shifted(level, 1 / self.shift)
        if self.law == "uniform":
            return level
        return _NORMAL.cdf((math.log(level / (1 - level)) - self.logit_mean) / self.logit_std)
