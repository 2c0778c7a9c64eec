"""The forward in Triton: flash attention over the keys that a tile of queries sees.

Because both bounds never decrease along a row, the keys that any query of a tile sees start at its first row's
`first_key` and end at its last row's `end_key`, and those that all see lie between its last row's `first_key` and
its first row's `end_key`. Four loads give a tile its range and say which steps of it need no mask.

Names: p_ pointers, b_ blocks of values, o_ offsets, m_ masks. Shapes: M queries of a tile, N keys of a step, D head
width padded to a power of two. Offsets are 64-bit: a tensor may hold more than 2^31 elements.
"""

# What a kernel is given has no Python type.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor
from transfusion_kernels.attention.layout import TILE_ROWS
from transfusion_kernels.attention.tiles import tiles_for

LOG2_E = 1.4426950408889634
_LN_2 = tl.constexpr(0.6931471805599453)
_HIDDEN = tl.constexpr(2147483647)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, first_key: Tensor, end_key: Tensor, query_order: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The output [B, H, S, D], laid out as [B, S, H, D], and the float32 log-sum-exp [B, H, S].

    query_order: int32, the tiles of `TILE_ROWS` queries in the order in which to start them.
    """
    batch, heads, queries, width = q.shape
    out = q.new_empty(batch, queries, heads, width).transpose(1, 2)
    lse = q.new_empty(batch, heads, queries, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    padded_width = triton.next_power_of_2(width)
    tile = tiles_for(q.device, padded_width, q.dtype).forward
    share = batch // max(first_key.shape[0], 1)
    programs = query_order.numel() * (TILE_ROWS // tile.rows) * share * heads
    with device_of(q):
        _forward_kernel[(programs,)](
            q,
            k,
            v,
            out,
            lse,
            first_key.contiguous(),
            end_key.contiguous(),
            query_order,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *out.stride()[:3],
            queries,
            k.shape[2],
            heads,
            share,
            scale * LOG2_E,
            GROUP=heads // k.shape[1],
            WIDTH=width,
            PADDED_WIDTH=padded_width,
            TILE_ROWS=TILE_ROWS,
            BLOCK_M=tile.rows,
            BLOCK_N=tile.step,
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=True,
        )
    return out, lse


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launches go to the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@triton.jit
def tile_of(program, order, size, heads, share, TILE_ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Which mask row, batch row, head and first position a program has: heads vary fastest, long tiles come first."""
    head = program % heads
    program = program // heads
    sharer = program % share
    program = program // share
    tile = tl.load(order + program // (TILE_ROWS // BLOCK))
    tiles = tl.cdiv(size, TILE_ROWS)
    mask_row = tile // tiles
    start = (tile % tiles) * TILE_ROWS + (program % (TILE_ROWS // BLOCK)) * BLOCK
    # Either each batch row has its mask row, or all share the one.
    return mask_row, mask_row + sharer, head, start


@triton.jit
def load_rows(p_x, start, stride, size, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """[BLOCK, PADDED] rows of one head from `start`, 0 past `size` rows and WIDTH columns."""
    o_row = start + tl.arange(0, BLOCK)
    o_d = tl.arange(0, PADDED)
    m_x = (o_row < size)[:, None] & (o_d < WIDTH)[None, :]
    return tl.load(p_x + o_row[:, None].to(tl.int64) * stride + o_d[None, :], mask=m_x, other=0.0)


@triton.jit
def store_rows(p_x, b_x, start, stride, size, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """The reverse of `load_rows`."""
    o_row = start + tl.arange(0, BLOCK)
    o_d = tl.arange(0, PADDED)
    m_x = (o_row < size)[:, None] & (o_d < WIDTH)[None, :]
    tl.store(
        p_x + o_row[:, None].to(tl.int64) * stride + o_d[None, :], b_x.to(p_x.dtype.element_ty), mask=m_x
    )


@triton.jit
def load_bounds(p_first, p_end, start, size, BLOCK: tl.constexpr):
    """[BLOCK] intervals from `start`, empty past `size`, and the extremes of those within it.

    Returns the first and end of each, then the lowest first, highest first, lowest end and highest end.
    """
    o_row = start + tl.arange(0, BLOCK)
    last = tl.minimum(start + BLOCK, size) - 1
    b_first = tl.load(p_first + o_row, mask=o_row < size, other=_HIDDEN)
    b_end = tl.load(p_end + o_row, mask=o_row < size, other=0)
    return (
        b_first,
        b_end,
        tl.load(p_first + start),
        tl.load(p_first + last),
        tl.load(p_end + start),
        tl.load(p_end + last),
    )


@triton.jit
def full_steps(base, highest_first, lowest_end, highest_end, STEP: tl.constexpr):
    """The steps from `base` that every row of a tile sees all of: where they start, and where they end.

    Steps before and after are seen by some rows or in part.
    """
    end = base + tl.cdiv(tl.maximum(highest_end - base, 0), STEP) * STEP
    full_start = tl.minimum(base + tl.cdiv(highest_first - base, STEP) * STEP, end)
    full_end = base + tl.maximum(lowest_end - base, 0) // STEP * STEP
    return full_start, tl.maximum(full_start, full_end)


@triton.jit
def _forward_kernel(
    q,
    k,
    v,
    out,
    lse,
    first_key,
    end_key,
    order,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_ob,
    stride_oh,
    stride_os,
    queries,
    keys,
    heads,
    share,
    scale_log2,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    mask_row, row, head, start = tile_of(tl.program_id(0), order, queries, heads, share, TILE_ROWS, BLOCK_M)
    if start >= queries:
        return
    mask_row, row = mask_row.to(tl.int64), row.to(tl.int64)
    head, key_head = head.to(tl.int64), (head // GROUP).to(tl.int64)
    p_k = k + row * stride_kb + key_head * stride_kh
    p_v = v + row * stride_vb + key_head * stride_vh

    # [M], [M] and four scalars
    b_first, b_end, low_first, high_first, low_end, high_end = load_bounds(
        first_key + mask_row * queries, end_key + mask_row * queries, start, queries, BLOCK_M
    )
    full_start, full_end = full_steps(low_first, high_first, low_end, high_end, BLOCK_N)
    # [M, D]
    b_q = load_rows(
        q + row * stride_qb + head * stride_qh, start, stride_qs, queries, BLOCK_M, WIDTH, PADDED_WIDTH
    )
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_out = tl.zeros([BLOCK_M, PADDED_WIDTH], tl.float32)
    b_out, b_sum, b_max = _attend(
        b_out, b_sum, b_max, b_q, p_k, p_v, stride_ks, stride_vs, low_first, full_start, keys, b_first, b_end,
        scale_log2, True, True, WIDTH, PADDED_WIDTH, BLOCK_N,
    )  # fmt: skip
    b_out, b_sum, b_max = _attend(
        b_out, b_sum, b_max, b_q, p_k, p_v, stride_ks, stride_vs, full_start, full_end, keys, b_first, b_end,
        scale_log2, False, False, WIDTH, PADDED_WIDTH, BLOCK_N,
    )  # fmt: skip
    b_out, b_sum, b_max = _attend(
        b_out, b_sum, b_max, b_q, p_k, p_v, stride_ks, stride_vs, full_end, high_end, keys, b_first, b_end,
        scale_log2, False, True, WIDTH, PADDED_WIDTH, BLOCK_N,
    )  # fmt: skip

    m_empty = b_sum == 0.0
    b_sum = tl.where(m_empty, 1.0, b_sum)
    b_lse = tl.where(m_empty, float("-inf"), (b_max + tl.math.log2(b_sum)) * _LN_2)
    o_m = start + tl.arange(0, BLOCK_M)
    tl.store(lse + (row * heads + head) * queries + o_m, b_lse, mask=o_m < queries)
    store_rows(
        out + row * stride_ob + head * stride_oh, b_out / b_sum[:, None], start, stride_os, queries,
        BLOCK_M, WIDTH, PADDED_WIDTH,
    )  # fmt: skip


@triton.jit
def _attend(
    b_out,
    b_sum,
    b_max,
    b_q,
    p_k,
    p_v,
    stride_ks,
    stride_vs,
    start,
    end,
    keys,
    b_first,
    b_end,
    scale_log2,
    MASK_FIRST: tl.constexpr,
    MASK_END: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add the keys `[start, end)` to the output, sum and maximum of a tile, masked on the sides that are asked for."""
    for n in tl.range(start, end, BLOCK_N):
        # [N, D]
        b_k = load_rows(p_k, n, stride_ks, keys, BLOCK_N, WIDTH, PADDED_WIDTH)
        # [M, N]
        b_score = tl.dot(b_q, b_k.T, input_precision="ieee")
        o_n = n + tl.arange(0, BLOCK_N)
        if MASK_END:
            m_visible = o_n[None, :] < b_end[:, None]
            if MASK_FIRST:
                m_visible = m_visible & (o_n[None, :] >= b_first[:, None])
            b_score = tl.where(m_visible, b_score, float("-inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_score, 1) * scale_log2)
        b_shift = b_new_max
        if MASK_END:  # a row that has seen nothing yet has no finite maximum
            b_shift = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
        b_weight = tl.math.exp2(b_score * scale_log2 - b_shift[:, None])
        b_decay = tl.math.exp2(b_max - b_shift)
        b_sum = b_sum * b_decay + tl.sum(b_weight, 1)
        # [N, D]
        b_v = load_rows(p_v, n, stride_vs, keys, BLOCK_N, WIDTH, PADDED_WIDTH)
        b_out = tl.dot(b_weight.to(b_v.dtype), b_v, b_out * b_decay[:, None], input_precision="ieee")
        b_max = b_new_max
    return b_out, b_sum, b_max
