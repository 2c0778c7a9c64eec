"""How the kernels read and write rows of a head: by pointers, or by descriptors, which Hopper's copy engine takes.

A descriptor holds the address, sizes and strides of a tensor, so a kernel keeps no registers for the addresses of a
tile, checks no bounds, and the tile goes straight to shared memory. It wants every row to start at a multiple of 16
bytes: what lies otherwise is copied first. Where the hardware is missing the same kernels are compiled with pointers.

TMA, TMA_ADD: whether the tensor given to a kernel is a descriptor. WIDTH: the head width, PADDED_WIDTH the next
power of two. Offsets of pointers are 64-bit: a tensor may hold more than 2^31 elements.
"""

# What a kernel is given has no Python type.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

_ALIGNMENT = 16


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launches go to the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def can_describe(*tensors: Tensor) -> bool:
    """Whether descriptors can hold these tensors [B, H, S, D]: all of their rows start at multiples of 16 bytes."""
    return all(
        x.data_ptr() % _ALIGNMENT == 0 and all(stride > 0 for stride in x.stride())
        and all(x.stride(axis) * x.itemsize % _ALIGNMENT == 0 for axis in range(3) if x.shape[axis] > 1)
        for x in tensors
    )  # fmt: skip


def describable(*tensors: Tensor) -> tuple[Tensor, ...]:
    """These tensors, copied where `can_describe` does not hold of them."""
    return tuple(x if can_describe(x) else x.clone(memory_format=torch.contiguous_format) for x in tensors)


def described(x: Tensor, rows: int) -> TensorDescriptor:
    """The descriptor of a tensor [B, H, S, D] of which `can_describe` holds, read `rows` of a head at a time."""
    padded_width = triton.next_power_of_2(x.shape[3])
    # The stride of an axis of one may be anything, and is never used.
    strides = [x.stride(axis) if x.shape[axis] > 1 else padded_width for axis in range(3)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, rows, padded_width])


@triton.jit
def head_of(x, row, head, stride_b, stride_h, TMA: tl.constexpr):
    """What rows of one head are read from: a pointer to its first, or the descriptor of all heads."""
    if TMA:
        return x
    else:
        return x + row.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h


@triton.jit
def load_rows(
    x, row, head, start, stride, size,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, PADDED_WIDTH: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """[BLOCK, PADDED_WIDTH] rows of a head (see `head_of`) from `start`, 0 past `size` rows and WIDTH columns."""
    if TMA:
        return x.load([row, head, start, 0]).reshape(BLOCK, PADDED_WIDTH)
    else:
        pointers, m_x = _pointers(x, start, stride, size, BLOCK, WIDTH, PADDED_WIDTH)
        return tl.load(pointers, mask=m_x, other=0.0)


@triton.jit
def store_rows(
    x, b_x, row, head, start, stride, size,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, PADDED_WIDTH: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The reverse of `load_rows`."""
    if TMA:
        x.store([row, head, start, 0], b_x.to(x.dtype).reshape(1, 1, BLOCK, PADDED_WIDTH))
    else:
        pointers, m_x = _pointers(x, start, stride, size, BLOCK, WIDTH, PADDED_WIDTH)
        tl.store(pointers, b_x.to(x.dtype.element_ty), mask=m_x)


@triton.jit
def add_rows(
    x, b_x, row, head, start, stride, size,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, PADDED_WIDTH: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Add float32 rows to what is there, while other programs add theirs."""
    if TMA:
        x.atomic_add([row, head, start, 0], b_x.reshape(1, 1, BLOCK, PADDED_WIDTH))
    else:
        pointers, m_x = _pointers(x, start, stride, size, BLOCK, WIDTH, PADDED_WIDTH)
        tl.atomic_add(pointers, b_x, mask=m_x, sem="relaxed")


@triton.jit
def _pointers(x, start, stride, size, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PADDED_WIDTH: tl.constexpr):
    o_row = start + tl.arange(0, BLOCK)
    o_d = tl.arange(0, PADDED_WIDTH)
    pointers = x + o_row[:, None].to(tl.int64) * stride + o_d[None, :]
    return pointers, (o_row < size)[:, None] & (o_d < WIDTH)[None, :]
