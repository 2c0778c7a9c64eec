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
from transfusion_kernels.attention.forward import (
    LOG2_E,
    device_of,
    full_steps,
    load_bounds,
    load_rows,
    store_rows,
    tile_of,
)
from transfusion_kernels.attention.layout import TILE_ROWS
from transfusion_kernels.attention.tiles import Tile, tiles_for

_LOG2_E = tl.constexpr(LOG2_E)
_DELTA_ROWS = 64


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
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, laid out as [B, S, H, D].

    bounds: first_key and end_key, then first_query and end_query, int32. orders: of the tiles of queries and of keys.
    deterministic: whether every run gives the same bits.
    """
    first_key, end_key, first_query, end_query = (bound.contiguous() for bound in bounds)
    query_order, key_order = orders
    batch, heads, queries, width = q.shape
    key_heads, keys = k.shape[1], k.shape[2]
    padded_width = triton.next_power_of_2(width)
    tiles = tiles_for(q.device, padded_width, q.dtype)
    share = batch // max(first_key.shape[0], 1)
    if grad_out.stride(3) != 1:  # as of a sum, whose gradient is one expanded number
        grad_out = grad_out.contiguous()

    # Atomics add to what is there, in float32 whatever the inputs are.
    dq_dtype = q.dtype if deterministic else torch.float32
    dq = q.new_zeros(batch, queries, heads, width, dtype=dq_dtype).transpose(1, 2)
    dk = k.new_empty(batch, keys, key_heads, width).transpose(1, 2)
    dv = v.new_empty(batch, keys, key_heads, width).transpose(1, 2)
    delta = torch.empty_like(lse)
    strides = [x.stride(axis) for x in (q, k, v, grad_out) for axis in range(3)]
    sizes = (queries, keys, heads, share, scale)

    def shape(tile: Tile) -> dict[str, int | bool]:
        return {
            "GROUP": heads // key_heads,
            "WIDTH": width,
            "PADDED_WIDTH": padded_width,
            "TILE_ROWS": TILE_ROWS,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
            "enable_fp_fusion": True,
        }

    with device_of(q):
        if q.numel():
            _delta_kernel[(triton.cdiv(queries, _DELTA_ROWS) * batch * heads,)](
                out, grad_out, delta, *out.stride()[:3], *grad_out.stride()[:3], queries, heads,
                WIDTH=width, PADDED_WIDTH=padded_width, BLOCK_M=_DELTA_ROWS,
            )  # fmt: skip
        if k.numel():
            tile = tiles.keys if deterministic else tiles.fused
            programs = key_order.numel() * (TILE_ROWS // tile.rows) * share * key_heads
            _keys_kernel[(programs,)](
                q, k, v, grad_out, lse, delta, dq, dk, dv, first_query, end_query, key_order,
                *strides, *dq.stride()[:3], *dk.stride()[:3], *sizes, **shape(tile),
                BLOCK_M=tile.step, BLOCK_N=tile.rows, FUSED=not deterministic,
            )  # fmt: skip
        if deterministic and q.numel():
            tile = tiles.queries
            programs = query_order.numel() * (TILE_ROWS // tile.rows) * share * heads
            _queries_kernel[(programs,)](
                q, k, v, grad_out, lse, delta, dq, first_key, end_key, query_order,
                *strides, *dq.stride()[:3], *sizes, **shape(tile),
                BLOCK_M=tile.rows, BLOCK_N=tile.step,
            )  # fmt: skip
    return dq.to(q.dtype), dk, dv


@triton.jit
def _delta_kernel(
    out,
    grad_out,
    delta,
    stride_ob,
    stride_oh,
    stride_os,
    stride_gb,
    stride_gh,
    stride_gs,
    queries,
    heads,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """delta [B, H, S]: the dot product of output and gradient, which the softmax's own gradient subtracts."""
    program = tl.program_id(0)
    blocks = tl.cdiv(queries, BLOCK_M)
    start = (program % blocks) * BLOCK_M
    row = (program // blocks // heads).to(tl.int64)
    head = (program // blocks % heads).to(tl.int64)
    # [M, D]
    b_out = load_rows(
        out + row * stride_ob + head * stride_oh, start, stride_os, queries, BLOCK_M, WIDTH, PADDED_WIDTH
    )
    b_grad = load_rows(
        grad_out + row * stride_gb + head * stride_gh, start, stride_gs, queries, BLOCK_M, WIDTH, PADDED_WIDTH
    )
    o_m = start + tl.arange(0, BLOCK_M)
    b_delta = tl.sum(b_out.to(tl.float32) * b_grad.to(tl.float32), 1)
    tl.store(delta + (row * heads + head) * queries + o_m, b_delta, mask=o_m < queries)


@triton.jit
def _load_statistics(p_lse, p_delta, start, queries, BLOCK_M: tl.constexpr):
    """[M] log2-sum-exp and delta. A log-sum-exp of plus infinity gives weights of 0: so has a query that sees nothing
    or stands past the last."""
    o_m = start + tl.arange(0, BLOCK_M)
    b_lse = tl.load(p_lse + o_m, mask=o_m < queries, other=float("-inf"))
    b_delta = tl.load(p_delta + o_m, mask=o_m < queries, other=0.0)
    return tl.where(b_lse == float("-inf"), float("inf"), b_lse * _LOG2_E), b_delta


@triton.jit
def _keys_kernel(
    q,
    k,
    v,
    grad_out,
    lse,
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
    keys,
    heads,
    share,
    scale,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FUSED: tl.constexpr,
):
    """dk and dv of a tile of keys, and where FUSED its part of dq. dk and dv share their strides."""
    mask_row, row, key_head, start = tile_of(
        tl.program_id(0), order, keys, heads // GROUP, share, TILE_ROWS, BLOCK_N
    )
    if start >= keys:
        return
    mask_row, row, key_head = mask_row.to(tl.int64), row.to(tl.int64), key_head.to(tl.int64)

    # [N], [N] and four scalars
    b_first, b_end, low_first, high_first, low_end, high_end = load_bounds(
        first_query + mask_row * keys, end_query + mask_row * keys, start, keys, BLOCK_N
    )
    full_start, full_end = full_steps(low_first, high_first, low_end, high_end, BLOCK_M)
    if start + BLOCK_N > keys:
        # Keys past the last have scores of 0, and with a very low log-sum-exp infinite weights: mask all steps.
        full_end = full_start
    # [N, D]
    b_k = load_rows(
        k + row * stride_kb + key_head * stride_kh, start, stride_ks, keys, BLOCK_N, WIDTH, PADDED_WIDTH
    )
    b_v = load_rows(
        v + row * stride_vb + key_head * stride_vh, start, stride_vs, keys, BLOCK_N, WIDTH, PADDED_WIDTH
    )
    b_dk = tl.zeros([BLOCK_N, PADDED_WIDTH], tl.float32)
    b_dv = tl.zeros([BLOCK_N, PADDED_WIDTH], tl.float32)
    for member in range(GROUP):
        head = key_head * GROUP + member
        p_q = q + row * stride_qb + head * stride_qh
        p_grad = grad_out + row * stride_gb + head * stride_gh
        p_dq = dq + row * stride_dqb + head * stride_dqh
        p_lse = lse + (row * heads + head) * queries
        p_delta = delta + (row * heads + head) * queries
        b_dk, b_dv = _walk_queries(
            b_dk, b_dv, b_k, b_v, p_q, p_grad, p_dq, p_lse, p_delta, stride_qs, stride_gs, stride_dqs,
            low_first, full_start, queries, b_first, b_end, scale,
            True, FUSED, WIDTH, PADDED_WIDTH, BLOCK_M,
        )  # fmt: skip
        b_dk, b_dv = _walk_queries(
            b_dk, b_dv, b_k, b_v, p_q, p_grad, p_dq, p_lse, p_delta, stride_qs, stride_gs, stride_dqs,
            full_start, full_end, queries, b_first, b_end, scale,
            False, FUSED, WIDTH, PADDED_WIDTH, BLOCK_M,
        )  # fmt: skip
        b_dk, b_dv = _walk_queries(
            b_dk, b_dv, b_k, b_v, p_q, p_grad, p_dq, p_lse, p_delta, stride_qs, stride_gs, stride_dqs,
            full_end, high_end, queries, b_first, b_end, scale,
            True, FUSED, WIDTH, PADDED_WIDTH, BLOCK_M,
        )  # fmt: skip
    offset = row * stride_dkb + key_head * stride_dkh
    store_rows(dk + offset, b_dk * scale, start, stride_dks, keys, BLOCK_N, WIDTH, PADDED_WIDTH)
    store_rows(dv + offset, b_dv, start, stride_dks, keys, BLOCK_N, WIDTH, PADDED_WIDTH)


@triton.jit
def _walk_queries(
    b_dk,
    b_dv,
    b_k,
    b_v,
    p_q,
    p_grad,
    p_dq,
    p_lse,
    p_delta,
    stride_qs,
    stride_gs,
    stride_dqs,
    start,
    end,
    queries,
    b_first,
    b_end,
    scale,
    MASK: tl.constexpr,
    FUSED: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Add the queries `[start, end)` of one head to the gradients of a tile of keys."""
    for m in tl.range(start, end, BLOCK_M):
        # [M, D], [M, D], [M], [M]
        b_q = load_rows(p_q, m, stride_qs, queries, BLOCK_M, WIDTH, PADDED_WIDTH)
        b_grad = load_rows(p_grad, m, stride_gs, queries, BLOCK_M, WIDTH, PADDED_WIDTH)
        b_lse, b_delta = _load_statistics(p_lse, p_delta, m, queries, BLOCK_M)
        # [N, M]
        b_score = tl.dot(b_k, b_q.T, input_precision="ieee")
        b_weight = tl.math.exp2(b_score * (scale * _LOG2_E) - b_lse[None, :])
        o_m = m + tl.arange(0, BLOCK_M)
        if MASK:
            m_visible = (o_m[None, :] >= b_first[:, None]) & (o_m[None, :] < b_end[:, None])
            b_weight = tl.where(m_visible, b_weight, 0.0)
        # dV before dP: in the other order a compiler of Triton 3.6 serialises the tensor cores.
        b_dv = tl.dot(b_weight.to(b_grad.dtype), b_grad, b_dv, input_precision="ieee")
        b_dweight = tl.dot(b_v, b_grad.T, input_precision="ieee")
        b_dscore = (b_weight * (b_dweight - b_delta[None, :])).to(b_q.dtype)
        b_dk = tl.dot(b_dscore, b_q, b_dk, input_precision="ieee")
        if FUSED:
            # [M, D]
            b_dq = tl.dot(b_dscore.T, b_k, input_precision="ieee") * scale
            o_d = tl.arange(0, PADDED_WIDTH)
            m_dq = (o_m < queries)[:, None] & (o_d < WIDTH)[None, :]
            p_tile = p_dq + o_m[:, None].to(tl.int64) * stride_dqs + o_d[None, :]
            tl.atomic_add(p_tile, b_dq, mask=m_dq, sem="relaxed")
    return b_dk, b_dv


@triton.jit
def _queries_kernel(
    q,
    k,
    v,
    grad_out,
    lse,
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
    keys,
    heads,
    share,
    scale,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dq of a tile of queries."""
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
    # [M, D], [M, D], [M], [M]
    b_q = load_rows(
        q + row * stride_qb + head * stride_qh, start, stride_qs, queries, BLOCK_M, WIDTH, PADDED_WIDTH
    )
    b_grad = load_rows(
        grad_out + row * stride_gb + head * stride_gh, start, stride_gs, queries, BLOCK_M, WIDTH, PADDED_WIDTH
    )
    offset = (row * heads + head) * queries
    b_lse, b_delta = _load_statistics(lse + offset, delta + offset, start, queries, BLOCK_M)
    b_dq = tl.zeros([BLOCK_M, PADDED_WIDTH], tl.float32)
    b_dq = _walk_keys(
        b_dq, b_q, b_grad, b_lse, b_delta, p_k, p_v, stride_ks, stride_vs, low_first, full_start, keys,
        b_first, b_end, scale, True, WIDTH, PADDED_WIDTH, BLOCK_N,
    )  # fmt: skip
    b_dq = _walk_keys(
        b_dq, b_q, b_grad, b_lse, b_delta, p_k, p_v, stride_ks, stride_vs, full_start, full_end, keys,
        b_first, b_end, scale, False, WIDTH, PADDED_WIDTH, BLOCK_N,
    )  # fmt: skip
    b_dq = _walk_keys(
        b_dq, b_q, b_grad, b_lse, b_delta, p_k, p_v, stride_ks, stride_vs, full_end, high_end, keys,
        b_first, b_end, scale, True, WIDTH, PADDED_WIDTH, BLOCK_N,
    )  # fmt: skip
    store_rows(
        dq + row * stride_dqb + head * stride_dqh, b_dq * scale, start, stride_dqs, queries,
        BLOCK_M, WIDTH, PADDED_WIDTH,
    )  # fmt: skip


@triton.jit
def _walk_keys(
    b_dq,
    b_q,
    b_grad,
    b_lse,
    b_delta,
    p_k,
    p_v,
    stride_ks,
    stride_vs,
    start,
    end,
    keys,
    b_first,
    b_end,
    scale,
    MASK: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add the keys `[start, end)` to the gradient of a tile of queries."""
    for n in tl.range(start, end, BLOCK_N):
        # [N, D]
        b_k = load_rows(p_k, n, stride_ks, keys, BLOCK_N, WIDTH, PADDED_WIDTH)
        b_v = load_rows(p_v, n, stride_vs, keys, BLOCK_N, WIDTH, PADDED_WIDTH)
        # [M, N]
        b_score = tl.dot(b_q, b_k.T, input_precision="ieee")
        b_dweight = tl.dot(b_grad, b_v.T, input_precision="ieee")
        b_weight = tl.math.exp2(b_score * (scale * _LOG2_E) - b_lse[:, None])
        if MASK:
            o_n = n + tl.arange(0, BLOCK_N)
            m_visible = (o_n[None, :] >= b_first[:, None]) & (o_n[None, :] < b_end[:, None])
            b_weight = tl.where(m_visible, b_weight, 0.0)
        b_dscore = (b_weight * (b_dweight - b_delta[:, None])).to(b_k.dtype)
        b_dq = tl.dot(b_dscore, b_k, b_dq, input_precision="ieee")
    return b_dq
