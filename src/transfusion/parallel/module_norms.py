"""Gradient norms of the parts of a sharded network, from the shards alone: nothing is gathered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transfusion.parallel.collectives import sum_over_ranks
from transfusion.parallel.parameter_shards import module_of


class FlatSlice(NamedTuple):
    """Where a rank's slice of a parameter lies: elements of flat tensor `flat` from `offset` on."""

    flat: int
    offset: int
    start: int
    length: int


class ModuleNorms:
    """Adds up squares of the gradient by module, when AdamW is handed this rank's flat gradients.

    That is the one moment that all stages of ZeRO share: before it the gradients lie in other places in each.
    They are clipped by then, which `take` undoes.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        flats: Sequence[Tensor],
        slices: Mapping[str, FlatSlice],
        names: Sequence[str],
    ) -> None:
        """flats: the tensors that the optimiser steps; pieces: what of them is what; names: of all parameters."""
        self._modules = list(dict.fromkeys(map(module_of, names)))
        self._flats = list(flats)
        self._parts: list[list[tuple[int, int, int]]] = [[] for _ in flats]
        for name, flat_slice in slices.items():
            number = self._modules.index(module_of(name))
            self._parts[flat_slice.flat].append((number, flat_slice.offset, flat_slice.length))
        self._squares: Tensor | None = None
        optimizer.register_step_pre_hook(self._add)

    def begin(self, *, wanted: bool) -> None:
        """Before a step; `wanted`: on all ranks alike."""
        device = self._flats[0].device
        self._squares = torch.zeros(len(self._modules), device=device) if wanted else None

    def take(self, global_norm: float) -> dict[str, float] | None:
        """The norm of each module after a step that was made; None where `begin` was not asked for them.

        Called by all ranks together. global_norm: of the whole gradient before it was clipped.
        """
        squares, self._squares = self._squares, None
        if squares is None:
            return None
        # Where the optimiser is offloaded, its gradients lie on the host.
        squares = sum_over_ranks(squares)
        clipped_norm = squares.sum().sqrt()
        norms = squares.sqrt() * (global_norm / clipped_norm.clamp(min=torch.finfo(torch.float32).tiny))
        return dict(zip(self._modules, norms.tolist(), strict=True))

    @torch.no_grad()
    def _add(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Called before each step of the optimiser, of which a step of ZeRO has one or one a flat tensor."""
        if self._squares is None:
            return
        stepped = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
        for flat, parts in zip(self._flats, self._parts, strict=True):
            if id(flat) not in stepped or flat.grad is None:
                continue
            for module, offset, length in parts:
                self._squares[module] += flat.grad.narrow(0, offset, length).float().square().sum()
