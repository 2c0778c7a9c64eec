"""What a training loop sees of the machine: one protocol, kept by a plain engine and by ZeRO."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from transfusion.codec import Codec, TokenCodec
from transfusion.config import CodecConfig, Config
from transfusion.errors import UserError
from transfusion.model import FAMILIES, Network
from transfusion.parallel.agree import group_device, together
from transfusion.parallel.environment import Environment
from transfusion.parallel.results import PendingResult
from transfusion.parallel.sequence import SequenceGroup, refuse_unshared
from transfusion.parallel.shards import Shard
from transfusion.schema import Batch, ImageGroup, LossTerms
from transfusion_kernels import dispatch

Weights = Literal["raw", "ema"]


class GlobalCounts(NamedTuple):
    """What one optimiser step learns from, over all ranks and micro-batches: text targets, latent elements.

    0-dim float32 tensors. The loss of every micro-batch is divided by these, so that neither the number of
    ranks nor that of micro-batches changes the gradient.
    """

    text: Tensor
    image: Tensor


class Engine(Protocol):
    """Weights, optimiser and moving average of one model, in one process or in many.

    Every method but the properties is called by all ranks together, in the same order.
    """

    config: Config
    device: torch.device
    rank: int
    world_size: int
    # Whether a moving average is kept.
    averages: bool
    # The ranks that this one shares rows with: which rows to read, and this rank's part of them.
    sequence: SequenceGroup

    @property
    def updates(self) -> int:
        """Optimiser updates made, skipped steps left out."""

    def forward_backward(self, batch: Batch, counts: GlobalCounts) -> LossTerms:
        """Add the gradient of one micro-batch. Returns this rank's own sums, detached, on its device."""

    def step(
        self, learning_rate: float, *, largest_norm: float = math.inf, module_norms: bool = False
    ) -> PendingResult:
        """Clip by the global norm and update, or skip on all ranks if the gradient of any is not finite.

        largest_norm: skip too where the global norm is greater. module_norms: tell the norm of each module.
        """

    def evaluation(self, weights: Weights) -> AbstractContextManager[Network]:
        """The network for forward passes without gradients, in eval mode, with raw or averaged weights.

        Every rank runs equally many forwards of equal parts, not under `torch.inference_mode`: ZeRO keeps
        what it gathers there for training. Raises UserError for "ema" where none is kept.
        """

    def shards(self) -> list[Shard]:
        """This rank's slices of every parameter with optimiser state, to be read or overwritten in place."""

    def shards_written(self, updates: int) -> None:
        """Take over what was written into the shards; `updates`: the optimiser steps behind them."""


def build_engine(config: Config, environment: Environment, codec: Codec | TokenCodec | None = None) -> Engine:
    """The engine that `train.engine` names, with freshly initialised weights.

    auto: ZeRO with more than one process or on a GPU, else local. `config.model.vocabulary` must be set.
    codec: of the pictures; None: their pixels.
    Called by all ranks together. Raises UserError on every rank, before anything is built: for the local
    engine in several processes, ZeRO without DeepSpeed, rows that the processes cannot share, and an attention that
    cannot run here.
    """
    kind = config.train.engine
    if kind == "auto":
        kind = "zero" if environment.world_size > 1 or environment.device.type == "cuda" else "local"
    together(lambda: refuse_unshared(config, environment.world_size))
    together(lambda: _refuse_attention(config, environment.device))
    if kind == "local":
        if environment.world_size > 1:
            raise UserError(
                f"train.engine=local runs in one process, but {environment.world_size} were started; "
                "use train.engine=zero, or start a single process"
            )
        from transfusion.parallel.local import LocalEngine

        return LocalEngine(config, environment, codec)
    from transfusion.parallel.zero import ZeroEngine, import_deepspeed

    # Building it takes collectives, which a rank without DeepSpeed would never join.
    together(import_deepspeed)
    return ZeroEngine(config, environment, codec)


def _refuse_attention(config: Config, device: torch.device) -> None:
    """Raise UserError where the attention asked for cannot run, or a GPU would silently use the dense one."""
    model, asked = config.model, config.train.attention
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    query = torch.empty(1, model.heads, 1, model.head_dim, device=device, dtype=dtype)
    try:
        choice = dispatch.choose(asked, query)
    except ValueError as error:
        raise UserError(
            f"train.attention={asked} cannot run on {device.type}: {error}; set train.attention=auto"
        ) from None
    fell_back = asked == "auto" and dispatch.ENVIRONMENT_VARIABLE not in choice.reason
    if device.type == "cuda" and choice.implementation == "reference" and fell_back:
        raise UserError(
            f"attention on this GPU would be the dense reference, since {choice.reason} (head_dim is model.width "
            f"{model.width} / model.heads {model.heads}); change that, or ask for it: train.attention=reference"
        )


def build_model(config: Config, sequence: SequenceGroup | None = None) -> Network:
    """The network with uninitialised weights in fp32, on torch's default device.

    sequence: the ranks that share rows, if any do.
    """
    if config.model.vocabulary == 0:
        raise ValueError("model.vocabulary must hold the tokenizer's size before an engine is built")
    return FAMILIES[config.model.family](
        config.model,
        config.codec,
        attention=config.train.attention,
        head_chunk=config.train.head_chunk,
        activation_checkpointing=config.train.activation_checkpointing,
        z_loss=config.train.z_loss,
        sharing=sequence if sequence is not None and sequence.degree > 1 else None,
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


def global_counts(batches: Sequence[Batch], codec: CodecConfig | None = None) -> GlobalCounts:
    """Count what this rank's micro-batches of one step hold and sum it over all ranks, in one collective.

    codec: of the pictures; None: their pixels.
    """
    # float64: a global batch of pictures has more elements than float32 counts exactly.
    text = torch.stack([batch.text_weight_BS.sum(dtype=torch.float64) for batch in batches]).sum()
    image = torch.stack(
        [
            group.image_weight_I.sum(dtype=torch.float64) * image_elements(group, codec)
            for batch in batches
            for group in batch.images
        ]
    ).sum()
    counts = torch.stack([text, image])
    if dist.is_initialized() and dist.get_world_size() > 1:
        counts = counts.to(group_device())
        dist.all_reduce(counts)
    return GlobalCounts(*counts.float())


def latent_shape(group: ImageGroup, codec: CodecConfig | None) -> tuple[int, int, int]:
    """[C, H, W] of the latents of each image of the group, known before it is encoded; codec None: pixels."""
    if group.values.dim() == 3:
        # Tokens. Their codec knows how deep its codes are; nothing here asks.
        return 1, *group.values.shape[1:]
    _, channels, height, width = group.values.shape
    if codec is not None and not group.values.is_floating_point():
        return codec.latent_shape(height, width)
    return channels, height, width


def image_elements(group: ImageGroup, codec: CodecConfig | None) -> int:
    """What each image of the group has of the image loss: numbers of its latents, or tokens."""
    shape = latent_shape(group, codec)
    return math.prod(shape[1:]) if codec is not None and codec.kind == "vq" else math.prod(shape)


def training_loss(loss: Tensor) -> Tensor:
    """The same loss, whose gradient is NaN everywhere if the loss itself is not finite.

    A loss can overflow while its gradient stays finite. This way the gradient norm, which all ranks see
    alike, tells of both, and no further collective is needed.
    """
    return loss * (1.0 + 0.0 * loss.detach())
