"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math

from transfusion.config import OptimizerConfig


def learning_rate(step: int, config: OptimizerConfig, total_steps: int) -> float:
    """Rate of step `step`, counted from 0: linear warm-up to the peak, then a cosine to the final rate.

    The warm-up's last step has the peak rate and step `total_steps - 1` the final one; later steps keep it.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    remaining = max(total_steps - 1 - config.warmup_steps, 1)
    progress = min((step - config.warmup_steps) / remaining, 1.0)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * cosine
