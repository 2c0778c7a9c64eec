"""The plain engine: one process, torch alone. What every other engine is tested against."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from transfusion.codec import Codec
from transfusion.config import Config
from transfusion.errors import UserError
from transfusion.families.build import build_loss, build_model
from transfusion.losses.loss import training_loss
from transfusion.model.backbone import Backbone
from transfusion.model.compilation import compile_blocks
from transfusion.model.initialise import initialise
from transfusion.optim import groups
from transfusion.optim.ema import MovingAverage
from transfusion.parallel.engine import Weights
from transfusion.parallel.environment import Environment
from transfusion.parallel.parameter_shards import (
    AVERAGE,
    FIRST_MOMENT,
    SECOND_MOMENT,
    WEIGHT,
    Shard,
    module_of,
)
from transfusion.parallel.step_result import PendingResult, UpdateCount
from transfusion.parallel.ulysses import SequenceGroup
from transfusion.schema import Batch, LossTerms


class LocalEngine:
    """AdamW on fp32 weights; with bf16, the network runs on a low-precision copy of them."""

    def __init__(self, config: Config, environment: Environment, codec: Codec | None = None) -> None:
        self.config = config
        self.device, self.rank, self.world_size = environment.device, 0, 1
        self.sequence, self._count = SequenceGroup(), UpdateCount()
        self.loss = build_loss(config, codec)
        model = build_model(config)
        initialise(model, seed=config.run.seed, layers=config.model.layers)
        self.model = model.to(self.device)
        # The optimiser's weights, always fp32: the parameters themselves, or what they are rounded from.
        self.masters = {name: parameter for name, parameter in self.model.named_parameters()}
        self.rounded = config.train.precision == "bf16"
        if self.rounded:
            self.masters = {
                name: nn.Parameter(parameter.detach().clone()) for name, parameter in self.masters.items()
            }
            self.model.to(torch.bfloat16)
        if config.train.compile:
            compile_blocks(self.model)
        parameters = groups.parameter_groups(self.masters, self.masters, config.optimizer.weight_decay)
        self.optimizer = groups.adamw(parameters, config.optimizer, fused=groups.runs_fused(self.device))
        groups.create_moments(self.optimizer, self.masters.values())
        self.averages = config.optimizer.ema_decay > 0
        averaged = list(self.masters.values()) if self.averages else []
        self.average = MovingAverage(averaged, config.optimizer.ema_decay)

    @property
    def updates(self) -> int:
        """See `Engine.updates`."""
        return self._count.read()

    def forward_backward(self, batch: Batch, counts: Mapping[str, Tensor]) -> LossTerms:
        """See `Engine.forward_backward`; gradients add up in fp32."""
        terms = self.loss.terms(self.model, batch.to(self.device))
        counts = {name: count.to(self.device) for name, count in counts.items()}
        training_loss(self.loss.combine(terms, counts)).backward()
        if self.rounded:
            for name, parameter in self.model.named_parameters():
                if parameter.grad is None:
                    continue
                master, gradient = self.masters[name], parameter.grad.float()
                master.grad = gradient if master.grad is None else master.grad + gradient
                parameter.grad = None
        return terms.detached()

    def step(
        self, learning_rate: float, *, max_norm: float = math.inf, module_norms: bool = False
    ) -> PendingResult:
        """See `Engine.step`."""
        masters, clip = list(self.masters.values()), self.config.optimizer.gradient_clip
        norm = torch.nn.utils.get_total_norm([master.grad for master in masters if master.grad is not None])
        norms = self._module_norms() if module_norms else None
        groups.set_learning_rate(self.optimizer, learning_rate)
        if groups.is_fused(self.optimizer):
            skipped = groups.clip_and_skip(self.optimizer, norm, max_norm, clip)
            self.optimizer.step()
            self.average.update(unless=skipped)
            self._refresh()
        else:
            skipped = ~norm.isfinite() | (norm > max_norm)
            if not skipped:
                torch.nn.utils.clip_grads_with_norm_(masters, clip, norm)
                self.optimizer.step()
                self.average.update()
                self._refresh()
        self._count.add(skipped)
        self.optimizer.zero_grad(set_to_none=True)
        return PendingResult(norm, skipped, norms)

    @contextmanager
    def evaluation(self, weights: Weights) -> Iterator[Backbone]:
        """See `Engine.evaluation`."""
        if weights == "ema" and not self.averages:
            raise UserError("no moving average is kept: set optimizer.ema_decay, or evaluate the raw weights")
        self._exchange(weights)
        self.model.eval()
        try:
            with torch.no_grad():
                yield self.model
        finally:
            self.model.train()
            self._exchange(weights)

    def shards(self) -> list[Shard]:
        """See `Engine.shards`: every parameter whole."""
        averages = dict(zip(self.masters, self.average.averages, strict=False))
        shards = []
        for name, master in self.masters.items():
            state = self.optimizer.state[master]
            values = {
                WEIGHT: master.detach().flatten(),
                FIRST_MOMENT: state["exp_avg"].flatten(),
                SECOND_MOMENT: state["exp_avg_sq"].flatten(),
            }
            if self.averages:
                values[AVERAGE] = averages[name].flatten()
            shards.append(Shard(name, tuple(master.shape), 0, master.numel(), values))
        return shards

    def shards_written(self, updates: int) -> None:
        """See `Engine.shards_written`."""
        self._count = UpdateCount(updates)
        groups.set_updates(self.optimizer, updates)
        self._refresh()

    def _module_norms(self) -> dict[str, float]:
        gradients: dict[str, list[Tensor]] = {}
        for name, master in self.masters.items():
            gradients.setdefault(module_of(name), []).extend([] if master.grad is None else [master.grad])
        return {name: float(torch.nn.utils.get_total_norm(parts)) for name, parts in gradients.items()}

    def _exchange(self, weights: Weights) -> None:
        if weights == "ema":
            self.average.exchange()
            self._refresh()

    @torch.no_grad()
    def _refresh(self) -> None:
        """Round the optimiser's weights into the network's, where these are a copy."""
        if self.rounded:
            parameters = dict(self.model.named_parameters())
            torch._foreach_copy_([parameters[name] for name in self.masters], list(self.masters.values()))
