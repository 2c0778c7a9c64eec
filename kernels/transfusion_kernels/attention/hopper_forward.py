"""The forward for Hopper GPUs, in Gluon: flash attention in which loads, products and softmax overlap.

An item is a tile of queries of one head. A program takes item after item, as many programs as the GPU runs at a time,
and has three partitions. A producer of one warp takes the items, tells the consumers of them, and fetches keys and
values through rings of shared memory. It runs ahead, into the next item too. Two consumers of four warps each own half
of the queries. They take turns to issue products, so that one's softmax runs while the tensor cores work for the other.
Each issues its scores of a step together with the weighted values of the step before, so that its own softmax overlaps
them too.

Steps and turns count through all items of a program, as places in the rings do. Barriers: `full` is completed by the
bytes of a load, `empty` by the arrivals of both consumers. `turns` hold one arrival each: a consumer waits on its own
and arrives at the other's.

Names: d_ descriptors of tensors [B, H, S, D], s_ shared memory, p_ pointers, b_ values in registers, t_ products in
flight, o_ offsets, m_ masks. The tests run this source in a simulator (`tests/kernels/gluon_simulator.py`).
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

from transfusion_kernels.attention.hopper_tma import tma_load, tma_store, tma_store_wait

LN_2 = gl.constexpr(0.6931471805599453)
HIDDEN = gl.constexpr(2147483647)
CONSUMER_REGISTERS = gl.constexpr(240)
PRODUCER_REGISTERS = gl.constexpr(24)


@gluon.jit(do_not_specialize=["items", "queries", "heads", "group", "share", "together"])
def forward_kernel(
    d_q, d_k, d_v, d_out, lse, first_key, end_key, order, taken, items, queries, heads, group, share, together,
    scale_log2, STAGES: gl.constexpr,
):  # fmt: skip
    """out and lse of the tiles of queries that this program takes.

    Blocks: d_q and d_out [1, 1, half a tile, D], d_k and d_v [1, 1, keys of a step, D].
    items: the tiles of all heads. taken: how many of them were taken beyond the first of each program, 0 at first.
    group: query heads to a key head. share: batch rows to a row of the mask. together: see `head_and_place`.
    """
    asked = (
        gl.allocate_shared_memory(d_q.dtype, [2] + d_q.block_shape, d_q.layout),
        make_barriers(2, 1),
        make_barriers(2, 1),
    )
    keys = (
        gl.allocate_shared_memory(d_k.dtype, [STAGES] + d_k.block_shape, d_k.layout),
        make_barriers(STAGES, 1),
        make_barriers(STAGES, 2),
    )
    values = (
        gl.allocate_shared_memory(d_v.dtype, [STAGES] + d_v.block_shape, d_v.layout),
        make_barriers(STAGES, 1),
        make_barriers(STAGES, 2),
    )
    told = (
        gl.allocate_shared_memory(gl.int32, [8, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])),
        make_barriers(1, 1),
        make_barriers(1, 2),
    )
    s_out = gl.allocate_shared_memory(d_out.dtype, [2] + d_out.block_shape, d_out.layout)
    turns = make_barriers(2, 1)
    fence_async_shared()
    bounds = (first_key, end_key)
    work = (order, taken, items, group, share, together)
    gl.warp_specialize(
        [
            (_consume, (0, d_out, lse, s_out, asked, keys, values, told, turns, bounds, queries, heads, scale_log2)),
            (_consume, (1, d_out, lse, s_out, asked, keys, values, told, turns, bounds, queries, heads, scale_log2)),
            (_produce, (d_q, d_k, d_v, asked, keys, values, told, bounds, work, queries, heads)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


@gluon.jit
def head_and_place(item, items, heads, together):
    """The head of an item, and its place among the items of that head.

    Items of `together` heads, which divides `heads`, come side by side through all tiles before those of the next
    heads: so many that their keys and values stay in the second-level cache.
    """
    wave = items // heads * together
    within = item % wave
    return item // wave * together + within % together, within // together


@gluon.jit
def _tell(told, turn, numbers):
    """Give eight int32 to both consumers, once they have read those of the turn before. For partitions of one warp."""
    s_numbers, full, empty = told
    mbarrier.wait(empty.index(0), (turn & 1) ^ 1)
    for i in gl.static_range(8):
        s_numbers.index(i).store(gl.full([1], numbers[i], gl.int32, gl.BlockedLayout([1], [32], [1], [0])))
    mbarrier.arrive(full.index(0), count=1)


@gluon.jit
def _hear(told, turn):
    """What `_tell` gave in this turn. For partitions of four warps."""
    s_numbers, full, empty = told
    mbarrier.wait(full.index(0), turn & 1)
    numbers = ()
    for i in gl.static_range(8):
        numbers = numbers + (gl.max(s_numbers.index(i).load(gl.BlockedLayout([1], [32], [4], [0])), 0),)
    mbarrier.arrive(empty.index(0), count=1)
    return numbers


@gluon.jit
def make_barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers, each of whose phases ends with ARRIVALS arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def slot_of(step, STAGES: gl.constexpr):
    """Where in a ring a step is, and the parity of the phase in which that place holds it."""
    return step % STAGES, (step // STAGES) & 1


@gluon.jit
def _row_of(bounds, mask_row, length):
    """Where a row of the mask has its bounds."""
    p_first, p_end = bounds
    return p_first + mask_row.to(gl.int64) * length, p_end + mask_row.to(gl.int64) * length


@gluon.jit
def _steps(bounds, mask_row, start, queries, ROWS: gl.constexpr, STEP: gl.constexpr):
    """The keys that a tile sees, in steps: the first key, the number of steps (one at least), and between which two
    of them every query sees every key."""
    p_first, p_end = _row_of(bounds, mask_row, queries)
    last = gl.minimum(start + ROWS, queries) - 1
    low_first = gl.load(p_first + start)
    high_first = gl.load(p_first + last)
    low_end = gl.load(p_end + start)
    high_end = gl.load(p_end + last)
    steps = gl.maximum((high_end - low_first + STEP - 1) // STEP, 1)
    full_start = gl.minimum((high_first - low_first + STEP - 1) // STEP, steps)
    full_end = gl.maximum(gl.maximum(low_end - low_first, 0) // STEP, full_start)
    return low_first, steps, full_start, full_end


@gluon.jit
def _produce(d_q, d_k, d_v, asked, keys, values, told, bounds, work, queries, heads):
    """Take item after item, and fetch its queries for both consumers, then keys and values step by step."""
    HALF: gl.constexpr = d_q.block_shape[2]
    STEP: gl.constexpr = d_k.block_shape[2]
    s_q, q_full, q_empty = asked
    s_k, k_full, k_empty = keys
    s_v, v_full, v_empty = values
    STAGES: gl.constexpr = s_k.shape[0]
    order, taken, items, group, share, together = work
    row_tiles = (queries + 2 * HALF - 1) // (2 * HALF)
    item = gl.program_id(0)
    turn = 0
    done = 0
    while item < items:
        head, place_in_order = head_and_place(item, items, heads, together)
        tile = gl.load(order + place_in_order // share)
        mask_row = tile // row_tiles
        row, start = mask_row + place_in_order % share, tile % row_tiles * (2 * HALF)
        base, steps, full_start, full_end = _steps(bounds, mask_row, start, queries, 2 * HALF, STEP)
        _tell(told, turn, (row, head, mask_row, start, base, steps, full_start, full_end))
        for member in gl.static_range(2):
            mbarrier.wait(q_empty.index(member), (turn & 1) ^ 1)
            mbarrier.expect(q_full.index(member), d_q.block_type.nbytes)
            tma_load(d_q, [row, head, start + member * HALF, 0], q_full.index(member), s_q.index(member))
        key_head = head // group
        for i in range(steps):
            slot, parity = slot_of(done + i, STAGES)
            mbarrier.wait(k_empty.index(slot), parity ^ 1)
            mbarrier.expect(k_full.index(slot), d_k.block_type.nbytes)
            tma_load(d_k, [row, key_head, base + i * STEP, 0], k_full.index(slot), s_k.index(slot))
            mbarrier.wait(v_empty.index(slot), parity ^ 1)
            mbarrier.expect(v_full.index(slot), d_v.block_type.nbytes)
            tma_load(d_v, [row, key_head, base + i * STEP, 0], v_full.index(slot), s_v.index(slot))
        item = gl.num_programs(0) + gl.atomic_add(taken, 1, sem="relaxed")
        turn += 1
        done += steps
    _tell(told, turn, (-1, 0, 0, 0, 0, 0, 0, 0))


@gluon.jit
def _consume(
    MEMBER: gl.constexpr, d_out, lse, s_out, asked, keys, values, told, turns, bounds, queries, heads, scale_log2
):  # fmt: skip
    """Attend with one half of the queries of item after item, and store their output and log-sum-exp."""
    s_q, q_full, q_empty = asked
    HALF: gl.constexpr = s_q.shape[3]
    WIDTH: gl.constexpr = s_q.shape[4]
    s_k, k_full, k_empty = keys
    s_v, v_full, v_empty = values
    STAGES: gl.constexpr = s_k.shape[0]
    STEP: gl.constexpr = s_k.shape[3]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STEP, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    SCORE_ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    OUTPUT_ROWS: gl.constexpr = gl.SliceLayout(1, OUTPUT)
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    s_q_2d = s_q.index(MEMBER).reshape([HALF, WIDTH])
    if MEMBER == 1:
        mbarrier.arrive(turns.index(0), count=1)

    turn = 0
    done = 0
    row, head, mask_row, start, low_first, steps, full_start, full_end = _hear(told, turn)
    while row >= 0:
        base = low_first - done * STEP
        end = done + steps
        full_start = done + gl.maximum(full_start, 1)
        full_end = done + gl.maximum(full_end, 1)
        o_m = start + MEMBER * HALF + gl.arange(0, HALF, layout=SCORE_ROWS)
        m_rows = o_m < queries
        p_first, p_end = _row_of(bounds, mask_row, queries)
        b_first = gl.load(p_first + o_m, mask=m_rows, other=HIDDEN)
        b_end = gl.load(p_end + o_m, mask=m_rows, other=0)
        b_max = gl.full([HALF], float("-inf"), gl.float32, SCORE_ROWS)
        b_sum = gl.zeros([HALF], gl.float32, SCORE_ROWS)
        b_out = gl.zeros([HALF, WIDTH], gl.float32, OUTPUT)

        # The first step has no values before it.
        slot, parity = slot_of(done, STAGES)
        mbarrier.wait(q_full.index(MEMBER), turn & 1)
        mbarrier.wait(k_full.index(slot), parity)
        mbarrier.wait(turns.index(MEMBER), done & 1)
        b_zero = gl.zeros([HALF, STEP], gl.float32, SCORES)
        t_score = warpgroup_mma(
            s_q_2d,
            s_k.index(slot).reshape([STEP, WIDTH]).permute((1, 0)),
            b_zero,
            use_acc=False,
            is_async=True,
        )
        mbarrier.arrive(turns.index(1 - MEMBER), count=1)
        b_score = warpgroup_mma_wait(0, deps=(t_score,))
        mbarrier.arrive(k_empty.index(slot), count=1)
        b_weight, _, b_max, b_sum = _softmax(
            b_score, b_max, b_sum, b_first, b_end, low_first, scale_log2, True, True, STEP, SCORES
        )
        b_weight = b_weight.to(s_v.dtype)

        b_out, b_weight, b_max, b_sum = _attend(
            b_out, b_weight, b_max, b_sum, done + 1, full_start, base, s_q_2d, q_full, turn, keys, values, turns,
            b_first, b_end, scale_log2, MEMBER, True, True,
        )  # fmt: skip
        b_out, b_weight, b_max, b_sum = _attend(
            b_out, b_weight, b_max, b_sum, full_start, full_end, base, s_q_2d, q_full, turn, keys, values, turns,
            b_first, b_end, scale_log2, MEMBER, False, False,
        )  # fmt: skip
        b_out, b_weight, b_max, b_sum = _attend(
            b_out, b_weight, b_max, b_sum, full_end, end, base, s_q_2d, q_full, turn, keys, values, turns,
            b_first, b_end, scale_log2, MEMBER, False, True,
        )  # fmt: skip

        mbarrier.arrive(q_empty.index(MEMBER), count=1)
        slot, parity = slot_of(end - 1, STAGES)
        mbarrier.wait(v_full.index(slot), parity)
        t_out = warpgroup_mma(
            gl.convert_layout(b_weight, WEIGHTS), s_v.index(slot).reshape([STEP, WIDTH]), b_out, is_async=True
        )
        m_empty = b_sum == 0.0
        b_sum = gl.where(m_empty, 1.0, b_sum)
        b_lse = gl.where(m_empty, float("-inf"), (b_max + gl.log2(b_sum)) * LN_2)
        gl.store(lse + (row.to(gl.int64) * heads + head) * queries + o_m, b_lse, mask=m_rows)
        b_out = warpgroup_mma_wait(0, deps=(t_out,))
        mbarrier.arrive(v_empty.index(slot), count=1)
        b_out = b_out * gl.convert_layout(1.0 / b_sum, OUTPUT_ROWS)[:, None]
        tma_store_wait(0)
        s_out.index(MEMBER).reshape([HALF, WIDTH]).store(b_out.to(s_out.dtype))
        fence_async_shared()
        tma_store(d_out, [row, head, start + MEMBER * HALF, 0], s_out.index(MEMBER))
        turn += 1
        done = end
        row, head, mask_row, start, low_first, steps, full_start, full_end = _hear(told, turn)
    tma_store_wait(0)


@gluon.jit
def _attend(
    b_out, b_weight, b_max, b_sum, from_step, to_step, base, s_q, q_full, turn, keys, values, turns, b_first, b_end,
    scale_log2, MEMBER: gl.constexpr, MASK_FIRST: gl.constexpr, MASK_END: gl.constexpr,
):  # fmt: skip
    """Take the steps of keys `[from_step, to_step)`, each with the values of the step before.

    b_weight: of the step before the first, and then of the last; its values are not yet in b_out.
    """
    s_k, k_full, k_empty = keys
    s_v, v_full, v_empty = values
    HALF: gl.constexpr = b_out.shape[0]
    STAGES: gl.constexpr = s_k.shape[0]
    STEP: gl.constexpr = s_k.shape[3]
    WIDTH: gl.constexpr = s_k.shape[4]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STEP, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    for i in range(from_step, to_step):
        slot, parity = slot_of(i, STAGES)
        last_slot, last_parity = slot_of(i - 1, STAGES)
        mbarrier.wait(k_full.index(slot), parity)
        mbarrier.wait(turns.index(MEMBER), i & 1)
        b_zero = gl.zeros([HALF, STEP], gl.float32, SCORES)
        t_score = warpgroup_mma(
            s_q, s_k.index(slot).reshape([STEP, WIDTH]).permute((1, 0)), b_zero, use_acc=False, is_async=True
        )
        mbarrier.wait(v_full.index(last_slot), last_parity)
        t_out = warpgroup_mma(
            gl.convert_layout(b_weight, WEIGHTS),
            s_v.index(last_slot).reshape([STEP, WIDTH]),
            b_out,
            is_async=True,
        )
        mbarrier.arrive(turns.index(1 - MEMBER), count=1)
        b_score = warpgroup_mma_wait(1, deps=(t_score,))
        mbarrier.arrive(k_empty.index(slot), count=1)
        b_weight_32, b_decay, b_max, b_sum = _softmax(
            b_score,
            b_max,
            b_sum,
            b_first,
            b_end,
            base + i * STEP,
            scale_log2,
            MASK_FIRST,
            MASK_END,
            STEP,
            SCORES,
        )
        # Long past, so that it never blocks. NVIDIA's assembler moves no instruction across it: without it the wait
        # below comes before the softmax, which then overlaps nothing.
        mbarrier.wait(q_full.index(MEMBER), turn & 1)
        b_out = warpgroup_mma_wait(0, deps=(t_out,))
        mbarrier.arrive(v_empty.index(last_slot), count=1)
        b_out = b_out * gl.convert_layout(b_decay, gl.SliceLayout(1, OUTPUT))[:, None]
        b_weight = b_weight_32.to(s_v.dtype)
    return b_out, b_weight, b_max, b_sum


@gluon.jit
def _softmax(
    b_score, b_max, b_sum, b_first, b_end, key, scale_log2,
    MASK_FIRST: gl.constexpr, MASK_END: gl.constexpr, STEP: gl.constexpr, SCORES: gl.constexpr,
):  # fmt: skip
    """The weights of the keys from `key`, by how much to shrink the output so far, and the new maximum and sum."""
    if MASK_END:
        o_n = key + gl.arange(0, STEP, layout=gl.SliceLayout(0, SCORES))
        m_visible = o_n[None, :] < b_end[:, None]
        if MASK_FIRST:
            m_visible = m_visible & (o_n[None, :] >= b_first[:, None])
        b_score = gl.where(m_visible, b_score, float("-inf"))
    b_new_max = gl.maximum(b_max, gl.max(b_score, 1) * scale_log2)
    b_shift = b_new_max
    if MASK_END:  # a row that has seen nothing yet has no finite maximum
        b_shift = gl.where(b_new_max == float("-inf"), 0.0, b_new_max)
    b_weight = gl.exp2(b_score * scale_log2 - b_shift[:, None])
    b_decay = gl.exp2(b_max - b_shift)
    b_sum = b_sum * b_decay + gl.sum(b_weight, 1)
    return b_weight, b_decay, b_new_max, b_sum
