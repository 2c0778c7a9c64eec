"""What a diffusion network may predict, and which samplers draw images with it."""

from __future__ import annotations

from typing import Literal

ObjectiveName = Literal["noise", "velocity", "flow"]
# What a network of each objective answers, in words.
PREDICTED: dict[ObjectiveName, str] = {
    "noise": "noise",
    "velocity": "velocity",
    "flow": "flow velocity",
}
SamplerName = Literal["auto", "ddpm", "ddim", "euler", "heun"]
# What can draw images with a network of each objective. "auto" is the first, in the training grid the first that
# adds no noise on its way.
SAMPLERS: dict[ObjectiveName, tuple[SamplerName, ...]] = {
    "noise": ("ddpm", "ddim"),
    "velocity": ("ddpm", "ddim"),
    "flow": ("euler", "heun"),
}
GRID_SAMPLER: dict[ObjectiveName, SamplerName] = {"noise": "ddim", "velocity": "ddim", "flow": "euler"}
