"""What the tests of others' public bugs share: masks that show them, memory with guards around it, and direct calls.

The bugs are named in `test_public_bugs.py`. Everything here takes the device from its tensors, so that the tests for a
GPU stand on what the tests without one have run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from transfusion_kernels import IntervalMask
from transfusion_kernels.attention.layout import TILE_ROWS
from transfusion_kernels.verification.testing import (
    exact_attention,
    mask_of,
    random_layout,
    relative_error,
)

NAMES = ("out", "dq", "dk", "dv")
# What guards hold. NaN shows in every sum. A maximum may pass over NaN, but not over a large number.
FILLS = (float("nan"), 3e4)
# A tile of 128 rows, and of those of several heads. 77 is the same number in every dtype.
_GUARD_ROWS, _GUARD_ELEMENTS, _SENTINEL = 128, 1 << 14, 77

SPANS = ("first_key", "end_key", "first_query", "end_query", "dense")
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
Results = tuple[Tensor, Tensor, Tensor, Tensor]
Spans = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def inputs_for(
    mask: IntervalMask,
    width: int,
    group: int = 1,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    heads: int = 2,
    batch: int = 2,
) -> Inputs:
    """q, k, v and a gradient of the output, on the mask's device."""
    generator = torch.Generator().manual_seed(seed)

    def normal(heads: int, positions: int) -> Tensor:
        return torch.randn(batch, heads, positions, width, generator=generator).to(mask.device, dtype)

    queries, keys = mask.num_queries, mask.num_keys
    return (
        normal(heads, queries),
        normal(heads // group, keys),
        normal(heads // group, keys),
        normal(heads, queries),
    )


def attend(
    implementation: str, inputs: Inputs, mask: IntervalMask, *, deterministic: bool = False
) -> Results:
    """The output and the gradients of q, k and v, by the host code under the operator.

    The operator would hide from `Guards` what its host code allocates.
    """
    q, k, v, grad_out = inputs
    scale = q.shape[3] ** -0.5
    if implementation == "cpu":
        from transfusion_kernels.attention import cpu

        out, lse = cpu.attention_forward(q, k, v, mask.first_key, mask.end_key, scale)
        gradients = cpu.attention_backward(grad_out, q, k, v, out, lse, mask.first_key, mask.end_key, scale)
    elif implementation == "reference":
        from transfusion_kernels.attention.reference import reference_attention

        needing = [x.detach().requires_grad_() for x in (q, k, v)]
        out, _ = reference_attention(needing[0], needing[1], needing[2], mask, scale)
        gradients = torch.autograd.grad(out, needing, grad_out)
    elif implementation == "hopper":
        from transfusion_kernels.attention import hopper

        out, lse = hopper.attention_forward(q, k, v, mask.first_key, mask.end_key, mask.query_order, scale)
        columns = (mask.first_query, mask.end_query, mask.key_order)
        gradients = hopper.attention_backward(grad_out, q, k, v, out, lse, *columns, scale)
    else:
        from transfusion_kernels.attention.backward import attention_backward
        from transfusion_kernels.attention.forward import attention_forward

        bounds = (mask.first_key, mask.end_key, mask.first_query, mask.end_query)
        orders = (mask.query_order, mask.key_order)
        out, lse = attention_forward(q, k, v, *bounds[:2], orders[0], scale, mask.narrow)
        gradients = attention_backward(
            grad_out, q, k, v, out, lse, bounds, orders, scale, deterministic, mask.narrow
        )
    return (out.detach(), *gradients)


def errors(results: Results, inputs: Inputs, mask: IntervalMask) -> dict[str, float]:
    """By name, how far results are from the reference in float64, norm over norm. Sizes count, not only directions."""
    out, _, gradients = exact_attention(*inputs[:3], mask, inputs[3])
    return {
        name: relative_error(ours, exact, floor=1.0)
        for name, ours, exact in zip(NAMES, results, (out, *gradients), strict=True)
    }


def whole_tiles(tiles: int, rows: int = TILE_ROWS) -> IntervalMask:
    """Documents that are one image each and one tile each: a tile of scores is wholly visible or wholly hidden.

    No element of a visited tile is to be masked, so that all the mask says is which tiles to visit.
    """
    spans = [(start, start + rows) for start in range(0, tiles * rows, rows)]
    return mask_of(tiles * rows, spans, spans)


def changed_outside(inputs: Inputs, start: int, end: int, by: float) -> Inputs:
    """The inputs with something else in all positions but `[start, end)`."""
    outside = torch.ones(inputs[0].shape[2], dtype=torch.bool, device=inputs[0].device)
    outside[start:end] = False
    return tuple(torch.where(outside[:, None], x * by + 1, x) for x in inputs)  # type: ignore[return-value]


def between_guards(x: Tensor, fill: float) -> Tensor:
    """A copy of [B, H, S, D] that has rows of `fill` in memory before and after the rows of each head."""
    batch, heads, rows, width = x.shape
    memory = x.new_full((batch, heads, rows + 2 * _GUARD_ROWS, width), fill)
    within = memory[:, :, _GUARD_ROWS : _GUARD_ROWS + rows]
    return within.copy_(x)


class Guards(TorchDispatchMode):
    """Puts guards around the memory that is allocated within it, and NaN into what is not initialised."""

    ALLOCATING = frozenset(
        getattr(torch.ops.aten, name)
        for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
    )
    ZEROING = frozenset(getattr(torch.ops.aten, name) for name in ("zeros", "zeros_like", "new_zeros"))

    def __init__(self) -> None:
        super().__init__()
        self.memories: list[Tensor] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        zeroed = function.overloadpacket in self.ZEROING
        # The interpreter allocates bytes for itself.
        if not (zeroed or function.overloadpacket in self.ALLOCATING) or result.dtype == torch.uint8:
            return result
        axes = zip(result.shape, result.stride(), strict=True)
        extent = 1 + sum((size - 1) * stride for size, stride in axes) if result.numel() else 0
        memory = result.new_full((extent + 2 * _GUARD_ELEMENTS,), _SENTINEL)
        self.memories.append(memory)
        surrounded = memory.as_strided(result.shape, result.stride(), _GUARD_ELEMENTS)
        if zeroed:
            return surrounded.zero_()
        return surrounded.fill_(float("nan")) if result.is_floating_point() else surrounded

    def intact(self) -> bool:
        """Whether nothing was written before or behind what was allocated."""
        return all(
            bool((part == _SENTINEL).all())
            for memory in self.memories
            for part in (memory[:_GUARD_ELEMENTS], memory[-_GUARD_ELEMENTS:])
        )


def attend_between_guards(
    implementation: str, inputs: Inputs, mask: IntervalMask, fill: float, *, deterministic: bool = False
) -> tuple[Results, bool]:
    """`attend` with guards around all that is read and written, and whether those around the written are intact."""
    guarded = tuple(between_guards(x, fill) for x in inputs)
    with Guards() as guards:
        results = attend(implementation, guarded, mask, deterministic=deterministic)  # type: ignore[arg-type]
    assert guards.memories or implementation == "cpu"  # which has PyTorch allocate its results
    return results, guards.intact()


class Late:
    """Stands for a kernel whose launches are not waited for by the next: they run when `catch_up` is called."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.launches: list[Callable[[], None]] = []

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*arguments: Any, **named: Any) -> None:
            self.launches.append(lambda: self.kernel[grid](*arguments, **named))

        return launch

    def catch_up(self) -> None:
        for launch in self.launches:
            launch()


class Noted:
    """Stands for a kernel and writes down each of its launches: its name and its options."""

    def __init__(self, name: str, kernel: Any, launches: list[tuple[str, dict[str, Any]]]) -> None:
        self.name, self.kernel, self.launches = name, kernel, launches

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*arguments: Any, **named: Any) -> None:
            self.launches.append((self.name, named))
            self.kernel[grid](*arguments, **named)

        return launch


def bounds_of_documents(
    begins: Tensor, image_end: Tensor, length: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Both bounds, both columns and the dense mask of documents that begin where `begins` [B, S] is true.

    A document starts where as many positions stand as have lower numbers, and numbers are a running sum: the cumsum and
    the comparison that a compiler may fuse wrongly.
    """
    number = begins.cumsum(-1)
    start = (number[:, None, :] < number[:, :, None]).sum(-1)
    mask = IntervalMask.from_spans(start, image_end, length=length)
    return mask.first_key, mask.end_key, mask.first_query, mask.end_query, mask.dense()


def differing(compiled: Spans, seed: int, rows: int, size: int, device: str = "cpu") -> list[str]:
    """What a compiled `bounds_of_documents` gets otherwise than it is without a compiler, to the bit."""
    start, end, _, _ = random_layout(rows, size, seed)
    begins = start == torch.arange(size)
    length = torch.tensor([size, size // 2, 0, 1])[:rows]
    # An image that a row's end cuts has its end there.
    inputs = (begins.to(device), end.minimum(length[:, None]).to(device), length.to(device))
    pairs = zip(SPANS, compiled(*inputs), bounds_of_documents(*inputs), strict=True)
    return [name for name, ours, eager in pairs if not torch.equal(ours, eager)]
