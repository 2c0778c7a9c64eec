"""The Hopper kernels' host side: what they take, how they are launched and compiled ahead of time."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from transfusion_kernels.attention import layout
from transfusion_kernels.attention.forward import LOG2_E, device_of
from transfusion_kernels.attention.hopper_backward import backward_kernel, statistics_kernel
from transfusion_kernels.attention.hopper_forward import forward_kernel
from transfusion_kernels.attention.tiles import TRITON_VERSION, heads_together, processors

# Every partition of 128 threads starts with this many registers, and then takes from the producer what it gives up.
OPTIONS = {"num_warps": 4, "maxnreg": 168, "enable_fp_fusion": True}
_GLUON_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}
_TYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Ring:
    """How many rows of the other side a step takes, and how many steps shared memory holds."""

    step: int
    stages: int


# By head width. A program's own tile is `layout.TILE_ROWS` queries forward, keys backward, half of them to a consumer.
# The compiler of Triton 3.9 would spill a register of the wide step.
FORWARD = {
    64: Ring(step=128, stages=3) if TRITON_VERSION < (3, 9) else Ring(step=64, stages=4),
    128: Ring(step=128, stages=2),
}
BACKWARD = {64: Ring(step=64, stages=2), 128: Ring(step=64, stages=2)}
_STATISTICS_ROWS = 64


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, first_key: Tensor, end_key: Tensor, query_order: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The output [B, H, S, D], laid out as [B, S, H, D], and the float32 log-sum-exp [B, H, S].

    query_order: int32, the tiles of `layout.TILE_ROWS` queries in the order in which to start them.
    """
    batch, heads, queries, width = q.shape
    key_heads, keys = k.shape[1], k.shape[2]
    out = q.new_empty(batch, queries, heads, width).transpose(1, 2)
    lse = q.new_empty(batch, heads, queries, dtype=torch.float32)
    if out.numel() == 0 or keys == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    ring, half = FORWARD[width], layout.TILE_ROWS // 2
    share = batch // first_key.shape[0]
    items = query_order.numel() * share * heads
    taken = torch.zeros(1, dtype=torch.int32, device=q.device)
    with device_of(q):
        forward_kernel[(min(items, processors(q.device)),)](
            describe(q, (1, half, width)),
            describe(k, (1, ring.step, width)),
            describe(v, (1, ring.step, width)),
            describe(out, (1, half, width)),
            lse,
            first_key.contiguous(),
            end_key.contiguous(),
            query_order,
            taken,
            items,
            queries,
            heads,
            heads // key_heads,
            share,
            heads_together(heads, batch * 2 * keys * width * k.itemsize * key_heads // heads),
            scale * LOG2_E,
            STAGES=ring.stages,
            **OPTIONS,
        )
    return out, lse


def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    first_query: Tensor,
    end_query: Tensor,
    key_order: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, laid out as [B, S, H, D]. That of q has other rounding on every run.

    key_order: int32, the tiles of `layout.TILE_ROWS` keys in the order in which to start them.
    """
    batch, heads, queries, width = q.shape
    key_heads, keys = k.shape[1], k.shape[2]
    # Added to in float32 whatever the inputs are.
    dq_sum = q.new_zeros(batch, queries, heads, width, dtype=torch.float32).transpose(1, 2)
    dq = torch.empty_like(dq_sum, dtype=q.dtype)
    dk, dv = (x.new_empty(batch, keys, key_heads, width).transpose(1, 2) for x in (k, v))
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    if grad_out.stride(3) != 1:  # as of a sum, whose gradient is one expanded number
        grad_out = grad_out.contiguous()
    ring, half = BACKWARD[width], layout.TILE_ROWS // 2
    blocks = -(-queries // _STATISTICS_ROWS)
    statistics = lse.new_empty(batch, heads, 2, blocks * _STATISTICS_ROWS)
    share = batch // first_query.shape[0]
    with device_of(q):
        statistics_kernel[(blocks * batch * heads,)](
            out,
            grad_out,
            lse,
            statistics,
            *out.stride()[:3],
            *grad_out.stride()[:3],
            queries,
            blocks * _STATISTICS_ROWS,
            heads,
            ROWS=_STATISTICS_ROWS,
            WIDTH=width,
            num_warps=OPTIONS["num_warps"],
        )
        backward_kernel[(key_order.numel() * share * key_heads,)](
            describe(q, (1, ring.step, width)),
            describe(k, (1, layout.TILE_ROWS, width)),
            describe(v, (1, layout.TILE_ROWS, width)),
            describe(grad_out, (1, ring.step, width)),
            describe(statistics, (1, 2, ring.step)),
            describe(dq_sum, (1, ring.step, width // 2)),
            describe(dk, (1, half, width)),
            describe(dv, (1, half, width)),
            first_query.contiguous(),
            end_query.contiguous(),
            key_order,
            keys,
            key_heads,
            heads // key_heads,
            share,
            heads_together(key_heads, batch * queries * width * (2 * q.itemsize + 4) * heads // key_heads),
            scale,
            scale * LOG2_E,
            STAGES=ring.stages,
            **OPTIONS,
        )
    return torch.mul(dq_sum, scale, out=dq), dk, dv


def describe(tensor: Tensor, block: tuple[int, int, int]) -> TensorDescriptor:
    """What copies blocks [1, *block] of a tensor of four dimensions, and 0 for what stands past its end.

    The copies take addresses and strides of 16 bytes. A tensor that has others is itself copied first.
    """
    size = tensor.element_size()
    # The stride of a dimension of 1 is never used, and may be anything.
    strides = [
        stride if extent > 1 else tensor.shape[3]
        for extent, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ]
    if tensor.data_ptr() % 16 or any(stride <= 0 or stride * size % 16 for stride in strides[:3]):
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        strides = list(tensor.stride())
    strides[3] = 1
    return TensorDescriptor(tensor, list(tensor.shape), strides, [1, *block], _layout(block, tensor.dtype))


@functools.cache
def _layout(block: tuple[int, int, int], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([1, *block], _GLUON_DTYPES[dtype])


@dataclass(frozen=True)
class CompileCase:
    """One kernel as it is launched, for compiling it where no GPU is: the arguments of `GluonASTSource`, options."""

    name: str
    function: Any
    signature: dict[str, str]
    constants: dict[str, int]
    options: dict[str, Any]


def compile_cases() -> list[CompileCase]:
    """Every kernel that walks tiles, as it can be launched: by head width and dtype."""
    return [
        make(width, dtype)
        for dtype in (torch.bfloat16, torch.float16)
        for make, widths in ((_forward_case, FORWARD), (_backward_case, BACKWARD))
        for width in widths
    ]


def _forward_case(width: int, dtype: torch.dtype) -> CompileCase:
    ring, half = FORWARD[width], layout.TILE_ROWS // 2
    queries, keys = (_descriptor_type((1, rows, width), dtype) for rows in (half, ring.step))
    types = {"d_q": queries, "d_k": keys, "d_v": keys, "d_out": queries, "lse": "*fp32", "scale_log2": "fp32"}
    types |= dict.fromkeys(("first_key", "end_key", "order", "taken"), "*i32")
    types |= dict.fromkeys(("items", "queries", "heads", "group", "share", "together"), "i32")
    return _case("hopper forward", width, dtype, forward_kernel, types, {"STAGES": ring.stages})


def _backward_case(width: int, dtype: torch.dtype) -> CompileCase:
    ring, half = BACKWARD[width], layout.TILE_ROWS // 2
    types = dict.fromkeys(("d_q", "d_grad"), _descriptor_type((1, ring.step, width), dtype))
    types |= dict.fromkeys(("d_dk", "d_dv"), _descriptor_type((1, half, width), dtype))
    types |= dict.fromkeys(("d_k", "d_v"), _descriptor_type((1, layout.TILE_ROWS, width), dtype))
    types["d_statistics"] = _descriptor_type((1, 2, ring.step), torch.float32)
    types["d_dq"] = _descriptor_type((1, ring.step, width // 2), torch.float32)
    types |= dict.fromkeys(("first_query", "end_query", "order"), "*i32")
    types |= dict.fromkeys(("keys", "key_heads", "group", "share", "together"), "i32")
    types |= dict.fromkeys(("scale", "scale_log2"), "fp32")
    return _case("hopper backward", width, dtype, backward_kernel, types, {"STAGES": ring.stages})


def _case(
    name: str, width: int, dtype: torch.dtype, function: Any, types: dict[str, str], constants: dict[str, int]
) -> CompileCase:
    signature = {
        argument: "constexpr" if argument in constants else types[argument] for argument in function.arg_names
    }
    name = f"{name}, head_dim {width}, {_TYPE_NAMES[dtype]}"
    return CompileCase(name, function, signature, constants, dict(OPTIONS))


def _descriptor_type(block: tuple[int, int, int], dtype: torch.dtype) -> str:
    extents = ",".join(str(extent) for extent in (1, *block))
    return f"tensordesc<{_TYPE_NAMES[dtype]}[{extents}],{_layout(block, dtype)!r}>"
