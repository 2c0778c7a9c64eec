"""The network that a configuration describes, and the compilation of its blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from transfusion.config import Config
from transfusion.model import FAMILIES, Network
from transfusion.model.attention import PlainAttention, Sharing


def build_model(config: Config, sharing: Sharing | None = None) -> Network:
    """The network with uninitialised weights in fp32, on torch's default device.

    sharing: the ranks that share rows, if any do.
    """
    if config.model.vocabulary == 0:
        raise ValueError("model.vocabulary must hold the tokenizer's size before an engine is built")
    backend = config.train.attention
    return FAMILIES[config.model.family](
        config.model,
        config.codec,
        attend=PlainAttention(backend) if sharing is None else sharing.attention(backend),
        loss_chunk_size=config.train.loss_chunk_size,
        activation_checkpointing=config.train.activation_checkpointing,
        z_loss=config.train.z_loss,
        sharing=sharing,
    )


def compile_blocks(model: Network) -> None:
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
