"""The network of a configuration in numbers, from its real modules on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from transfusion.config import Config
from transfusion.families.build import build_model, elements_of_parts


@dataclass(frozen=True, slots=True)
class Network:
    """Parameters, in elements. parts: by child of the network. sizes: of each parameter, in the network's order.

    block: of the largest block. outside: of each parameter that is in none. frozen: of those that are not trained.
    """

    parts: Mapping[str, int]
    sizes: tuple[int, ...]
    block: int
    outside: tuple[int, ...]
    frozen: int = 0

    @property
    def trained(self) -> int:
        """Elements with a gradient and the optimiser's state."""
        return self.elements - self.frozen

    @property
    def elements(self) -> int:
        return sum(self.sizes)

    def larger_than(self, threshold: int) -> int:
        """Elements in parameters of at least `threshold`: those that stage 3 shards."""
        return sum(size for size in self.sizes if size >= threshold)

    @property
    def largest(self) -> int:
        """Of one parameter."""
        return max(self.sizes)

    @property
    def max_gather(self) -> int:
        """The most that ZeRO-3 gathers at once: a block, or what is outside of them and largest."""
        return max(self.block, *self.outside)

    @classmethod
    def of(cls, config: Config) -> Network:
        """`config.model.vocabulary` must be set."""
        with torch.device("meta"):
            model = build_model(config)
        parts = elements_of_parts(model)
        parameters = dict(model.named_parameters())
        return cls(
            parts=parts,
            sizes=tuple(parameter.numel() for parameter in parameters.values()),
            block=max(sum(p.numel() for p in block.parameters()) for block in model.blocks),
            outside=tuple(p.numel() for name, p in parameters.items() if not name.startswith("blocks.")),
            frozen=sum(parameter.numel() for parameter in parameters.values() if not parameter.requires_grad),
        )
