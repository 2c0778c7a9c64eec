"""PyTorch's FlexAttention under an `IntervalMask`, with a BlockMask that is made straight from the bounds.

Shape suffixes: B rows of the mask, S queries, C blocks of keys, T tiles of queries, R ends of tiles (T + 1).
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from transfusion_kernels.attention.layout import IntervalMask
from transfusion_kernels.rivals.plans import Plans

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# The queries of a tile and the keys of a block, as create_block_mask takes them unless told otherwise.
BLOCK = 128
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MIN_HEAD_DIM = 16
# How many versions the compiler keeps. Each shape of queries, keys and mask is one.
MAX_VERSIONS = 256

_PLANS: Plans[BlockMask] = Plans()


def problem(q: Tensor) -> str:
    """Tell why FlexAttention cannot run for these queries.

    Args:
        q: Queries [B, H, S, D], of which the device, the dtype and the shape count.

    Returns:
        The reason. Nothing if it can run.
    """
    if q.numel() == 0:
        return "q is empty"
    if q.device.type == "cpu":
        return "FlexAttention has no gradients on the CPU" if _needs_gradient(q) else ""
    if q.device.type != "cuda":  # ROCm's devices are called cuda too
        return f"q is on {q.device}"
    if not _has_triton():
        return "triton is not installed (pip install triton)"
    if q.dtype not in DTYPES:
        return f"the dtype is {q.dtype}, it takes {DTYPES}"
    if q.shape[-1] < MIN_HEAD_DIM:
        return f"head_dim is {q.shape[-1]}, it takes {MIN_HEAD_DIM} or more"
    return ""


def block_mask(mask: IntervalMask) -> BlockMask:
    """Make FlexAttention's form of a mask, without looking at all pairs and without waiting for the device.

    It equals what `create_block_mask` finds with the same mask function, in every field.

    Args:
        mask: The mask. Its bounds must be those that `IntervalMask.validate` accepts.

    Returns:
        A BlockMask of 128 queries by 128 keys, with as many rows as the mask. It does not refer to `mask`.
    """
    from torch.nn.attention.flex_attention import BlockMask

    partial_BTC, full_BTC = _visible_blocks(mask)
    return BlockMask.from_kv_blocks(
        *_listed(partial_BTC),
        *_listed(full_BTC),
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_function(mask),
        seq_lengths=(mask.num_queries, mask.num_keys),
    )


def mask_function(mask: IntervalMask) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Give the mask as FlexAttention evaluates it within a block: `first_key[q] <= key < end_key[q]`.

    Args:
        mask: The mask. The function refers to its bounds, and not to it.
    """
    first_BS, end_BS = mask.first_key.contiguous(), mask.end_key.contiguous()
    if mask.first_key.shape[0] == 1:  # a row that the whole batch shares
        first_S, end_S = first_BS[0], end_BS[0]

        def shared(b: Tensor, h: Tensor, q: Tensor, key: Tensor) -> Tensor:
            return (first_S[q] <= key) & (key < end_S[q])

        return shared

    def by_row(b: Tensor, h: Tensor, q: Tensor, key: Tensor) -> Tensor:
        return (first_BS[b, q] <= key) & (key < end_BS[b, q])

    return by_row


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: IntervalMask,
    scale: float,
    *,
    options: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend with FlexAttention. It is compiled on a GPU, once for each shape, and eager on a CPU.

    Args:
        q: Queries [B, H, S, D].
        k: Keys [B, K, N, D].
        v: Values, of the shape of `k`.
        mask: Over S queries and N keys.
        scale: Of the scores.
        options: FlexAttention's `kernel_options`, such as tile sizes.

    Returns:
        The output [B, H, S, D], differentiable on a GPU, and the natural log-sum-exp [B, H, S], without gradient. A
        query that sees nothing gets 0 and minus infinity, as FlexAttention defines it.
    """
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    attend: Any = flex_attention
    if torch.compiler.is_compiling():  # it is part of a larger graph, which finds equal plans by itself
        plan = block_mask(mask)
    else:
        plan = _PLANS.of(mask, None, lambda: block_mask(mask))
        compiled = _compiled()  # it also lets the compiler keep enough versions of the eager form
        attend = compiled if q.device.type == "cuda" else flex_attention
    if q.device.type == "cpu" and not torch.is_grad_enabled():
        q, k, v = q.detach(), k.detach(), v.detach()  # it refuses what could ask for a gradient
    with torch.autocast(q.device.type, enabled=False):  # the dtype of the inputs decides
        out, extra = attend(
            q,
            k,
            v,
            block_mask=plan,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
            kernel_options=options,
            return_aux=AuxRequest(lse=True),
        )
    return out, extra.lse.detach()


def _visible_blocks(mask: IntervalMask) -> tuple[Tensor, Tensor]:
    """Which blocks of keys the tiles of queries see in part, and which in full: bool [B, T, C]."""
    first_BS, end_BS = mask.first_key.contiguous(), mask.end_key.contiguous()
    rows, queries = first_BS.shape
    start_C = torch.arange(0, mask.num_keys, BLOCK, device=mask.device, dtype=torch.int32)
    start_T = torch.arange(0, queries, BLOCK, device=mask.device)
    stop_T = (start_T + BLOCK).clamp(max=queries)

    # Neither bound decreases. So those that end behind the start of a block are the last queries of a row, those that
    # begin before its end the first ones, and what is in both sees some of it, unless it sees nothing at all.
    start_BC = start_C.expand(rows, -1).contiguous()
    from_BC = torch.searchsorted(end_BS, start_BC, right=True)
    to_BC = torch.searchsorted(first_BS, start_BC + BLOCK)
    seeing_BR = torch.nn.functional.pad((first_BS < end_BS).cumsum(1), (1, 0))
    from_BTC = torch.maximum(from_BC[:, None], start_T[:, None])
    to_BTC = torch.maximum(torch.minimum(to_BC[:, None], stop_T[:, None]), from_BTC)
    seen_BTC = _gather(seeing_BR, to_BTC) > _gather(seeing_BR, from_BTC)

    # A full block is seen whole by the first and by the last query of a whole tile.
    latest_first_BT, earliest_end_BT = first_BS[:, stop_T - 1], end_BS[:, start_T]
    full_BTC = (latest_first_BT[..., None] <= start_C) & (earliest_end_BT[..., None] >= start_C + BLOCK)
    full_BTC &= (stop_T - start_T == BLOCK)[:, None]
    return seen_BTC & ~full_BTC, full_BTC


def _gather(values_BR: Tensor, at_BTC: Tensor) -> Tensor:
    return values_BR.gather(1, at_BTC.flatten(1)).view_as(at_BTC)


def _listed(blocks_BTC: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each tile has, int32 [B, 1, T], and which, those first: int32 [B, 1, T, C]."""
    blocks_B1TC = blocks_BTC[:, None].to(torch.int32)
    which_B1TC = torch.argsort(blocks_B1TC, dim=-1, descending=True, stable=True)
    return blocks_B1TC.sum(-1).to(torch.int32), which_B1TC.to(torch.int32).contiguous()


@functools.cache
def _compiled() -> Callable[..., Any]:
    """FlexAttention, compiled for each shape, and never replaced by the form that holds all scores."""
    import torch._dynamo.config
    from torch.nn.attention.flex_attention import flex_attention

    settings: Any = torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, MAX_VERSIONS)
    # With fullgraph one version too many is an error. Without, it would run uncompiled and say nothing.
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _needs_gradient(q: Tensor) -> bool:
    return q.requires_grad and torch.is_grad_enabled()


# What a compiler is to take as fixed rather than trace.
@torch.compiler.assume_constant_result
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
