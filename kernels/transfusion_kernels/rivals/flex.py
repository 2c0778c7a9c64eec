"""PyTorch's FlexAttention under an `IntervalMask`, with a BlockMask that is made straight from the bounds.

Shape suffixes: B rows of the mask, S queries, C blocks of keys, T tiles of queries, X changes between blocks.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from transfusion_kernels.attention.layout import IntervalMask
from transfusion_kernels.attention.plans import Plans
from transfusion_kernels.attention.second import intervals

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


def block_mask(mask: IntervalMask, second: tuple[Tensor, IntervalMask] | None = None) -> BlockMask:
    """Make FlexAttention's form of a mask, without looking at all pairs and without waiting for the device.

    It equals what `create_block_mask` finds with the same mask function, in every field.

    Args:
        mask: The mask. Its bounds must be those that `IntervalMask.validate` accepts.
        second: Queries that see more keys, and their mask, which shows each of them no key that `mask` does.

    Returns:
        A BlockMask of 128 queries by 128 keys, with as many rows as the masks. It does not refer to them.
    """
    from torch.nn.attention.flex_attention import BlockMask

    bounds = intervals(mask, second)
    partial_BTC, full_BTC = _visible_blocks(bounds, mask.num_keys)
    return BlockMask.from_kv_blocks(
        *_listed(partial_BTC),
        *_listed(full_BTC),
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_function(*bounds),
        seq_lengths=(mask.num_queries, mask.num_keys),
    )


def mask_function(*bounds: tuple[Tensor, Tensor]) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Give a mask as FlexAttention evaluates it within a block: `first_key[q] <= key < end_key[q]`, for any interval.

    Args:
        bounds: Of one or two intervals of all queries, int32 [B or 1, S], to which the function refers.
    """
    if len(bounds) == 2:
        one, two = (mask_function(pair) for pair in bounds)
        return lambda b, h, q, key: one(b, h, q, key) | two(b, h, q, key)
    first_BS, end_BS = (bound.contiguous() for bound in bounds[0])
    if first_BS.shape[0] == 1:  # a row that the whole batch shares
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
    second: tuple[Tensor, IntervalMask] | None = None,
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
        second: Queries that see more keys, and their mask.
        options: FlexAttention's `kernel_options`, such as tile sizes.

    Returns:
        The output [B, H, S, D], differentiable on a GPU, and the natural log-sum-exp [B, H, S], without gradient. A
        query that sees nothing gets 0 and minus infinity, as FlexAttention defines it.
    """
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    attend: Any = flex_attention
    if torch.compiler.is_compiling():  # it is part of a larger graph, which finds equal plans by itself
        plan = block_mask(mask, second)
    else:
        plan = _PLANS.of((mask, *(second or ())), None, lambda: block_mask(mask, second))
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


def _visible_blocks(bounds: list[tuple[Tensor, Tensor]], num_keys: int) -> tuple[Tensor, Tensor]:
    """Which blocks of keys the tiles of queries see in part, and which in full: bool [B, T, C]."""
    rows, queries = max(first_BS.shape[0] for first_BS, _ in bounds), bounds[0][0].shape[1]
    tiles, blocks = -(-queries // BLOCK), -(-num_keys // BLOCK)

    # How many pairs of a tile and a block are visible, by what that changes by from block to block. From a bound on a
    # query sees the rest of its block, then whole blocks. The two bounds of an interval cancel behind it.
    start_S = torch.arange(queries, device=bounds[0][0].device) // BLOCK * (blocks + 2)
    change_BX = bounds[0][0].new_zeros(rows, tiles * (blocks + 2))
    for pair in bounds:
        for sign, bound_BS in zip((1, -1), pair, strict=True):
            inside_BS = bound_BS.expand(rows, -1) % BLOCK
            at_BS = start_S + bound_BS.expand(rows, -1) // BLOCK
            change_BX.scatter_add_(1, at_BS, sign * (BLOCK - inside_BS))
            change_BX.scatter_add_(1, at_BS + 1, sign * inside_BS)
    pairs_BTC = change_BX.view(rows, tiles, -1).cumsum(-1)[..., :blocks]

    # The intervals of a query share no key. So only a tile whose every query sees all keys has that many pairs.
    full_BTC = pairs_BTC == BLOCK * BLOCK
    return (pairs_BTC > 0) & ~full_BTC, full_BTC


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
