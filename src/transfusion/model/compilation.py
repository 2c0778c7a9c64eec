"""The compilation of a network's blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from transfusion.model.backbone import Backbone


def compile_blocks(model: Backbone) -> None:
    """Compile each block's forward for training; sampling, whose shapes change all the time, stays eager.

    The forward and not the module is compiled, so that ZeRO's hooks stay outside of the graph.
    """
    for block in model.blocks:
        block.forward = _compiled_when_training(block)


def _compiled_when_training(block: nn.Module) -> Callable[..., Tensor]:
    eager = block.forward
    compiled = torch.compile(eager, dynamic=False)

    def forward(*arguments: Any) -> Tensor:
        return (compiled if torch.is_grad_enabled() else eager)(*arguments)

    return forward
