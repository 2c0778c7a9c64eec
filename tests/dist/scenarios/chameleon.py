"""The Chameleon baseline on ranks of which some have no image."""

from __future__ import annotations

from typing import Any

import torch
from handmade import (
    small_config,
)

from scenarios.common import (
    NOTHING_KEPT,
)
from scenarios.equality import equals_local
from scenarios.evaluation import Letters
from transfusion.config import SampleGridConfig
from transfusion.generate.pipeline import Pipeline
from transfusion.parallel.environment import Environment
from transfusion.parallel.zero import ZeroEngine


class Levels:
    """A codec of tokens: each square of 2 x 2 grey pixels is its mean in 16 levels."""

    codebook_size, bound = 16, None

    def encode(self, values_ICHW: torch.Tensor) -> torch.Tensor:
        return (torch.nn.functional.avg_pool2d(values_ICHW.float(), 2)[:, 0] / 16).long()

    def decode(self, token_Ihw: torch.Tensor) -> torch.Tensor:
        wide = token_Ihw.repeat_interleave(2, 1).repeat_interleave(2, 2)
        return (wide * 16 + 8).to(torch.uint8)[:, None]

    preview = decode

    def as_context(self, token_Ihw: torch.Tensor) -> torch.Tensor:
        return token_Ihw


def chameleon(here: Environment) -> dict[str, Any]:
    """Image tokens on ranks with many images and with none: the same gathers, the loss of one process."""
    codec = {"kind": "vq", "folder": "-", "latent_channels": 3, "downscale": 2, "codebook_size": 16}
    changes = {f"codec__{name}": value for name, value in codec.items()}
    config = small_config(
        **changes,
        model__family="chameleon",
        model__patch_position="learned",
        train__zero=NOTHING_KEPT,
        train__z_loss=1e-3,
    )
    # The first three: later ones hold latents, which are no tokens.
    found = equals_local(config, here, steps=3, codec=Levels())
    engine = ZeroEngine(config, here, Levels())
    with engine.evaluation("raw") as module:
        grid = SampleGridConfig(prompts=["three", "two", "one"], guidance=2.0)
        pipeline = Pipeline(module, Letters(), config, engine.device, Levels())
        mine = pipeline.sample_grid(grid, rank=here.rank, ranks=here.world_size)
    return found | {"drawn": len(mine)}
