"""The backward for Hopper GPUs, in Gluon: five products a step, the gradient of the queries added up in float32 by TMA.

A program owns a tile of keys of one key head and walks the queries that see any of it, for every query head of the
group. A producer of one warp fetches queries, gradients of their outputs and their statistics through a ring of shared
memory. Two consumers of four warps each own half of the keys, whose gradients stay in their registers. What a step adds
to the gradient of the queries leaves through shared memory.

Names as in `hopper_forward`. Scores are computed transposed, [keys, queries], so that weights and their gradients are
first operands from registers.
"""

# What a kernel is given has no Python type, and Gluon knows no starred lists.
# ruff: noqa: RUF005
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disable-error-code=annotation-unchecked

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from transfusion_kernels.attention.hopper_forward import (
    CONSUMER_REGISTERS,
    HIDDEN,
    PRODUCER_REGISTERS,
    head_and_place,
    make_barriers,
    slot_of,
)
from transfusion_kernels.attention.hopper_tma import tma_add, tma_load, tma_store, tma_store_wait

LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit(do_not_specialize=["queries", "padded_queries", "heads"])
def statistics_kernel(
    out, grad_out, lse, statistics,
    stride_ob, stride_oh, stride_os, stride_gb, stride_gh, stride_gs, queries, padded_queries, heads,
    ROWS: gl.constexpr, WIDTH: gl.constexpr,
):  # fmt: skip
    """statistics [B, H, 2, padded S]: what scores are shifted by, and the dot product of output and gradient.

    The first is the log-sum-exp in base 2, or plus infinity, which makes weights 0, for a query that sees nothing or
    stands past the last.
    """
    TILE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    program = gl.program_id(0)
    blocks = padded_queries // ROWS
    row_and_head = (program // blocks).to(gl.int64)
    row, head = row_and_head // heads, row_and_head % heads
    o_m = (program % blocks) * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, TILE))
    o_d = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, TILE))
    m_rows = o_m < queries
    p_out = out + row * stride_ob + head * stride_oh + (o_m.to(gl.int64)[:, None] * stride_os + o_d[None, :])
    p_grad = (
        grad_out + row * stride_gb + head * stride_gh + (o_m.to(gl.int64)[:, None] * stride_gs + o_d[None, :])
    )
    b_out = gl.load(p_out, mask=m_rows[:, None], other=0.0).to(gl.float32)
    b_grad = gl.load(p_grad, mask=m_rows[:, None], other=0.0).to(gl.float32)
    b_lse = gl.load(lse + row_and_head * queries + o_m, mask=m_rows, other=float("-inf"))
    b_shift = gl.where(b_lse == float("-inf"), float("inf"), b_lse * LOG2_E)
    p_statistics = statistics + row_and_head * 2 * padded_queries + o_m
    gl.store(p_statistics, b_shift)
    gl.store(p_statistics + padded_queries, gl.sum(b_out * b_grad, 1))


@gluon.jit(do_not_specialize=["keys", "key_heads", "group", "share", "together"])
def backward_kernel(
    d_q, d_k, d_v, d_grad, d_statistics, d_dq, d_dk, d_dv, first_query, end_query, order,
    keys, key_heads, group, share, together, scale, scale_log2,
    STAGES: gl.constexpr,
):  # fmt: skip
    """dk and dv of the tile of keys that is this program's in `order`, and its part of dq, to be scaled.

    Blocks: d_q, d_grad and d_dq [1, 1, queries of a step, D], d_statistics [1, 1, 2, queries of a step], the others
    [1, 1, half a tile, D]. d_dq is of float32 and added to. group: query heads to a key head. share: batch rows to a
    row of the mask. together: see `head_and_place`.
    """
    STEP: gl.constexpr = d_q.block_shape[2]
    HALF: gl.constexpr = d_dk.block_shape[2]
    key_head, place_in_order = head_and_place(gl.program_id(0), gl.num_programs(0), key_heads, together)
    sharer = place_in_order % share
    tile = gl.load(order + place_in_order // share)
    tiles = (keys + 2 * HALF - 1) // (2 * HALF)
    mask_row = (tile // tiles).to(gl.int64)
    place = (tile // tiles + sharer, key_head, (tile % tiles) * (2 * HALF))
    bounds = (first_query + mask_row * keys, end_query + mask_row * keys)

    s_k = gl.allocate_shared_memory(d_k.dtype, [1] + d_k.block_shape, d_k.layout)
    s_v = gl.allocate_shared_memory(d_v.dtype, [1] + d_v.block_shape, d_v.layout)
    kv_full = make_barriers(1, 1)
    dscores = (make_barriers(1, 2), make_barriers(1, 2))
    ring = (
        gl.allocate_shared_memory(d_q.dtype, [STAGES] + d_q.block_shape, d_q.layout),
        gl.allocate_shared_memory(d_grad.dtype, [STAGES] + d_grad.block_shape, d_grad.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES] + d_statistics.block_shape, d_statistics.layout),
        make_barriers(STAGES, 1),
        make_barriers(STAGES, 2),
    )
    DSCORES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([2 * HALF, STEP], d_q.dtype)
    s_dscore = gl.allocate_shared_memory(d_q.dtype, [1, 2 * HALF, STEP], DSCORES)
    s_dq = gl.allocate_shared_memory(gl.float32, [2] + d_dq.block_shape, d_dq.layout)
    COLUMNS: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    s_columns = gl.allocate_shared_memory(
        gl.int32, [STEP], gl.SwizzledSharedLayout(1, 1, 1, [0]), gl.arange(0, STEP, layout=COLUMNS)
    )
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (0, d_dq, d_dk, d_dv, s_k, s_v, kv_full, ring, s_dscore, dscores, s_dq, s_columns, bounds, place,
                        keys, group, scale, scale_log2)),
            (_consume, (1, d_dq, d_dk, d_dv, s_k, s_v, kv_full, ring, s_dscore, dscores, s_dq, s_columns, bounds, place,
                        keys, group, scale, scale_log2)),
            (_produce, (d_q, d_k, d_v, d_grad, d_statistics, s_k, s_v, kv_full, ring, bounds, place, keys, group)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


@gluon.jit
def _steps(bounds, start, keys, ROWS: gl.constexpr, STEP: gl.constexpr):
    """The queries that see a tile, in steps: the first query, the number of steps, and the steps' queries between which
    every query sees every key."""
    p_first, p_end = bounds
    last = gl.minimum(start + ROWS, keys) - 1
    # Copies of statistics start at multiples of 16 bytes.
    base = gl.load(p_first + start) // 4 * 4
    high_first = gl.load(p_first + last)
    low_end = gl.load(p_end + start)
    high_end = gl.load(p_end + last)
    steps = (gl.maximum(high_end - base, 0) + STEP - 1) // STEP
    full_start = gl.minimum((high_first - base + STEP - 1) // STEP, steps)
    full_end = gl.maximum(gl.maximum(low_end - base, 0) // STEP, full_start)
    # Keys past the last have scores of 0, and with a very low log-sum-exp infinite weights: mask all steps.
    full_end = gl.where(start + ROWS > keys, full_start, full_end)
    return base, steps, base + full_start * STEP, base + full_end * STEP


@gluon.jit
def _produce(d_q, d_k, d_v, d_grad, d_statistics, s_k, s_v, kv_full, ring, bounds, place, keys, group):
    """Fetch the keys and values of both consumers, then queries step by step, head by head."""
    STEP: gl.constexpr = d_q.block_shape[2]
    ROWS: gl.constexpr = d_k.block_shape[2]
    s_q, s_grad, s_statistics, full, empty = ring
    STAGES: gl.constexpr = s_q.shape[0]
    row, key_head, start = place
    base, steps, _, _ = _steps(bounds, start, keys, ROWS, STEP)
    mbarrier.expect(kv_full.index(0), d_k.block_type.nbytes + d_v.block_type.nbytes)
    tma_load(d_k, [row, key_head, start, 0], kv_full.index(0), s_k.index(0))
    tma_load(d_v, [row, key_head, start, 0], kv_full.index(0), s_v.index(0))
    query, head = base, key_head * group
    for turn in range(group * steps):
        slot, parity = slot_of(turn, STAGES)
        mbarrier.wait(empty.index(slot), parity ^ 1)
        mbarrier.expect(
            full.index(slot),
            d_q.block_type.nbytes + d_grad.block_type.nbytes + d_statistics.block_type.nbytes,
        )
        tma_load(d_q, [row, head, query, 0], full.index(slot), s_q.index(slot))
        tma_load(d_statistics, [row, head, 0, query], full.index(slot), s_statistics.index(slot))
        tma_load(d_grad, [row, head, query, 0], full.index(slot), s_grad.index(slot))
        query, head = _following(query, head, base, steps, STEP)


@gluon.jit
def _following(query, head, base, steps, STEP: gl.constexpr):
    """The next step's first query and its head: after the last step of a head comes the first of the next."""
    last = query == base + (steps - 1) * STEP
    return gl.where(last, base, query + STEP), gl.where(last, head + 1, head)


@gluon.jit
def _consume(
    MEMBER: gl.constexpr, d_dq, d_dk, d_dv, s_k, s_v, kv_full, ring, s_dscore, dscores, s_dq, s_columns, bounds, place,
    keys, group, scale, scale_log2,
):  # fmt: skip
    """Walk the queries with one half of the keys, and store the gradients of those.

    A step computes scores and the gradients of weights together, so that the softmax runs beside the second product,
    and the gradients of scores beside that of values. Both consumers share these through memory, and each then makes
    half of the columns of the gradient of the queries.

    Registers are what is short here. Where places in shared memory are the same in every step they are asked for at
    `zero`, which only the program knows to be 0: otherwise the compiler keeps dozens of them in registers. Columns
    come from memory for the same reason, and heads are walked in one loop.
    """
    s_q, s_grad, s_statistics, full, empty = ring
    STAGES: gl.constexpr = s_q.shape[0]
    STEP: gl.constexpr = s_q.shape[3]
    HALF: gl.constexpr = s_k.shape[3] // 2
    WIDTH: gl.constexpr = s_k.shape[4]
    PART: gl.constexpr = WIDTH // 2
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STEP, 16])
    GRADIENTS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    PARTS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, GRADIENTS, 2)
    row, key_head, start = place
    p_first, p_end = bounds
    base, steps, full_start, full_end = _steps(bounds, start, keys, 2 * HALF, STEP)
    o_n = start + MEMBER * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, SCORES))
    b_first = gl.load(p_first + o_n, mask=o_n < keys, other=HIDDEN)
    b_end = gl.load(p_end + o_n, mask=o_n < keys, other=0)
    b_dk = gl.zeros([HALF, WIDTH], gl.float32, GRADIENTS)
    b_dv = gl.zeros([HALF, WIDTH], gl.float32, GRADIENTS)
    s_own_dq = s_dq.index(MEMBER).reshape([STEP, PART])
    dscore_full, dscore_empty = dscores
    mbarrier.wait(kv_full.index(0), 0)
    query, head = base, key_head * group
    # Narrow heads leave registers for keys and values, which spares shared memory half of what two products read.
    HELD: gl.constexpr = WIDTH <= 64
    if HELD:
        OPERANDS: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
        held_key = s_k.index(0).reshape([2 * HALF, WIDTH]).slice(MEMBER * HALF, HALF, 0).load(OPERANDS)
        held_value = s_v.index(0).reshape([2 * HALF, WIDTH]).slice(MEMBER * HALF, HALF, 0).load(OPERANDS)
    for turn in range(group * steps):
        slot, parity = slot_of(turn, STAGES)
        zero = query >> 31
        s_keys = s_k.index(zero).reshape([2 * HALF, WIDTH])
        s_key = s_keys.slice(MEMBER * HALF, HALF, 0)
        s_value = s_v.index(zero).reshape([2 * HALF, WIDTH]).slice(MEMBER * HALF, HALF, 0)
        s_all_dscore = s_dscore.index(zero)
        s_own_dscore = s_all_dscore.slice(MEMBER * HALF, HALF, 0)
        s_query = s_q.index(slot).reshape([STEP, WIDTH])
        s_gradient = s_grad.index(slot).reshape([STEP, WIDTH])
        s_pair = s_statistics.index(slot).reshape([2, STEP])

        mbarrier.wait(full.index(slot), parity)
        b_zero = gl.zeros([HALF, STEP], gl.float32, SCORES)
        t_score = warpgroup_mma(
            held_key if HELD else s_key, s_query.permute((1, 0)), b_zero, use_acc=False, is_async=True
        )
        t_dweight = warpgroup_mma(
            held_value if HELD else s_value,
            s_gradient.permute((1, 0)),
            b_zero,
            use_acc=False,
            is_async=True,
        )
        mbarrier.wait(kv_full.index(0), 0)  # long past: see `hopper_forward`
        b_shift = s_pair.slice(0, 1).load(SCORES)
        b_score = warpgroup_mma_wait(1, deps=(t_score,)) * scale_log2 - b_shift
        if (query < full_start) | (query >= full_end):
            o_m = query + s_columns.load(gl.SliceLayout(0, SCORES))
            m_visible = (o_m[None, :] >= b_first[:, None]) & (o_m[None, :] < b_end[:, None])
            b_score = gl.where(m_visible, b_score, float("-inf"))
        b_weight = gl.exp2(b_score)
        t_dv = warpgroup_mma(
            gl.convert_layout(b_weight.to(s_q.dtype), WEIGHTS), s_gradient, b_dv, is_async=True
        )
        mbarrier.wait(dscore_empty.index(0), (turn & 1) ^ 1)
        b_dweight = warpgroup_mma_wait(1, deps=(t_dweight,))
        b_dscore = (b_weight * (b_dweight - s_pair.slice(1, 1).load(SCORES))).to(s_q.dtype)
        t_dk = warpgroup_mma(gl.convert_layout(b_dscore, WEIGHTS), s_query, b_dk, is_async=True)
        s_own_dscore.store(b_dscore)
        fence_async_shared()
        mbarrier.arrive(dscore_full.index(0), count=1)
        b_dv = warpgroup_mma_wait(1, deps=(t_dv,))

        # Each makes half of the columns, from the gradients of all scores of the program.
        b_none = gl.zeros([STEP, PART], gl.float32, PARTS)
        mbarrier.wait(dscore_full.index(0), turn & 1)
        t_dq = warpgroup_mma(
            s_all_dscore.permute((1, 0)),
            s_keys.slice(MEMBER * PART, PART, 1),
            b_none,
            use_acc=False,
            is_async=True,
        )
        b_dk = warpgroup_mma_wait(1, deps=(t_dk,))
        mbarrier.arrive(empty.index(slot), count=1)
        tma_store_wait(0)
        b_dq = warpgroup_mma_wait(0, deps=(t_dq,))
        mbarrier.arrive(dscore_empty.index(0), count=1)
        s_own_dq.store(b_dq)
        fence_async_shared()
        tma_add(d_dq, [row, head, query, MEMBER * PART], s_dq.index(MEMBER))
        query, head = _following(query, head, base, steps, STEP)

    # Keys and values are done with: their gradients leave through their memory.
    # Both read all keys until their last product, hence the turn.
    mbarrier.wait(dscore_empty.index(0), (group * steps & 1) ^ 1)
    s_key = s_k.index(0).reshape([2 * HALF, WIDTH]).slice(MEMBER * HALF, HALF, 0)
    s_value = s_v.index(0).reshape([2 * HALF, WIDTH]).slice(MEMBER * HALF, HALF, 0)
    s_key.store((b_dk * scale).to(s_k.dtype))
    s_value.store(b_dv.to(s_v.dtype))
    fence_async_shared()
    tma_store(d_dk, [row, key_head, start + MEMBER * HALF, 0], s_k.index(0).slice(MEMBER * HALF, HALF, 2))
    tma_store(d_dv, [row, key_head, start + MEMBER * HALF, 0], s_v.index(0).slice(MEMBER * HALF, HALF, 2))
    tma_store_wait(0)
