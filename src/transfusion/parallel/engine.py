"""What a training loop sees of the machine: one class, carried out by a plain engine and by ZeRO."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from transfusion.codec import Codec
from transfusion.config import Config
from transfusion.errors import UserError
from transfusion.families.build import family_of
from transfusion.losses.loss import training_loss
from transfusion.model.backbone import Backbone
from transfusion.optim import groups
from transfusion.optim.ema import MovingAverage
from transfusion.parallel.environment import Environment
from transfusion.parallel.parameter_shards import AVERAGE, FIRST_MOMENT, SECOND_MOMENT, WEIGHT, Shard
from transfusion.parallel.step_result import PendingResult
from transfusion.parallel.ulysses import SequenceGroup
from transfusion.schema import Batch, LossTerms

Weights = Literal["raw", "ema"]


class Engine(ABC):
    """Weights, optimiser and moving average of one model, in one process or in many.

    Every method but the properties is called by all ranks together, in the same order.
    """

    rank: int
    world_size: int
    # The ranks that this one shares rows with: which rows to read, and this rank's part of them.
    sequence: SequenceGroup
    model: Backbone
    # What batches are run through: the network, or what DeepSpeed makes of it.
    runner: nn.Module
    optimizer: torch.optim.AdamW
    average: MovingAverage

    def __init__(self, config: Config, environment: Environment, codec: Codec | None) -> None:
        self.config = config
        self.device: torch.device = environment.device
        self.loss = family_of(config).loss(config, codec)
        # Whether a moving average is kept.
        self.averages = config.optimizer.average_decay > 0
        # Counted on the device, which no step waits for.
        self._updates: Tensor | int = 0

    @property
    def updates(self) -> int:
        """Optimiser updates made, skipped steps left out."""
        return int(self._updates)

    def forward_backward(self, batch: Batch, counts: Mapping[str, Tensor]) -> LossTerms:
        """Add the gradient of one micro-batch. Returns this rank's own sums, detached, on its device."""
        terms = self.loss.terms(self.runner, batch.to(self.device))
        counts = {name: count.to(self.device) for name, count in counts.items()}
        self._backward(training_loss(self.loss.combine(terms, counts)))
        return terms.detached()

    @abstractmethod
    def step(
        self, learning_rate: float, *, max_norm: float = math.inf, module_norms: bool = False
    ) -> PendingResult:
        """Clip by the global norm and update, or skip on all ranks if the gradient of any is not finite.

        max_norm: skip too where the global norm is greater. module_norms: tell the norm of each module.
        """

    @contextmanager
    def evaluation(self, weights: Weights) -> Iterator[Backbone]:
        """The network for forward passes without gradients, in eval mode, with raw or averaged weights.

        Every rank runs equally many forwards of equal parts, not under `torch.inference_mode`: ZeRO keeps
        what it gathers there for training. Raises UserError for "ema" where none is kept.
        """
        if weights == "ema" and not self.averages:
            raise UserError("no moving average is kept: set optimizer.ema_decay, or evaluate the raw weights")
        self._use(weights)
        self.runner.eval()
        try:
            with torch.no_grad():
                yield self.model
        finally:
            self.runner.train()
            self._use(weights)

    @abstractmethod
    def shards(self) -> list[Shard]:
        """This rank's slices of every parameter and of its optimiser state, to be read or overwritten in place."""

    def shards_written(self, updates: int) -> None:
        """Take over what was written into the shards; `updates`: the optimiser steps behind them."""
        self._updates = updates
        groups.set_updates(self.optimizer, updates)
        self._refresh_frozen()
        self._refresh()

    @abstractmethod
    def _backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss to that of the step."""

    def _use(self, weights: Weights) -> None:
        """Swap the weights with what is asked for. Twice is no change."""
        if weights == "ema":
            self.average.exchange()
            self._refresh()

    @abstractmethod
    def _refresh(self) -> None:
        """Make the network compute with what the optimiser's tensors hold now."""

    @abstractmethod
    def _refresh_frozen(self) -> None:
        """Make the network compute with what the shards of frozen weights hold now. No step changes these."""

    def _values(self, number: int, weight: Tensor) -> dict[str, Tensor]:
        """By kind, flat: what there is of one of the optimiser's tensors, and of the average of that number."""
        state = self.optimizer.state[weight]
        values = {WEIGHT: weight.detach(), FIRST_MOMENT: state["exp_avg"]}
        if "exp_avg_sq" in state:
            values[SECOND_MOMENT] = state["exp_avg_sq"]
        if self.averages:
            values[AVERAGE] = self.average.averages[number]
        return {kind: tensor.flatten() for kind, tensor in values.items()}
