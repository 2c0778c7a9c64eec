"""From a configuration to its family and its network."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from transfusion.config import CodecConfig, Config, ModelConfig
from transfusion.families import FAMILIES, Family
from transfusion.model.attention import PlainAttention, Sharing
from transfusion.model.backbone import Backbone, is_of_text


def family_of(config: Config) -> Family:
    """The family that `model.family` names."""
    return FAMILIES[config.model.family]


def network_of(config: Config, **options: Any) -> Backbone:
    """The network of the family, as it is before training chooses anything of it. options: of its class."""
    modalities = {"modalities": config.modalities} if config.modalities else {}
    return family_of(config).network(config.model, config.codec, **modalities, **options)


def build_model(config: Config, sharing: Sharing | None = None) -> Backbone:
    """The network with uninitialised weights in fp32, on torch's default device.

    What `train.freeze` names takes no gradient. sharing: the ranks that share rows, if any do.
    """
    if config.model.vocabulary == 0:
        raise ValueError("model.vocabulary must hold the tokenizer's size before an engine is built")
    backend = config.train.attention
    network = network_of(
        config,
        attend=PlainAttention(backend) if sharing is None else sharing.attention(backend),
        loss_chunk_size=config.train.loss_chunk_size,
        activation_checkpointing=config.train.activation_checkpointing,
        z_loss=config.train.z_loss,
        sharing=sharing,
    )
    if "text" in config.train.freeze:
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(not is_of_text(name))
    return network


def count_parameters(config: ModelConfig, codec: CodecConfig) -> dict[str, int]:
    """Number of parameters of each part of the network, and their `total`, counted from real modules on meta."""
    with torch.device("meta"):
        model = FAMILIES[config.family].network(config, codec)
    parts = elements_of_parts(model)
    return parts | {"total": sum(parts.values())}


def elements_of_parts(model: nn.Module) -> dict[str, int]:
    """Elements of each child's parameters. One that several children have counts for the first of them."""
    parts = {name: 0 for name, _ in model.named_children()}
    for name, parameter in model.named_parameters():
        parts[name.partition(".")[0]] += parameter.numel()
    return parts


def compute_dtype(config: Config) -> torch.dtype:
    """What the network runs in."""
    return torch.bfloat16 if config.train.precision == "bf16" else torch.float32
