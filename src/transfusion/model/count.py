"""Parameters by part, counted from the configuration's real modules on the meta device."""

from __future__ import annotations

import torch

from transfusion.config import CodecConfig, ModelConfig
from transfusion.model import FAMILIES


def count_parameters(config: ModelConfig, codec: CodecConfig) -> dict[str, int]:
    """Number of parameters of each part of the network, and their `total`."""
    with torch.device("meta"):
        model = FAMILIES[config.family](config, codec)
    parts = {name: sum(p.numel() for p in child.parameters()) for name, child in model.named_children()}
    return parts | {"total": sum(parts.values())}
