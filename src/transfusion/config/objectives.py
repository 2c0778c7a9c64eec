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
# What can draw images with a network of each prediction. "auto" is the first. `diffusion.samplers.BUILDERS` builds
# each.
SAMPLERS: dict[PredictionName, tuple[str, ...]] = {
    "epsilon": ("ddim", "ddpm", "dpmpp_2m"),
    "v": ("ddim", "ddpm", "dpmpp_2m"),
    "flow": ("euler", "heun", "dpmpp_2m"),
}
