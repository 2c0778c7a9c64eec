"""What a diffusion network may predict, and which samplers draw images with it."""

from __future__ import annotations

from typing import Literal

PredictionName = Literal["epsilon", "v", "flow"]
# What a network of each prediction answers, in words.
PREDICTED: dict[PredictionName, str] = {
    "epsilon": "noise",
    "v": "velocity",
    "flow": "flow velocity",
}
# What can draw images with a network of each prediction. "auto" is the first, in the training grid the first that
# adds no noise on its way. Each is built by `diffusion.samplers.BUILDERS`.
SAMPLERS: dict[PredictionName, tuple[str, ...]] = {
    "epsilon": ("ddpm", "ddim"),
    "v": ("ddpm", "ddim"),
    "flow": ("euler", "heun"),
}
GRID_SAMPLER: dict[PredictionName, str] = {"epsilon": "ddim", "v": "ddim", "flow": "euler"}
