"""What a diffusion network may predict, and which samplers draw images with it."""

from __future__ import annotations

from typing import Literal

PredictionName = Literal["epsilon", "v", "flow", "x"]
# What a network of each prediction answers, in words.
PREDICTED: dict[PredictionName, str] = {
    "epsilon": "noise",
    "v": "velocity",
    "flow": "flow velocity",
    "x": "clean image",
}
# What the image loss is a squared error of. A predicted clean image means a velocity.
COMPARED: dict[PredictionName, str] = PREDICTED | {"x": "flow velocity"}
# Predictions on the straight path from image to noise. The others are on the cosine schedule.
STRAIGHT: tuple[PredictionName, ...] = ("flow", "x")
# Below this noise level the error of a clean image counts as it does at this one (Li and He, 2025, section 4).
MIN_X_SIGMA = 0.05
# What can draw images with a network of each prediction. "auto" is the first. `diffusion.samplers.BUILDERS` builds
# each.
SAMPLERS: dict[PredictionName, tuple[str, ...]] = {
    "epsilon": ("ddim", "ddpm", "dpmpp_2m"),
    "v": ("ddim", "ddpm", "dpmpp_2m"),
    "flow": ("euler", "heun", "dpmpp_2m"),
    "x": ("euler", "heun", "dpmpp_2m"),
}
