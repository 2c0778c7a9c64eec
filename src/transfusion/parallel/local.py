"""The plain engine: one process, torch alone. What every other engine is tested against."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from transfusion.codec import Codec
from transfusion.config import Config
from transfusion.families.build import build_model, compute_dtype
from transfusion.model.backbone import compile_blocks
from transfusion.model.initialise import initialise
from transfusion.optim import groups
from transfusion.optim.ema import MovingAverage
from transfusion.parallel.engine import Engine
from transfusion.parallel.environment import Environment
from transfusion.parallel.module_norms import FlatSlice
from transfusion.parallel.muon import Muon
from transfusion.parallel.parameter_shards import WEIGHT, Shard, module_of
from transfusion.parallel.step_result import PendingResult
from transfusion.parallel.ulysses import SequenceGroup


class LocalEngine(Engine):
    """AdamW, or Muon with it, on fp32 weights; with bf16, the network runs on a low-precision copy of them."""

    def __init__(self, config: Config, environment: Environment, codec: Codec | None = None) -> None:
        super().__init__(config, environment, codec)
        self.rank, self.world_size, self.sequence = 0, 1, SequenceGroup()
        model = build_model(config)
        initialise(model, seed=config.run.seed, layers=config.model.layers)
        self.model = self.runner = model.to(self.device)
        # The optimiser's weights, always fp32: the parameters themselves, or what they are rounded from.
        self.masters = {name: parameter for name, parameter in self.model.named_parameters()}
        self.rounded = config.train.precision == "bf16"
        if self.rounded:
            self.masters = {
                name: nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
                for name, parameter in self.masters.items()
            }
            self.model.to(torch.bfloat16)
        if config.train.compile:
            compile_blocks(self.model, config)
        parameters = groups.parameter_groups(self.masters, self.masters, config.optimizer)
        self.optimizer = groups.adamw(parameters, config.optimizer, fused=groups.runs_fused(self.device))
        self.trained = [name for name, master in self.masters.items() if master.requires_grad]
        trained = [self.masters[name] for name in self.trained]
        groups.create_moments(self.optimizer, trained)
        by_muon = groups.for_muon(self.masters, config.optimizer)
        if by_muon:
            shapes = {name: tuple(self.masters[name].shape) for name in by_muon}
            places = {
                name: FlatSlice(number, 0, 0, master.numel())
                for number, (name, master) in enumerate(zip(self.trained, trained, strict=True))
            }
            Muon(self.optimizer, trained, [places], shapes, rank=0, dtype=compute_dtype(config))
        self.average = MovingAverage(trained, config.optimizer.average_decay)

    def _backward(self, loss: Tensor) -> None:
        """See `Engine._backward`; gradients add up in fp32."""
        loss.backward()
        if self.rounded:
            for name, parameter in self.model.named_parameters():
                if parameter.grad is None:
                    continue
                master, gradient = self.masters[name], parameter.grad.float()
                master.grad = gradient if master.grad is None else master.grad + gradient
                parameter.grad = None

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
        self._updates = self._updates + (~skipped).long()
        for master in masters:
            master.grad = None
        return PendingResult(norm, skipped, norms)

    def shards(self) -> list[Shard]:
        """See `Engine.shards`: every parameter whole."""
        numbers = {name: number for number, name in enumerate(self.trained)}
        return [
            Shard(
                name,
                tuple(master.shape),
                0,
                master.numel(),
                self._values(numbers[name], master)
                if name in numbers
                else {WEIGHT: master.detach().flatten()},
            )
            for name, master in self.masters.items()
        ]

    def _module_norms(self) -> dict[str, float]:
        gradients: dict[str, list[Tensor]] = {}
        for name, master in self.masters.items():
            gradients.setdefault(module_of(name), []).extend([] if master.grad is None else [master.grad])
        return {name: float(torch.nn.utils.get_total_norm(parts)) for name, parts in gradients.items()}

    def _refresh(self) -> None:
        """Round the optimiser's weights into the network's, where these are a copy."""
        self._round(self.trained)

    def _refresh_frozen(self) -> None:
        """See `Engine._refresh_frozen`."""
        self._round([name for name in self.masters if name not in self.trained])

    @torch.no_grad()
    def _round(self, names: Sequence[str]) -> None:
        if self.rounded and names:
            parameters = dict(self.model.named_parameters())
            torch._foreach_copy_([parameters[name] for name in names], [self.masters[name] for name in names])
