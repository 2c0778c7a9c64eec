"""Attention of a few queries to a long cache: keys are split among programs, and their results merged.

A program owns a tile of queries and the query heads that share a key head, packed (query, head) by (query, head) so
that one text row of a group of heads fills a tile, and one part of the keys that the tile sees. What the parts give
is merged by log-sum-exp; where there is one part, it writes the result itself. The cache is static, [B, K, N, D], its
rows taken in order or by a table of one column, or paged: [pages, K, slots, D] and a table of each row's pages.

Names: p_ pointers, b_ blocks of values, o_ offsets, m_ masks. Shapes: M packed rows of a tile, N keys of a step, D
head width padded to a power of two, R = B * S * H rows of the result, P parts. Offsets are 64-bit.
"""

# What a kernel is given has no Python type.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from transfusion_kernels.attention.forward import HIDDEN, LOG2_E, device_of, normalise, weigh
from transfusion_kernels.attention.tiles import Tile, all_registers, multiplies_by_warpgroups, processors

# Below two programs a processor some wait for memory that others could be loading.
PROGRAMS_PER_PROCESSOR = 2
# A part shorter than this costs more to merge than it saves.
MIN_KEYS_OF_A_PART = 256
MAX_PARTS = 64


def decode_forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    first_key: Tensor,
    end_key: Tensor,
    block_table: Tensor | None,
    num_keys: int,
    scale: float,
    num_splits: int,
) -> tuple[Tensor, Tensor]:
    """The output [B, H, S, D] and the float32 log-sum-exp [B, H, S], both laid out as [B, S, H, ...].

    num_keys: the most keys that any row has. num_splits: in how many parts keys are taken; 0 chooses.
    """
    batch, heads, queries, width = q.shape
    key_heads = k_cache.shape[1]
    out = q.new_empty(batch, queries, heads, width)
    lse = q.new_empty(batch, queries, heads, dtype=torch.float32)
    if out.numel() == 0:
        return out.transpose(1, 2), lse.transpose(1, 2)
    padded_width = triton.next_power_of_2(width)
    packed_rows = queries * (heads // key_heads)
    with device_of(q):
        tile = decode_tile(packed_rows, padded_width, q.dtype)
    tiles = triton.cdiv(packed_rows, tile.rows)
    parts = num_splits or parts_for(batch * key_heads * tiles, num_keys, processors(q.device))
    part_out, part_lse = out[None], lse[None]
    if parts > 1:
        part_out = q.new_empty(parts, *out.shape, dtype=torch.float32)
        part_lse = lse.new_empty(parts, *lse.shape)
    with device_of(q):
        _decode_kernel[(batch * key_heads * parts * tiles,)](
            q,
            k_cache,
            v_cache,
            part_out,
            part_lse,
            first_key.contiguous(),
            end_key.contiguous(),
            block_table,
            *q.stride()[:3],
            *k_cache.stride()[:3],
            *v_cache.stride()[:3],
            0 if block_table is None else block_table.stride(0),
            0 if first_key.shape[0] == 1 else queries,
            queries,
            key_heads,
            tiles,
            parts,
            lse.numel(),
            scale * LOG2_E,
            GROUP=heads // key_heads,
            PICKS=block_table is not None and block_table.shape[1] == 1,
            SLOTS=k_cache.shape[2] if block_table is not None and block_table.shape[1] > 1 else 0,
            WIDTH=width,
            PADDED_WIDTH=padded_width,
            BLOCK_M=tile.rows,
            BLOCK_N=tile.step,
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=True,
            **_register_limit(tile, padded_width),
        )
        if parts > 1:
            _merge_kernel[(lse.numel(),)](
                part_out,
                part_lse,
                out,
                lse,
                parts,
                lse.numel(),
                PADDED_PARTS=triton.next_power_of_2(parts),
                WIDTH=width,
                PADDED_WIDTH=padded_width,
                num_warps=4,
            )
    return out.transpose(1, 2), lse.transpose(1, 2)


def decode_tile(packed_rows: int, padded_width: int, dtype: torch.dtype) -> Tile:
    """As many rows as there are, from 16, the least of a tensor core's product, to what registers hold."""
    if dtype == torch.float32:  # in IEEE arithmetic no tensor core multiplies it
        return Tile(rows=16, step=32, warps=8, stages=2)
    rows = min(max(triton.next_power_of_2(packed_rows), 16), 64)
    # On Hopper eight warps would compute the 64 rows twice. Elsewhere, and in wider heads, four would spill.
    few_suffice = padded_width < 128 or (padded_width == 128 and multiplies_by_warpgroups())
    return Tile(
        rows,
        step=32 if padded_width > 128 else 64,
        warps=4 if rows < 64 or few_suffice else 8,
        stages=2,
    )


def _register_limit(tile: Tile, padded_width: int) -> dict[str, int]:
    """Four warps with all the registers that there are still fit twice, which is what `parts_for` counts on; eight do
    not, and those for the widest heads would not with fewer either.
    """
    return all_registers(tile.warps) if tile.warps == 4 or padded_width > 128 else {}


def parts_for(programs: int, num_keys: int, processors: int) -> int:
    """How many parts to take the keys in, given how many programs one part makes: from sizes that the host knows."""
    wanted = triton.cdiv(PROGRAMS_PER_PROCESSOR * processors, programs)
    return max(1, min(wanted, num_keys // MIN_KEYS_OF_A_PART, MAX_PARTS)) if programs < processors else 1


# Lengths and counts change from step to step of a generation, and must compile nothing anew.
@triton.jit(
    do_not_specialize=[
        "stride_table",
        "stride_bounds",
        "queries",
        "key_heads",
        "tiles",
        "parts",
        "result_rows",
    ]
)
def _decode_kernel(
    q,
    k,
    v,
    part_out,
    part_lse,
    first_key,
    end_key,
    table,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_table,
    stride_bounds,
    queries,
    key_heads,
    tiles,
    parts,
    result_rows,
    scale_log2,
    GROUP: tl.constexpr,
    PICKS: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """PICKS: whether the table has one column, and says which row of a static cache is read. SLOTS: of a page, 0 where
    the cache has none."""
    # Tiles vary fastest: those that read the same keys run beside each other.
    program = tl.program_id(0)
    start = (program % tiles) * BLOCK_M
    program = program // tiles
    part = (program % parts).to(tl.int64)
    program = program // parts
    key_head = (program % key_heads).to(tl.int64)
    row = (program // key_heads).to(tl.int64)

    # [M]
    o_m = start + tl.arange(0, BLOCK_M)
    m_m = o_m < queries * GROUP
    o_query = o_m // GROUP
    o_head = key_head * GROUP + o_m % GROUP
    p_first = first_key + row * stride_bounds
    p_end = end_key + row * stride_bounds
    b_first = tl.load(p_first + o_query, mask=m_m, other=HIDDEN)
    b_end = tl.load(p_end + o_query, mask=m_m, other=0)
    # The bounds never decrease along a row: those of the first and last query are the extremes.
    first_query = start // GROUP
    last_query = (tl.minimum(start + BLOCK_M, queries * GROUP) - 1) // GROUP
    low_first, high_first = tl.load(p_first + first_query), tl.load(p_first + last_query)
    low_end, high_end = tl.load(p_end + first_query), tl.load(p_end + last_query)

    # This part's keys: whole steps, as many for each part.
    keys_of_part = tl.cdiv(tl.cdiv(tl.maximum(high_end - low_first, 0), BLOCK_N), parts) * BLOCK_N
    begin = low_first + part.to(tl.int32) * keys_of_part
    stop = tl.minimum(begin + keys_of_part, high_end)
    # The steps among them that every row sees all of.
    full_begin = tl.minimum(begin + tl.cdiv(tl.maximum(high_first - begin, 0), BLOCK_N) * BLOCK_N, stop)
    full_stop = tl.minimum(begin + tl.maximum(low_end - begin, 0) // BLOCK_N * BLOCK_N, stop)
    full_stop = tl.maximum(full_begin, full_stop)

    # [M, D]
    o_d = tl.arange(0, PADDED_WIDTH)
    m_d = o_d < WIDTH
    p_q = q + row * stride_qb + o_head * stride_qh + o_query.to(tl.int64) * stride_qs
    b_q = tl.load(p_q[:, None] + o_d[None, :], mask=m_m[:, None] & m_d[None, :], other=0.0)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_out = tl.zeros([BLOCK_M, PADDED_WIDTH], tl.float32)
    p_k, p_v = k + key_head * stride_kh, v + key_head * stride_vh
    p_table = table
    if SLOTS:
        p_table += row * stride_table
    else:
        cache_row = row
        if PICKS:
            cache_row = tl.load(table + row * stride_table).to(tl.int64)
        p_k += cache_row * stride_kb
        p_v += cache_row * stride_vb
    b_out, b_sum, b_max = _attend(
        b_out, b_sum, b_max, b_q, p_k, p_v, p_table, stride_kb, stride_ks, stride_vb, stride_vs, begin, full_begin,
        stop, b_first, b_end, scale_log2, True, SLOTS, WIDTH, PADDED_WIDTH, BLOCK_N,
    )  # fmt: skip
    b_out, b_sum, b_max = _attend(
        b_out, b_sum, b_max, b_q, p_k, p_v, p_table, stride_kb, stride_ks, stride_vb, stride_vs, full_begin,
        full_stop, stop, b_first, b_end, scale_log2, False, SLOTS, WIDTH, PADDED_WIDTH, BLOCK_N,
    )  # fmt: skip
    b_out, b_sum, b_max = _attend(
        b_out, b_sum, b_max, b_q, p_k, p_v, p_table, stride_kb, stride_ks, stride_vb, stride_vs, full_stop, stop,
        stop, b_first, b_end, scale_log2, True, SLOTS, WIDTH, PADDED_WIDTH, BLOCK_N,
    )  # fmt: skip

    b_out, b_lse = normalise(b_out, b_sum, b_max)
    o_result = part * result_rows + (row * queries + o_query) * (key_heads * GROUP) + o_head
    tl.store(part_lse + o_result, b_lse, mask=m_m)
    tl.store(
        part_out + o_result[:, None] * WIDTH + o_d[None, :],
        b_out.to(part_out.dtype.element_ty),
        mask=m_m[:, None] & m_d[None, :],
    )


@triton.jit
def _load_cached(
    p_x, p_table, stride_page, stride_slot, start, stop,
    SLOTS: tl.constexpr, WIDTH: tl.constexpr, PADDED_WIDTH: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """[N, D] keys or values from `start`; 0 from `stop` on, so that what no query sees is not read."""
    o_n = start + tl.arange(0, BLOCK_N)
    m_n = o_n < stop
    o_d = tl.arange(0, PADDED_WIDTH)
    if SLOTS:
        b_page = tl.load(p_table + o_n // SLOTS, mask=m_n, other=0).to(tl.int64)
        o_x = b_page * stride_page + (o_n % SLOTS).to(tl.int64) * stride_slot
    else:
        o_x = o_n.to(tl.int64) * stride_slot
    return tl.load(p_x + o_x[:, None] + o_d[None, :], mask=m_n[:, None] & (o_d < WIDTH)[None, :], other=0.0)


@triton.jit
def _attend(
    b_out,
    b_sum,
    b_max,
    b_q,
    p_k,
    p_v,
    p_table,
    stride_kb,
    stride_ks,
    stride_vb,
    stride_vs,
    start,
    end,
    stop,
    b_first,
    b_end,
    scale_log2,
    MASKED: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add the keys `[start, end)` to the output, sum and maximum of a tile."""
    for n in tl.range(start, end, BLOCK_N):
        b_k = _load_cached(p_k, p_table, stride_kb, stride_ks, n, stop, SLOTS, WIDTH, PADDED_WIDTH, BLOCK_N)
        # [M, N]
        b_score = tl.dot(b_q, b_k.T, input_precision="ieee")
        if MASKED:
            o_n = n + tl.arange(0, BLOCK_N)
            m_visible = (o_n[None, :] >= b_first[:, None]) & (o_n[None, :] < b_end[:, None])
            b_score = tl.where(m_visible, b_score, float("-inf"))
        b_weight, b_decay, b_sum, b_max = weigh(b_score, b_sum, b_max, scale_log2, MASKED)
        b_v = _load_cached(p_v, p_table, stride_vb, stride_vs, n, stop, SLOTS, WIDTH, PADDED_WIDTH, BLOCK_N)
        b_out = tl.dot(b_weight.to(b_v.dtype), b_v, b_out * b_decay[:, None], input_precision="ieee")
    return b_out, b_sum, b_max


@triton.jit(do_not_specialize=["parts", "result_rows"])
def _merge_kernel(
    part_out,
    part_lse,
    out,
    lse,
    parts,
    result_rows,
    PADDED_PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
):
    """One row of the result from those of all parts, each weighted by the sum of its exponentials."""
    result_row = tl.program_id(0).to(tl.int64)
    # [P]
    o_part = tl.arange(0, PADDED_PARTS)
    o_result = o_part.to(tl.int64) * result_rows + result_row
    b_lse = tl.load(part_lse + o_result, mask=o_part < parts, other=float("-inf"))
    highest = tl.max(b_lse, 0)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    b_weight = tl.exp(b_lse - shift)
    total = tl.sum(b_weight, 0)
    divisor = tl.where(total == 0.0, 1.0, total)
    # [P, D]; a part that saw nothing need not be read
    o_d = tl.arange(0, PADDED_WIDTH)
    m_part = (b_weight > 0.0)[:, None] & (o_d < WIDTH)[None, :]
    b_part = tl.load(part_out + o_result[:, None] * WIDTH + o_d[None, :], mask=m_part, other=0.0)
    b_out = tl.sum(b_part * b_weight[:, None], 0) / divisor
    tl.store(out + result_row * WIDTH + o_d, b_out.to(out.dtype.element_ty), mask=o_d < WIDTH)
    tl.store(lse + result_row, tl.where(total == 0.0, float("-inf"), shift + tl.log(divisor)))
