"""The backward in Triton: scores computed again tile by tile, from the log-sum-exp of the forward.

Each program owns a tile of keys and walks the queries that see any of it, which are one interval too, so that the
gradients of keys and values stay in registers. The gradient of queries is either added up in float32 by atomics in
the same walk, five matrix products in all, or, where runs must agree to the bit, by a second kernel that owns tiles
of queries, seven products.

Names and shapes as in `forward`: M queries, N keys, D head width padded to a power of two.
"""

# What a kernel is given has no Python type.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from transfusion_kernels.attention.forward import (
    LOG2_E,
    full_steps,
    load_bounds,
    tile_of,
)
from transfusion_kernels.attention.layout import TILE_ROWS
from transfusion_kernels.attention.rows import (
    add_rows,
    can_describe,
    describable,
    described,
    device_of,
    head_of,
    load_rows,
    store_rows,
)
from transfusion_kernels.attention.tiles import (
    Tile,
    all_registers,
    has_tma,
    heads_together,
    needs_descriptors,
    tiles_for,
)

_LOG2_E = tl.constexpr(LOG2_E)
_STATISTICS_ROWS = 64


def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bounds: tuple[Tensor, Tensor, Tensor, Tensor],
    orders: tuple[Tensor, Tensor],
    scale: float,
    deterministic: bool,
    narrow: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, laid out as [B, S, H, D].

    bounds: first_key and end_key, then first_query and end_query, int32. orders: of the tiles of queries and of keys.
    deterministic: whether every run gives the same bits.
    narrow: whether to take the tiles for queries that see few keys.
    """
    first_key, end_key, first_query, end_query = (bound.contiguous() for bound in bounds)
    query_order, key_order = orders
    batch, heads, queries, width = q.shape
    key_heads, keys = k.shape[1], k.shape[2]
    padded_width = triton.next_power_of_2(width)
    share = batch // max(first_key.shape[0], 1)
    if grad_out.stride(3) != 1:  # as of a sum, whose gradient is one expanded number
        grad_out = grad_out.contiguous()
    dk = k.new_empty(batch, keys, key_heads, width).transpose(1, 2)
    dv = v.new_empty(batch, keys, key_heads, width).transpose(1, 2)
    padded_queries = triton.cdiv(queries, _STATISTICS_ROWS) * _STATISTICS_ROWS + TILE_ROWS
    log_sum, delta = lse.new_empty(2, batch, heads, padded_queries).unbind()

    with device_of(q):
        if needs_descriptors(q.dtype):
            q, k, v, grad_out = describable(q, k, v, grad_out)
        # There are no descriptors of nothing.
        tma = has_tma(q.dtype) and q.numel() > 0 and k.numel() > 0 and can_describe(q, k, v, grad_out)
        tma_add = tma and needs_descriptors(q.dtype)
        tiles = tiles_for(width, q.dtype, narrow)
        fused = None if deterministic else tiles.fused
        # Atomics add to what is there, in float32 whatever the inputs are.
        dq_dtype = torch.float32 if fused else q.dtype
        dq = q.new_zeros(batch, queries, heads, width, dtype=dq_dtype).transpose(1, 2)
        strides = [x.stride(axis) for x in (q, k, v, grad_out, dq, dk) for axis in range(3)]
        sizes = (queries, padded_queries, keys, heads)
        walked_queries = batch * queries * width * (2 * q.itemsize + (4 if fused else 0)) * heads // key_heads
        walked_keys = batch * 2 * keys * width * k.itemsize * key_heads // heads

        def inputs(query_rows: int, key_rows: int) -> list[Tensor | TensorDescriptor]:
            blocks = ((q, query_rows), (k, key_rows), (v, key_rows), (grad_out, query_rows))
            return [described(x, rows) if tma else x for x, rows in blocks]

        def shape(tile: Tile) -> dict[str, int | bool]:
            return {
                "GROUP": heads // key_heads,
                "WIDTH": width,
                "PADDED_WIDTH": padded_width,
                "TILE_ROWS": TILE_ROWS,
                "TMA": tma,
                "num_warps": tile.warps,
                "num_stages": tile.stages,
                "enable_fp_fusion": True,
                **(all_registers(tile.warps) if q.dtype == torch.float32 else {}),
            }

        if q.numel():
            _statistics_kernel[(padded_queries // _STATISTICS_ROWS * batch * heads,)](
                out, grad_out, lse, log_sum, delta, *out.stride()[:3], *grad_out.stride()[:3],
                queries, padded_queries, heads, scale,
                WIDTH=width, PADDED_WIDTH=padded_width, BLOCK_M=_STATISTICS_ROWS,
            )  # fmt: skip
        if k.numel():
            tile = fused or tiles.keys
            programs = key_order.numel() * (TILE_ROWS // tile.rows) * share * key_heads
            _keys_kernel[(programs,)](
                *inputs(tile.step, tile.rows), log_sum, delta,
                described(dq, tile.step) if fused and tma_add else dq,
                *(described(x, tile.rows) if tma else x for x in (dk, dv)),
                first_query, end_query, key_order, *strides, *sizes, heads_together(key_heads, walked_queries),
                share, scale, **shape(tile),
                BLOCK_M=tile.step, BLOCK_N=tile.rows, FUSED=fused is not None, TMA_ADD=tma_add,
            )  # fmt: skip
        if not fused and q.numel():
            tile = tiles.queries
            programs = query_order.numel() * (TILE_ROWS // tile.rows) * share * heads
            _queries_kernel[(programs,)](
                *inputs(tile.rows, tile.step), log_sum, delta, described(dq, tile.rows) if tma else dq,
                first_key, end_key, query_order, *strides[:15], *sizes, heads_together(heads, walked_keys),
                share, scale, **shape(tile),
                BLOCK_M=tile.rows, BLOCK_N=tile.step,
            )  # fmt: skip
    return dq.to(q.dtype), dk, dv


@triton.jit(do_not_specialize=["queries", "heads"])
def _statistics_kernel(
    out,
    grad_out,
    lse,
    log_sum,
    delta,
    stride_ob,
    stride_oh,
    stride_os,
    stride_gb,
    stride_gh,
    stride_gs,
    queries,
    padded_queries,
    heads,
    scale,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """What the other kernels read of each query, so far past the last that no step needs to check.

    log_sum [B, H, padded]: its log-sum-exp in units of unscaled scores; plus infinity, which gives weights of 0, for
    a query that sees nothing or stands past the last. delta [B, H, padded]: the dot product of output and gradient,
    which the softmax's own gradient subtracts.
    """
    program = tl.program_id(0)
    blocks = padded_queries // BLOCK_M
    start = (program % blocks) * BLOCK_M
    row, head = program // blocks // heads, program // blocks % heads
    p_out = head_of(out, row, head, stride_ob, stride_oh, False)
    p_grad = head_of(grad_out, row, head, stride_gb, stride_gh, False)
    # [M, D]
    b_out = load_rows(p_out, row, head, start, stride_os, queries, BLOCK_M, WIDTH, PADDED_WIDTH, False)
    b_grad = load_rows(p_grad, row, head, start, stride_gs, queries, BLOCK_M, WIDTH, PADDED_WIDTH, False)
    # [M]
    o_m = start + tl.arange(0, BLOCK_M)
    head = (row * heads + head).to(tl.int64)
    b_lse = tl.load(lse + head * queries + o_m, mask=o_m < queries, other=float("-inf"))
    b_log_sum = tl.where(b_lse == float("-inf"), float("inf"), b_lse / scale)
    tl.store(log_sum + head * padded_queries + o_m, b_log_sum)
    tl.store(delta + head * padded_queries + o_m, tl.sum(b_out.to(tl.float32) * b_grad.to(tl.float32), 1))


@triton.jit
def _skip_gap(step, gap_start, gap_end, MASK: tl.constexpr):
    """Where a step stands, if the steps from `gap_start` to `gap_end` are left to the loop without a mask."""
    if MASK:
        return tl.where(step < gap_start, step, step + (gap_end - gap_start))
    else:
        return step


@triton.jit(do_not_specialize=["together"])
def _keys_kernel(
    q,
    k,
    v,
    grad_out,
    log_sum,
    delta,
    dq,
    dk,
    dv,
    first_query,
    end_query,
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
    stride_gb,
    stride_gh,
    stride_gs,
    stride_dqb,
    stride_dqh,
    stride_dqs,
    stride_dkb,
    stride_dkh,
    stride_dks,
    queries,
    padded_queries,
    keys,
    heads,
    together,
    share,
    scale,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FUSED: tl.constexpr,
    TMA: tl.constexpr,
    TMA_ADD: tl.constexpr,
):
    """dk and dv of a tile of keys, and where FUSED its part of dq. dk and dv share their strides."""
    mask_row, row, key_head, start = tile_of(order, keys, heads // GROUP, together, share, TILE_ROWS, BLOCK_N)
    if start >= keys:
        return

    # [N], [N] and four scalars
    offset = mask_row.to(tl.int64) * keys
    b_first, b_end, low_first, high_first, low_end, high_end = load_bounds(
        first_query + offset, end_query + offset, start, keys, BLOCK_N
    )
    full_start, full_end = full_steps(low_first, high_first, low_end, high_end, BLOCK_M)
    if start + BLOCK_N > keys:
        # Keys past the last have scores of 0, and with a very low log-sum-exp infinite weights: mask all steps.
        full_end = full_start
    p_k = head_of(k, row, key_head, stride_kb, stride_kh, TMA)
    p_v = head_of(v, row, key_head, stride_vb, stride_vh, TMA)
    # [N, D]
    b_k = load_rows(p_k, row, key_head, start, stride_ks, keys, BLOCK_N, WIDTH, PADDED_WIDTH, TMA)
    b_v = load_rows(p_v, row, key_head, start, stride_vs, keys, BLOCK_N, WIDTH, PADDED_WIDTH, TMA)
    b_dk = tl.zeros([BLOCK_N, PADDED_WIDTH], tl.float32)
    b_dv = tl.zeros([BLOCK_N, PADDED_WIDTH], tl.float32)
    for member in range(GROUP):
        head = key_head * GROUP + member
        p_q = head_of(q, row, head, stride_qb, stride_qh, TMA)
        p_grad = head_of(grad_out, row, head, stride_gb, stride_gh, TMA)
        p_dq = head_of(dq, row, head, stride_dqb, stride_dqh, TMA_ADD)
        offset = (row * heads + head).to(tl.int64) * padded_queries
        p_sum, p_delta = log_sum + offset, delta + offset
        b_dk, b_dv = _walk_queries(
            b_dk, b_dv, b_k, b_v, p_q, p_grad, p_dq, p_sum, p_delta, row, head, stride_qs, stride_gs, stride_dqs,
            low_first, high_end, full_start, full_end, queries, b_first, b_end, scale,
            True, FUSED, WIDTH, PADDED_WIDTH, BLOCK_M, BLOCK_N, TMA, TMA_ADD,
        )  # fmt: skip
        b_dk, b_dv = _walk_queries(
            b_dk, b_dv, b_k, b_v, p_q, p_grad, p_dq, p_sum, p_delta, row, head, stride_qs, stride_gs, stride_dqs,
            full_start, full_end, full_end, full_end, queries, b_first, b_end, scale,
            False, FUSED, WIDTH, PADDED_WIDTH, BLOCK_M, BLOCK_N, TMA, TMA_ADD,
        )  # fmt: skip
    p_dk = head_of(dk, row, key_head, stride_dkb, stride_dkh, TMA)
    p_dv = head_of(dv, row, key_head, stride_dkb, stride_dkh, TMA)
    store_rows(p_dk, b_dk * scale, row, key_head, start, stride_dks, keys, BLOCK_N, WIDTH, PADDED_WIDTH, TMA)
    store_rows(p_dv, b_dv, row, key_head, start, stride_dks, keys, BLOCK_N, WIDTH, PADDED_WIDTH, TMA)


@triton.jit
def _walk_queries(
    b_dk,
    b_dv,
    b_k,
    b_v,
    p_q,
    p_grad,
    p_dq,
    p_sum,
    p_delta,
    row,
    head,
    stride_qs,
    stride_gs,
    stride_dqs,
    start,
    end,
    gap_start,
    gap_end,
    queries,
    b_first,
    b_end,
    scale,
    MASK: tl.constexpr,
    FUSED: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
    TMA_ADD: tl.constexpr,
):
    """Add the queries `[start, end)` of one head, less those of the gap, to the gradients of a tile of keys.

    The masked steps before and after the full ones share a loop: with one for each, registers spill.
    """
    for step in tl.range(start, end - (gap_end - gap_start), BLOCK_M):
        m = _skip_gap(step, gap_start, gap_end, MASK)
        o_m = m + tl.arange(0, BLOCK_M)
        # [M, D]
        b_q = load_rows(p_q, row, head, m, stride_qs, queries, BLOCK_M, WIDTH, PADDED_WIDTH, TMA)
        b_grad = load_rows(p_grad, row, head, m, stride_gs, queries, BLOCK_M, WIDTH, PADDED_WIDTH, TMA)
        # [N, M]
        # Sums of products start at what is to be subtracted from them, so that no registers are kept for it.
        b_score = tl.broadcast_to(-tl.load(p_sum + o_m)[None, :], [BLOCK_N, BLOCK_M])
        b_score = tl.dot(b_k, b_q.T, b_score, input_precision="ieee")
        b_weight = tl.math.exp2(b_score * (scale * _LOG2_E))
        if MASK:
            m_visible = (o_m[None, :] >= b_first[:, None]) & (o_m[None, :] < b_end[:, None])
            b_weight = tl.where(m_visible, b_weight, 0.0)
        # dV before dP: in the other order a compiler of Triton 3.6 serialises the tensor cores.
        b_dv = tl.dot(b_weight.to(b_grad.dtype), b_grad, b_dv, input_precision="ieee")
        b_dweight = tl.broadcast_to(-tl.load(p_delta + o_m)[None, :], [BLOCK_N, BLOCK_M])
        b_dweight = tl.dot(b_v, b_grad.T, b_dweight, input_precision="ieee")
        b_dscore = (b_weight * b_dweight).to(b_q.dtype)
        b_dk = tl.dot(b_dscore, b_q, b_dk, input_precision="ieee")
        if FUSED:
            # [M, D]
            b_dq = tl.dot(b_dscore.T, b_k, input_precision="ieee") * scale
            add_rows(p_dq, b_dq, row, head, m, stride_dqs, queries, BLOCK_M, WIDTH, PADDED_WIDTH, TMA_ADD)
    return b_dk, b_dv


@triton.jit(do_not_specialize=["together"])
def _queries_kernel(
    q,
    k,
    v,
    grad_out,
    log_sum,
    delta,
    dq,
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
    stride_gb,
    stride_gh,
    stride_gs,
    stride_dqb,
    stride_dqh,
    stride_dqs,
    queries,
    padded_queries,
    keys,
    heads,
    together,
    share,
    scale,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
):
    """dq of a tile of queries."""
    mask_row, row, head, start = tile_of(order, queries, heads, together, share, TILE_ROWS, BLOCK_M)
    if start >= queries:
        return
    key_head = head // GROUP
    p_q = head_of(q, row, head, stride_qb, stride_qh, TMA)
    p_grad = head_of(grad_out, row, head, stride_gb, stride_gh, TMA)
    p_k = head_of(k, row, key_head, stride_kb, stride_kh, TMA)
    p_v = head_of(v, row, key_head, stride_vb, stride_vh, TMA)

    # [M], [M] and four scalars
    offset = mask_row.to(tl.int64) * queries
    b_first, b_end, low_first, high_first, low_end, high_end = load_bounds(
        first_key + offset, end_key + offset, start, queries, BLOCK_M
    )
    full_start, full_end = full_steps(low_first, high_first, low_end, high_end, BLOCK_N)
    # [M, D], [M, D], [M], [M]
    b_q = load_rows(p_q, row, head, start, stride_qs, queries, BLOCK_M, WIDTH, PADDED_WIDTH, TMA)
    b_grad = load_rows(p_grad, row, head, start, stride_gs, queries, BLOCK_M, WIDTH, PADDED_WIDTH, TMA)
    offset = (row * heads + head).to(tl.int64) * padded_queries + start + tl.arange(0, BLOCK_M)
    b_log_sum, b_delta = tl.load(log_sum + offset), tl.load(delta + offset)
    b_dq = tl.zeros([BLOCK_M, PADDED_WIDTH], tl.float32)
    b_dq = _walk_keys(
        b_dq, b_q, b_grad, b_log_sum, b_delta, p_k, p_v, row, key_head, stride_ks, stride_vs,
        low_first, high_end, full_start, full_end, keys, b_first, b_end, scale,
        True, WIDTH, PADDED_WIDTH, BLOCK_N, TMA,
    )  # fmt: skip
    b_dq = _walk_keys(
        b_dq, b_q, b_grad, b_log_sum, b_delta, p_k, p_v, row, key_head, stride_ks, stride_vs,
        full_start, full_end, full_end, full_end, keys, b_first, b_end, scale,
        False, WIDTH, PADDED_WIDTH, BLOCK_N, TMA,
    )  # fmt: skip
    p_dq = head_of(dq, row, head, stride_dqb, stride_dqh, TMA)
    store_rows(p_dq, b_dq * scale, row, head, start, stride_dqs, queries, BLOCK_M, WIDTH, PADDED_WIDTH, TMA)


@triton.jit
def _walk_keys(
    b_dq,
    b_q,
    b_grad,
    b_log_sum,
    b_delta,
    p_k,
    p_v,
    row,
    key_head,
    stride_ks,
    stride_vs,
    start,
    end,
    gap_start,
    gap_end,
    keys,
    b_first,
    b_end,
    scale,
    MASK: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
):
    """Add the keys `[start, end)`, less those of the gap, to the gradient of a tile of queries."""
    for step in tl.range(start, end - (gap_end - gap_start), BLOCK_N):
        n = _skip_gap(step, gap_start, gap_end, MASK)
        # [N, D]
        b_k = load_rows(p_k, row, key_head, n, stride_ks, keys, BLOCK_N, WIDTH, PADDED_WIDTH, TMA)
        b_v = load_rows(p_v, row, key_head, n, stride_vs, keys, BLOCK_N, WIDTH, PADDED_WIDTH, TMA)
        # [M, N]
        b_score = tl.dot(b_q, b_k.T, input_precision="ieee") - b_log_sum[:, None]
        b_dweight = tl.dot(b_grad, b_v.T, input_precision="ieee")
        b_weight = tl.math.exp2(b_score * (scale * _LOG2_E))
        if MASK:
            o_n = n + tl.arange(0, BLOCK_N)
            m_visible = (o_n[None, :] >= b_first[:, None]) & (o_n[None, :] < b_end[:, None])
            b_weight = tl.where(m_visible, b_weight, 0.0)
        b_dscore = (b_weight * (b_dweight - b_delta[:, None])).to(b_k.dtype)
        b_dq = tl.dot(b_dscore, b_k, b_dq, input_precision="ieee")
    return b_dq
