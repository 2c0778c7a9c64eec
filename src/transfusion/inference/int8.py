"""Weights as int8, for machines with little memory: a quarter of the bytes of fp32.

Each row of a matrix has a scale of its own, the largest of its absolute values over 127. So a weight is off by half of
its row's scale at most. Only weights are rounded. Products are those of the activations' dtype.

O rows of a weight (outputs, or tokens), D its columns, N states.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transfusion.model.backbone import Backbone
from transfusion.model.heads import TextHead

LARGEST = 127
# Elements that are made floating point at once. More would neither stay in a CPU's cache nor be cheap to allocate.
PIECE = 1 << 20


class Int8Weight(nn.Module):
    """A matrix of int8 with a scale for each row. Both are buffers, uninitialised: see `quantise`.

    Args:
        rows: O.
        columns: D.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(rows, columns, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(rows, dtype=torch.float32))

    def multiply(self, x_ND: Tensor) -> Tensor:
        """Products [..., O] of states [..., D] with every row, in the states' dtype."""
        # A GPU has no use for small pieces.
        rows = len(self.weight) if x_ND.is_cuda else _rows_at_once(self.weight)
        parts = [F.linear(x_ND, part_OD.to(x_ND.dtype)) for part_OD in self.weight.split(rows)]
        return (torch.cat(parts, dim=-1) * self.scale).to(x_ND.dtype)


class Int8Linear(Int8Weight):
    """In place of an `nn.Linear`, whose bias it takes over."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(*linear.weight.shape)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        product = self.multiply(x)
        return product if self.bias is None else product + self.bias


class Int8Embedding(Int8Weight):
    """In place of an `nn.Embedding`, whose dtype its answers keep."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__(*embedding.weight.shape)
        self.dtype = embedding.weight.dtype

    def forward(self, ids: Tensor) -> Tensor:
        return (self.weight[ids] * self.scale[ids, None]).to(self.dtype)


class Int8TextHead(Int8Weight):
    """In place of a `TextHead`, without a gradient."""

    def __init__(self, head: TextHead) -> None:
        super().__init__(*head.weight.shape)
        self.chunk = head.chunk

    def forward(
        self, hidden_ND: Tensor, target_N: Tensor | None = None, *, each: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As `TextHead.forward`."""
        if target_N is None:
            return self.multiply(hidden_ND)
        chunks = zip(hidden_ND.split(self.chunk), target_N.split(self.chunk), strict=True)
        nats_N = torch.cat(
            [
                F.cross_entropy(self.multiply(rows).float(), target, reduction="none")
                for rows, target in chunks
            ]
        )
        return (nats_N.sum(), nats_N) if each else nats_N.sum()


class Int8TiedHead(nn.Module):
    """In place of a `TextHead` whose weight is the embedding's, which stays there.

    Args:
        head: What it stands for.
        embedding: Whose rows these are.
    """

    def __init__(self, head: TextHead, embedding: Int8Embedding) -> None:
        super().__init__()
        self.chunk = head.chunk
        # No part of this module: its numbers are counted, moved and filled once.
        self._of = (embedding,)

    def multiply(self, x_ND: Tensor) -> Tensor:
        """See `Int8Weight.multiply`."""
        return self._of[0].multiply(x_ND)

    forward = Int8TextHead.forward


def keep_int8(model: Backbone) -> set[str]:
    """Put int8 in place of the matrices of the blocks, the embedding and the text head, and drop their weights.

    A layer of any other class stays as it is.

    Returns:
        The names of the weights that are int8 now. The scales of `NAME.weight` are `NAME.scale`.
    """
    places = [
        (name, module)
        for part in ("blocks", "embedding", "lm_head")
        for name, module in model.get_submodule(part).named_modules(prefix=part)
    ]
    kept = set()
    for name, module in places:
        if (replacement := _replacement(module)) is not None:
            model.set_submodule(name, replacement)
            kept.add(f"{name}.weight")
    head, embedding = model.lm_head, model.embedding
    if isinstance(head, TextHead) and head.is_tied and isinstance(embedding, Int8Embedding):
        model.set_submodule("lm_head", Int8TiedHead(head, embedding))
    return kept


def quantise(weight_OD: Tensor, into_OD: Tensor, scale_O: Tensor) -> None:
    """Write a weight as int8 and scales, with floating point copies of a few rows at a time.

    Args:
        weight_OD: Of any floating dtype.
        into_OD: int8, what is written.
        scale_O: fp32, the scales that are written.

    Raises:
        ValueError: For a weight with a number that is not finite.
    """
    rows = _rows_at_once(weight_OD)
    for part_OD, kept_OD, kept_O in zip(
        *(each.split(rows) for each in (weight_OD, into_OD, scale_O)), strict=True
    ):
        exact_OD = part_OD.float()
        # A row of zeros has a scale too.
        row_O = (exact_OD.abs().amax(1) / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
        if not row_O.isfinite().all():
            raise ValueError("it holds numbers that are not finite")
        kept_O.copy_(row_O)
        kept_OD.copy_((exact_OD / row_O[:, None]).round_())


def _replacement(module: nn.Module) -> Int8Weight | None:
    # Classes that were derived from these may do something else.
    if type(module) is nn.Linear:
        return Int8Linear(module)
    if type(module) is nn.Embedding:
        return Int8Embedding(module)
    return Int8TextHead(module) if type(module) is TextHead and not module.is_tied else None


def _rows_at_once(weight_OD: Tensor) -> int:
    return max(1, PIECE // weight_OD.shape[1])
