"""A small Chameleon, a codec of tokens that is a formula, and images that it keeps exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from transfusion.config import Config
from transfusion.model import Chameleon
from transfusion.model.initialise import initialise
from transfusion.schema import Batch, Segment

CODES = 16
# Of 8 x 8 images in squares of 2 x 2.
TOKENS = 16


class Squares:
    """Each square of 2 x 2 grey pixels is a token: its mean in 16 levels."""

    codebook_size, bound = CODES, None

    def encode(self, values_ICHW: Tensor) -> Tensor:
        return (torch.nn.functional.avg_pool2d(values_ICHW.float(), 2)[:, 0] / 16).long().clamp(max=15)

    def decode(self, token_Ihw: Tensor) -> Tensor:
        wide = token_Ihw.repeat_interleave(2, 1).repeat_interleave(2, 2)
        return (wide * 16 + 8).to(torch.uint8)[:, None]

    preview = decode

    def as_context(self, token_Ihw: Tensor) -> Tensor:
        return token_Ihw


def flat_image(seed: int) -> Tensor:
    """uint8 [1, 8, 8] that the codec gives back exactly."""
    token_Ihw = torch.randint(0, CODES, (1, 4, 4), generator=torch.Generator().manual_seed(seed))
    return Squares().decode(token_Ihw)[0]


def values_of(**sections: dict[str, Any]) -> dict[str, Any]:
    """A configuration as a file would hold it."""
    codec = {
        "kind": "vq",
        "folder": "codec",
        "channels": 1,
        "image_size": 8,
        "latent_channels": 3,
        "downscale": 2,
        "codebook_size": CODES,
    }
    model = {"family": "chameleon", "vocabulary": 320, "layers": 2, "hidden_size": 32, "heads": 4}
    values = {
        "model": model,
        "codec": codec,
        "data": {"sequence_length": 128},
        "train": {"precision": "fp32"},
    }
    return {name: {**values.get(name, {}), **sections.get(name, {})} for name in {*values, *sections}}


@pytest.fixture
def build() -> Callable[..., tuple[Config, Chameleon]]:
    """build(seed=..., **sections of values) -> (config, model) whose every weight matters."""

    def built(*, seed: int = 0, noise: float = 0.3, **sections: dict[str, Any]) -> tuple[Config, Chameleon]:
        config = Config.model_validate(values_of(**sections))
        model = Chameleon(config.model, config.codec, z_loss=config.train.z_loss)
        initialise(model, seed=seed, layers=config.model.layers)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
        return config, model

    return built


Pack = Callable[..., Batch]
Rows = Sequence[Sequence[Sequence[Segment]]]
