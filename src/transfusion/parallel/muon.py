"""Muon (Jordan et al., 2024) on whole matrices, or on the slices of them that ZeRO leaves each rank.

Momentum and Nesterov's sum work on slices. For the orthogonal update each rank takes a share of the matrices, by one
exchange of slices, and answers by another. No rank holds more than its share, and no update is made twice.

Torch's Muon knows no slices, and rounds to bf16 on the way, which makes ranks and one process differ. Here that is so
in runs of bf16 alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from transfusion.parallel.module_norms import FlatSlice

# Of the polynomial, how often it is taken, and the least norm (Jordan et al., 2024).
_COEFFICIENTS, _ROUNDS, _LEAST = (3.4445, -4.775, 2.0315), 5, 1e-7
# Elements that a rank takes at once, so that the exchanges need little memory beside the weights.
SHARE = 2**25


@dataclass(frozen=True, slots=True)
class _Matrix:
    """A matrix, the rank that makes its update, this rank's place of it in its flat, and every rank's length."""

    shape: tuple[int, ...]
    owner: int
    offset: int
    lengths: tuple[int, ...]


class Muon:
    """Takes the matrices' gradients from AdamW just before its step, and does theirs.

    That is the one moment that all engines share. AdamW passes over what has no gradient.
    """

    def __init__(
        self,
        optimizer: torch.optim.AdamW,
        flats: Sequence[Tensor],
        slices: Sequence[Mapping[str, FlatSlice]],
        shapes: Mapping[str, tuple[int, ...]],
        *,
        rank: int,
        dtype: torch.dtype,
    ) -> None:
        """flats: what the optimiser steps. slices: for each rank where in its own its parts of parameters lie.

        shapes: of all matrices that Muon is to take. dtype: of the products.
        """
        self.rank, self.dtype = rank, dtype
        self.momentum: float = optimizer.defaults["betas"][1]
        self._chunks: dict[int, list[list[_Matrix]]] = {}
        for flat, matrices in _plan(slices, shapes, rank).items():
            state = optimizer.state[flats[flat]]
            state.pop("exp_avg_sq", None)
            self._chunks[id(flats[flat])] = list(_chunks(matrices))
        self._taken: list[tuple[Tensor, Tensor]] = []
        optimizer.register_step_pre_hook(self._step)
        optimizer.register_step_post_hook(self._give_back)

    @torch.no_grad()
    def _step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Called before each step of AdamW, of which a step of ZeRO has one or one a flat tensor."""
        for group in optimizer.param_groups:
            for flat in group["params"]:
                if id(flat) in self._chunks and flat.grad is not None:
                    self._update(optimizer, group, flat)
                    self._taken.append((flat, flat.grad))
                    flat.grad = None

    def _give_back(self, *_: Any) -> None:
        """Called after the step: DeepSpeed adds up offloaded gradients in the same tensor."""
        for flat, gradient in self._taken:
            flat.grad = gradient
        self._taken.clear()

    def _update(self, optimizer: torch.optim.Optimizer, group: dict[str, Any], flat: Tensor) -> None:
        gradient, applied = flat.grad, torch.ones((), device=flat.device)
        assert gradient is not None
        if getattr(optimizer, "found_inf", None) is not None:
            # `groups.clip_and_skip` left to AdamW what it would do: divide by the scale, and nothing where it skips.
            applied = 1.0 - optimizer.found_inf  # type: ignore[attr-defined]
            gradient = torch.where(applied > 0, gradient / optimizer.grad_scale, 0.0)  # type: ignore[attr-defined]
        state = optimizer.state[flat]
        state["step"] += applied.to(state["step"].device)
        moment = state["exp_avg"]
        moment.lerp_(gradient, (1.0 - self.momentum) * applied)
        wanted = gradient.lerp(moment, self.momentum)
        flat.mul_(1.0 - group["lr"] * group["weight_decay"] * applied)
        for matrices in self._chunks[id(flat)]:
            for matrix, update in zip(matrices, self._exchanged(wanted.view(-1), matrices), strict=True):
                mine = flat.view(-1).narrow(0, matrix.offset, matrix.lengths[self.rank])
                # Updates are as large as those of AdamW (Liu et al., 2025, section 2.2).
                mine.sub_(update * (group["lr"] * 0.2 * math.sqrt(max(matrix.shape)) * applied))

    def _exchanged(self, wanted: Tensor, matrices: Sequence[_Matrix]) -> Iterator[Tensor]:
        """This rank's slice of each matrix's orthogonal update, in their order."""
        ranks = len(matrices[0].lengths)
        by_owner = [[matrix for matrix in matrices if matrix.owner == rank] for rank in range(ranks)]
        sent = [wanted.narrow(0, each.offset, each.lengths[self.rank]) for part in by_owner for each in part]
        counts = [sum(each.lengths[self.rank] for each in part) for part in by_owner]
        own = by_owner[self.rank]
        own_counts = [sum(each.lengths[rank] for each in own) for rank in range(ranks)]
        received = _all_to_all(torch.cat(sent), own_counts, counts).split(own_counts)
        pieces = [part.split([each.lengths[rank] for each in own]) for rank, part in enumerate(received)]
        whole = [
            torch.cat([part[number] for part in pieces]).view(matrix.shape)
            for number, matrix in enumerate(own)
        ]
        updates = [
            orthogonal(matrix, self.dtype).to(wanted.dtype).flatten().split(each.lengths)
            for matrix, each in zip(whole, own, strict=True)
        ]
        answers = [update[rank] for rank in range(ranks) for update in updates]
        empty = wanted.new_empty(0)
        slices = iter(
            _all_to_all(torch.cat([empty, *answers]), counts, own_counts).split(
                [each.lengths[self.rank] for part in by_owner for each in part]
            )
        )
        found = {id(each): next(slices) for part in by_owner for each in part}
        return (found[id(matrix)] for matrix in matrices)


def orthogonal(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Nearly the orthogonal matrix next to this one, singular values of about 1, by products in `dtype`."""
    a, b, c = _COEFFICIENTS
    wide = matrix.to(dtype)
    if matrix.shape[0] > matrix.shape[1]:
        wide = wide.T
    wide = wide / wide.norm().clamp(min=_LEAST)
    for _ in range(_ROUNDS):
        square = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(square, square, square, beta=b, alpha=c), wide, beta=a)
    return wide.T if matrix.shape[0] > matrix.shape[1] else wide


def muon_operations(rows: int, columns: int) -> int:
    """Floating point operations of the products of `orthogonal` for a matrix of this shape."""
    short, long = sorted((rows, columns))
    return _ROUNDS * (4 * short * short * long + 2 * short**3)


def _plan(
    slices: Sequence[Mapping[str, FlatSlice]], shapes: Mapping[str, tuple[int, ...]], rank: int
) -> dict[int, list[_Matrix]]:
    """The matrices of each flat tensor, in the order of their names, each with the rank that has least to do so far."""
    loads = [0] * len(slices)
    planned: dict[int, list[_Matrix]] = {}
    for name in sorted(shapes):
        places = [part.get(name) for part in slices]
        have = [place for place in places if place is not None]
        starts = [place.start for place in have]
        size = math.prod(shapes[name])
        # The slices that the ranks have must stand in their order, and leave nothing out.
        if starts != sorted(starts) or sum(place.length for place in have) != size:
            raise RuntimeError(f"the slices {have} of {name} do not make up its {size} elements")
        owner = loads.index(min(loads))
        loads[owner] += size
        mine = places[rank]
        lengths = tuple(0 if place is None else place.length for place in places)
        matrix = _Matrix(shapes[name], owner, 0 if mine is None else mine.offset, lengths)
        planned.setdefault(have[0].flat, []).append(matrix)
    return planned


def _chunks(matrices: Sequence[_Matrix]) -> Iterator[list[_Matrix]]:
    """The same in parts of at most SHARE elements a rank, or one matrix."""
    part: list[_Matrix] = []
    for matrix in matrices:
        sizes = [sum(each.lengths) for each in (*part, matrix)]
        if part and sum(sizes) > SHARE * len(matrix.lengths):
            yield part
            part = []
        part.append(matrix)
    yield part


def _all_to_all(sent: Tensor, received: Sequence[int], counts: Sequence[int]) -> Tensor:
    if len(counts) == 1:
        return sent
    out = sent.new_empty(sum(received))
    dist.all_to_all_single(out, sent.contiguous(), list(received), list(counts))
    return out
