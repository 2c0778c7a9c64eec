"""The forward in Triton: flash attention over the keys that a tile of queries sees.

Because both bounds never decrease along a row, the keys that any query of a tile sees start at its first row's
`first_key` and end at its last row's `end_key`, and those that all see lie between its last row's `first_key` and
its first row's `end_key`. Four loads give a tile its range and say which steps of it need no mask.

Names: p_ pointers, b_ blocks of values, o_ offsets, m_ masks. Shapes: M queries of a tile, N keys of a step, D head
width padded to a power of two.
"""

# What a kernel is given has no Python type.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from transfusion_kernels.attention.layout import TILE_ROWS
from transfusion_kernels.attention.rows import (
    can_describe,
    describable,
    described,
    device_of,
    head_of,
    load_rows,
    store_rows,
)
from transfusion_kernels.attention.tiles import (
    all_registers,
    has_tma,
    heads_together,
    needs_descriptors,
    tiles_for,
)

LOG2_E = 1.4426950408889634
_LN_2 = tl.constexpr(0.6931471805599453)
HIDDEN = tl.constexpr(2147483647)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first_key: Tensor,
    end_key: Tensor,
    query_order: Tensor,
    scale: float,
    narrow: bool,
) -> tuple[Tensor, Tensor]:
    """The output [B, H, S, D], laid out as [B, S, H, D], and the float32 log-sum-exp [B, H, S].

    query_order: int32, the tiles of `TILE_ROWS` queries in the order in which to start them.
    narrow: whether to take the tiles for queries that see few keys.
    """
    batch, heads, queries, width = q.shape
    out = q.new_empty(batch, queries, heads, width).transpose(1, 2)
    lse = q.new_empty(batch, heads, queries, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    padded_width = triton.next_power_of_2(width)
    share = batch // max(first_key.shape[0], 1)
    with device_of(q):
        if needs_descriptors(q.dtype):
            q, k, v = describable(q, k, v)
        tma = has_tma(q.dtype) and k.numel() > 0 and can_describe(q, k, v)
        tile = tiles_for(width, q.dtype, narrow).forward
        programs = query_order.numel() * (TILE_ROWS // tile.rows) * share * heads
        strides = [x.stride(axis) for x in (q, k, v, out) for axis in range(3)]
        blocks = ((q, tile.rows), (k, tile.step), (v, tile.step), (out, tile.rows))
        _forward_kernel[(programs,)](
            *(described(x, rows) if tma else x for x, rows in blocks),
            lse,
            first_key.contiguous(),
            end_key.contiguous(),
            query_order,
            *strides,
            queries,
            k.shape[2],
            heads,
            heads_together(heads, batch * 2 * k.shape[2] * width * k.itemsize * k.shape[1] // heads),
            share,
            scale * LOG2_E,
            GROUP=heads // k.shape[1],
            WIDTH=width,
            PADDED_WIDTH=padded_width,
            TILE_ROWS=TILE_ROWS,
            BLOCK_M=tile.rows,
            BLOCK_N=tile.step,
            TMA=tma,
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=True,
            **(all_registers(tile.warps) if width == 32 else {}),
        )
    return out, lse


@triton.jit
def tile_of(order, size, heads, together, share, TILE_ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Which mask row, batch row, head and first position this program has.

    Programs of `together` heads, which divides `heads`, run side by side through all tiles, long ones first, before
    those of the next heads start (see `tiles.heads_together`).
    """
    program = tl.program_id(0)
    wave = tl.num_programs(0) // heads * together
    head = program // wave * together + program % wave % together
    program = program % wave // together
    sharer = program % share
    program = program // share
    tile = tl.load(order + program // (TILE_ROWS // BLOCK))
    tiles = tl.cdiv(size, TILE_ROWS)
    mask_row = tile // tiles
    start = (tile % tiles) * TILE_ROWS + (program % (TILE_ROWS // BLOCK)) * BLOCK
    # Either each batch row has its mask row, or all share the one.
    return mask_row, mask_row + sharer, head, start


@triton.jit
def load_bounds(p_first, p_end, start, size, BLOCK: tl.constexpr):
    """[BLOCK] intervals from `start`, empty past `size`, and the extremes of those within it.

    Returns the first and end of each, then the lowest first, highest first, lowest end and highest end.
    """
    o_row = start + tl.arange(0, BLOCK)
    last = tl.minimum(start + BLOCK, size) - 1
    b_first = tl.load(p_first + o_row, mask=o_row < size, other=HIDDEN)
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


@triton.jit(do_not_specialize=["together"])
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
    together,
    share,
    scale_log2,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
):
    mask_row, row, head, start = tile_of(order, queries, heads, together, share, TILE_ROWS, BLOCK_M)
    if start >= queries:
        return
    key_head = head // GROUP
    p_q = head_of(q, row, head, stride_qb, stride_qh, TMA)
    p_k = head_of(k, row, key_head, stride_kb, stride_kh, TMA)
    p_v = head_of(v, row, key_head, stride_vb, stride_vh, TMA)

    # [M], [M] and four scalars
    offset = mask_row.to(tl.int64) * queries
    b_first, b_end, low_first, high_first, low_end, high_end = load_bounds(
        first_key + offset, end_key + offset, start, queries, BLOCK_M
    )
    full_start, full_end = full_steps(low_first, high_first, low_end, high_end, BLOCK_N)
    # [M, D]
    b_q = load_rows(p_q, row, head, start, stride_qs, queries, BLOCK_M, WIDTH, PADDED_WIDTH, TMA)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_out = tl.zeros([BLOCK_M, PADDED_WIDTH], tl.float32)
    b_out, b_sum, b_max = _attend(
        b_out, b_sum, b_max, b_q, p_k, p_v, row, key_head, stride_ks, stride_vs, low_first, full_start, keys,
        b_first, b_end, scale_log2, True, True, WIDTH, PADDED_WIDTH, BLOCK_N, TMA,
    )  # fmt: skip
    b_out, b_sum, b_max = _attend(
        b_out, b_sum, b_max, b_q, p_k, p_v, row, key_head, stride_ks, stride_vs, full_start, full_end, keys,
        b_first, b_end, scale_log2, False, False, WIDTH, PADDED_WIDTH, BLOCK_N, TMA,
    )  # fmt: skip
    b_out, b_sum, b_max = _attend(
        b_out, b_sum, b_max, b_q, p_k, p_v, row, key_head, stride_ks, stride_vs, full_end, high_end, keys,
        b_first, b_end, scale_log2, False, True, WIDTH, PADDED_WIDTH, BLOCK_N, TMA,
    )  # fmt: skip

    b_out, b_lse = normalise(b_out, b_sum, b_max)
    o_m = start + tl.arange(0, BLOCK_M)
    tl.store(lse + (row * heads + head).to(tl.int64) * queries + o_m, b_lse, mask=o_m < queries)
    store_rows(
        head_of(out, row, head, stride_ob, stride_oh, TMA), b_out, row, head, start, stride_os,
        queries, BLOCK_M, WIDTH, PADDED_WIDTH, TMA,
    )  # fmt: skip


@triton.jit
def weigh(b_score, b_sum, b_max, scale_log2, MASKED: tl.constexpr):
    """The weights [M, N] of new scores and the decay [M] of what came before, with the new sum and maximum of a tile.

    The maximum is that of the scaled scores, as exponents of 2. MASKED: whether scores may be minus infinity.
    """
    b_new_max = tl.maximum(b_max, tl.max(b_score, 1) * scale_log2)
    b_shift = b_new_max
    if MASKED:  # a row that has seen nothing yet has no finite maximum
        b_shift = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
    b_weight = tl.math.exp2(b_score * scale_log2 - b_shift[:, None])
    b_decay = tl.math.exp2(b_max - b_shift)
    return b_weight, b_decay, b_sum * b_decay + tl.sum(b_weight, 1), b_new_max


@triton.jit
def normalise(b_out, b_sum, b_max):
    """The output [M, D] and the log-sum-exp [M] of a tile that has seen all its keys; 0 and minus infinity if none."""
    m_empty = b_sum == 0.0
    b_sum = tl.where(m_empty, 1.0, b_sum)
    return b_out / b_sum[:, None], tl.where(m_empty, float("-inf"), (b_max + tl.math.log2(b_sum)) * _LN_2)


@triton.jit
def _attend(
    b_out,
    b_sum,
    b_max,
    b_q,
    p_k,
    p_v,
    row,
    key_head,
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
    TMA: tl.constexpr,
):
    """Add the keys `[start, end)` to the output, sum and maximum of a tile, masked on the sides that are asked for."""
    for n in tl.range(start, end, BLOCK_N):
        # [N, D]
        b_k = load_rows(p_k, row, key_head, n, stride_ks, keys, BLOCK_N, WIDTH, PADDED_WIDTH, TMA)
        # [M, N]
        b_score = tl.dot(b_q, b_k.T, input_precision="ieee")
        o_n = n + tl.arange(0, BLOCK_N)
        if MASK_END:
            m_visible = o_n[None, :] < b_end[:, None]
            if MASK_FIRST:
                m_visible = m_visible & (o_n[None, :] >= b_first[:, None])
            b_score = tl.where(m_visible, b_score, float("-inf"))
        b_weight, b_decay, b_sum, b_max = weigh(b_score, b_sum, b_max, scale_log2, MASK_END)
        # [N, D]
        b_v = load_rows(p_v, row, key_head, n, stride_vs, keys, BLOCK_N, WIDTH, PADDED_WIDTH, TMA)
        b_out = tl.dot(b_weight.to(b_v.dtype), b_v, b_out * b_decay[:, None], input_precision="ieee")
    return b_out, b_sum, b_max
