"""DeepSpeed ZeRO behind the engine protocol."""

from __future__ import annotations

import contextlib
import io
import math
from typing import Any

import torch
from torch import Tensor, nn

from transfusion.codec import Codec
from transfusion.config import Config
from transfusion.families.build import build_model, compute_dtype
from transfusion.model.backbone import Backbone, compile_blocks
from transfusion.model.initialise import initial_value
from transfusion.optim import groups
from transfusion.optim.ema import MovingAverage
from transfusion.parallel.collectives import gather
from transfusion.parallel.deepspeed_patches import (
    clip_and_skip_on_device,
    import_deepspeed,
    refuse_norms_above,
)
from transfusion.parallel.engine import Engine, Weights
from transfusion.parallel.environment import Environment, join_group
from transfusion.parallel.module_norms import FlatSlice, ModuleNorms
from transfusion.parallel.muon import Muon
from transfusion.parallel.parameter_shards import WEIGHT, Shard
from transfusion.parallel.step_result import PendingResult
from transfusion.parallel.ulysses import SequenceGroup
from transfusion.parallel.zero_config import deepspeed_config


class ZeroEngine(Engine):
    """ZeRO stage 1, 2 or 3. All state that trains lies in a few flat fp32 tensors a rank, `self.flats`."""

    def __init__(self, config: Config, environment: Environment, codec: Codec | None = None) -> None:
        deepspeed = import_deepspeed()
        join_group(environment)
        super().__init__(config, environment, codec)
        self.rank, self.world_size = environment.rank, environment.world_size
        self.sequence = SequenceGroup(
            config.train.sequence_parallel, rank=self.rank, world_size=self.world_size
        )
        self.stage = config.train.zero.stage
        with torch.device("meta"):
            described = dict(build_model(config).named_parameters())
        self.shapes = {name: tuple(parameter.shape) for name, parameter in described.items()}
        # DeepSpeed reports its own start there. Errors are raised all the same.
        with contextlib.redirect_stdout(io.StringIO()):
            self.model = self._wrap(deepspeed, described)
        self.runner = self.engine
        if config.train.compile:
            compile_blocks(self.model, config)
        self.flats = _flat_weights(self.zero, self.stage)
        groups.create_moments(self.optimizer, self.flats)
        self.slices = {
            name: flat_slice
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
            and (flat_slice := _locate(self.zero, self.stage, parameter, described[name].numel(), self.rank))
        }
        trained = [name for name, parameter in described.items() if parameter.requires_grad]
        # Norms first: Muon takes its gradients away.
        self.norms = ModuleNorms(self.optimizer, self.flats, self.slices, trained)
        by_muon = groups.for_muon(described, config.optimizer)
        if by_muon:
            shapes = {name: self.shapes[name] for name in by_muon}
            slices = gather(self.slices)
            dtype = compute_dtype(config)
            Muon(self.optimizer, self.flats, slices, shapes, rank=self.rank, dtype=dtype)
        self.frozen = self._frozen()
        self._initialise()
        self.average = MovingAverage(self.flats, config.optimizer.average_decay)

    def _backward(self, loss: Tensor) -> None:
        """See `Engine._backward`. That `step` ends the accumulation is in DeepSpeed's configuration."""
        # DeepSpeed averages gradients over ranks, where ours are parts of one sum.
        self.engine.backward(loss * self.world_size)

    def step(
        self, learning_rate: float, *, max_norm: float = math.inf, module_norms: bool = False
    ) -> PendingResult:
        """See `Engine.step`.

        With a fused AdamW in stage 3 nothing waits for the device, unless `module_norms` are asked for. Otherwise
        DeepSpeed reads the norm, and skips the update on all ranks where it is not finite.
        """
        groups.set_learning_rate(self.optimizer, learning_rate)
        self.norms.begin(wanted=module_norms)
        on_device = groups.is_fused(self.optimizer) and self.stage == 3 and not self.zero.offload_optimizer
        if on_device:
            with clip_and_skip_on_device(self.zero, self.optimizer, max_norm) as decided:
                self.engine.step()
            norm, skipped = decided
            self.average.update(unless=skipped)
        else:
            with refuse_norms_above(self.zero, max_norm) as refused:
                self.engine.step()
            applied = self.engine.was_step_applied()
            if applied:
                self.average.update()
            kept = self.engine.get_global_grad_norm() if applied else refused[0] if refused else math.inf
            norm, skipped = torch.as_tensor(kept), torch.tensor(not applied)
        self._updates = self._updates + (~skipped).long()
        norms = self.norms.take(float(norm)) if module_norms and not skipped else None
        return PendingResult(norm, skipped, norms)

    def shards(self) -> list[Shard]:
        """See `Engine.shards`."""
        shards = []
        for name, (flat, offset, start, length) in self.slices.items():
            values = self._values(flat, self.flats[flat])
            slices = {kind: tensor.narrow(0, offset, length) for kind, tensor in values.items()}
            shards.append(Shard(name, self.shapes[name], start, length, slices))
        return shards + self.frozen

    def _frozen(self) -> list[Shard]:
        """This rank's slices of what is not trained, fp32: those that stage 3 gathers, or copies on the host."""
        shards = []
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                part = _gathered_part(parameter)
                start = self.rank * part.numel()
                length = min(part.numel(), math.prod(self.shapes[name]) - start)
                if length > 0:
                    part = part[:length] if part.dtype == torch.float32 else torch.empty(length)
                    shards.append(Shard(name, self.shapes[name], start, length, {WEIGHT: part}))
        return shards

    def _wrap(self, deepspeed: Any, described: dict[str, nn.Parameter]) -> Backbone:
        """Build the network and AdamW and hand both to DeepSpeed; `described` gives every parameter's shape."""
        cuda = self.device.type == "cuda"
        settings = deepspeed_config(self.config, world_size=self.world_size, cuda=cuda)
        # Takes over the process group that is there; without it DeepSpeed counts one rank.
        deepspeed.init_distributed()
        # Stage 3 shards every module as soon as it is made, so that no rank ever holds the whole model. The dtype
        # is read from the settings: given as an argument, it is ignored on CPUs without fp16, which get bf16.
        with deepspeed.zero.Init(config_dict_or_path=settings, enabled=self.stage == 3):
            model = build_model(self.config, self.sequence if self.sequence.degree > 1 else None)
        parameters = dict(model.named_parameters())
        decayed = groups.parameter_groups(described, parameters, self.config.optimizer)
        self.optimizer = groups.adamw(decayed, self.config.optimizer, fused=groups.runs_fused(self.device))
        self.engine, self.zero, _, _ = deepspeed.initialize(
            model=model, optimizer=self.optimizer, config=settings
        )
        return model

    @torch.no_grad()
    def _initialise(self) -> None:
        # The fp32 shards are filled, not the network, so that bf16 runs too start from unrounded weights.
        for name, (flat, offset, start, length) in self.slices.items():
            shape = torch.empty(self.shapes[name], device="meta")
            value = initial_value(name, shape, seed=self.config.run.seed, layers=self.config.model.layers)
            self.flats[flat].narrow(0, offset, length).copy_(value.flatten()[start : start + length])
        for shard in self.frozen:
            shape = torch.empty(shard.shape, device="meta")
            value = initial_value(
                shard.name, shape, seed=self.config.run.seed, layers=self.config.model.layers
            )
            shard.values[WEIGHT].copy_(value.flatten()[shard.start : shard.start + shard.length])
        self._refresh_frozen()
        self._refresh()

    @torch.no_grad()
    def _refresh_frozen(self) -> None:
        """See `Engine._refresh_frozen`: copies on the host are rounded into what is gathered."""
        parameters = dict(self.model.named_parameters())
        for shard in self.frozen:
            part = _gathered_part(parameters[shard.name])
            if part.dtype != torch.float32:
                part[: shard.length].copy_(shard.values[WEIGHT])

    def _use(self, weights: Weights) -> None:
        """See `Engine._use`; averages and weights are swapped shard by shard, nothing is gathered."""
        if self.stage == 3:
            # Evaluation visits modules in another order than training: forget the recorded one, lest
            # DeepSpeed gathers ahead what will not be used.
            coordinator = self.zero._get_param_coordinator()
            if not coordinator.is_invalid_trace():
                coordinator._invalidate_trace()
        if weights == "ema":
            self.average.exchange()
        self._refresh()

    @torch.no_grad()
    def _refresh(self) -> None:
        """Bring the copies of the fp32 shards up to date: rounded shards and parameters kept gathered."""
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        self.zero._partition_all_parameters()
        # Second copies (hpZ) are of the former weights.
        self.zero.invalidate_secondary_tensor()
        for group in range(len(self.flats)):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)
        kept = self.zero.persistent_parameters
        if kept:
            kept[0].all_gather(kept)


def _flat_weights(zero: Any, stage: int) -> list[Tensor]:
    """The fp32 tensors that DeepSpeed hands to AdamW on this rank."""
    if stage == 3:
        return list(zero.fp32_partitioned_groups_flat)
    # Stage 1 in bf16 is run by another class of DeepSpeed, with another name for the same.
    return list(getattr(zero, "single_partition_of_fp32_groups", None) or zero.fp32_groups_flat_partition)


def _gathered_part(parameter: nn.Parameter) -> Tensor:
    """This rank's slice of a parameter as stage 3 gathers it, with its padding."""
    part: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
    return part.view(-1)


def _locate(zero: Any, stage: int, parameter: nn.Parameter, elements: int, rank: int) -> FlatSlice | None:
    """This rank's slice of a parameter, None where it has none."""
    if stage == 3:
        flat, offset, size = zero.grad_position[zero.get_param_id(parameter)]
        start = rank * size
        # The last slices are padded to equal sizes; padding is nobody's.
        length = min(size, elements - start)
        return FlatSlice(flat, offset, start, length) if length > 0 else None
    fragment = parameter._hp_mapping  # type: ignore[attr-defined]
    if fragment is None:
        return None
    part, place = fragment.lp_fragment_address, fragment.hp_fragment_address
    return FlatSlice(fragment.param_group_index, place.start, part.start, part.numel)
