"""What a training loop sees of the machine: one protocol, kept by a plain engine and by ZeRO."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Literal, Protocol

import torch
from torch import Tensor

from transfusion.config import Config
from transfusion.losses.loss import Loss
from transfusion.model.backbone import Backbone
from transfusion.parallel.parameter_shards import Shard
from transfusion.parallel.step_result import PendingResult
from transfusion.parallel.ulysses import SequenceGroup
from transfusion.schema import Batch, LossTerms

Weights = Literal["raw", "ema"]


class Engine(Protocol):
    """Weights, optimiser and moving average of one model, in one process or in many.

    Every method but the properties is called by all ranks together, in the same order.
    """

    config: Config
    loss: Loss
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

    def forward_backward(self, batch: Batch, counts: Mapping[str, Tensor]) -> LossTerms:
        """Add the gradient of one micro-batch. Returns this rank's own sums, detached, on its device."""

    def step(
        self, learning_rate: float, *, max_norm: float = math.inf, module_norms: bool = False
    ) -> PendingResult:
        """Clip by the global norm and update, or skip on all ranks if the gradient of any is not finite.

        max_norm: skip too where the global norm is greater. module_norms: tell the norm of each module.
        """

    def evaluation(self, weights: Weights) -> AbstractContextManager[Backbone]:
        """The network for forward passes without gradients, in eval mode, with raw or averaged weights.

        Every rank runs equally many forwards of equal parts, not under `torch.inference_mode`: ZeRO keeps
        what it gathers there for training. Raises UserError for "ema" where none is kept.
        """

    def shards(self) -> list[Shard]:
        """This rank's slices of every parameter with optimiser state, to be read or overwritten in place."""

    def shards_written(self, updates: int) -> None:
        """Take over what was written into the shards; `updates`: the optimiser steps behind them."""
