"""What a mask is made of and what kernels derive from it, each in one launch on a GPU, where launches are what costs.

`layout.IntervalMask` calls these for masks on a GPU; in operations of PyTorch the same take some thirty launches. Each
kernel gives what those operations give, to the bit.

Names: p_ pointers, b_ blocks of values, o_ offsets, m_ masks. Shape suffixes as in `layout`.
"""

# What a kernel is given has no Python type.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from transfusion_kernels.attention.rows import device_of

_BLOCK = 256
_BLOCK_OF_TILES = 16


def bounds_from_spans(
    document_start: Tensor, image_end: Tensor, length: Tensor | None
) -> tuple[Tensor, Tensor]:
    """first_key and end_key, int32 [B, S], of `IntervalMask.from_spans`."""
    rows, positions = document_start.shape
    first_key, end_key = document_start.new_empty(2, rows, positions, dtype=torch.int32).unbind()
    blocks = triton.cdiv(positions, _BLOCK)
    if first_key.numel():
        with device_of(document_start):
            _bounds_kernel[(rows * blocks,)](
                document_start.contiguous(), image_end.contiguous(),
                None if length is None else length.contiguous(), first_key, end_key, positions,
                HAS_LENGTH=length is not None, BLOCK=_BLOCK,
            )  # fmt: skip
    return first_key, end_key


def columns(first_key: Tensor, end_key: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """first_query and end_query, int32 [B, N], of bounds [B, S]."""
    rows, queries = first_key.shape
    first_query, end_query = first_key.new_empty(2, rows, num_keys).unbind()
    if first_query.numel():
        with device_of(first_key):
            _columns_kernel[(rows * triton.cdiv(num_keys, _BLOCK),)](
                first_key.contiguous(), end_key.contiguous(), first_query, end_query, queries, num_keys,
                queries.bit_length(), BLOCK=_BLOCK,
            )  # fmt: skip
    return first_query, end_query


def longest_first(first: Tensor, end: Tensor, tile_rows: int) -> Tensor:
    """int32 [B * T]: `row * T + tile` for the tiles of intervals [B, S], widest union first, then in their order."""
    rows, positions = first.shape
    tiles = triton.cdiv(positions, tile_rows)
    order = first.new_empty(rows * tiles)
    if order.numel():
        with device_of(first):
            _order_kernel[(triton.cdiv(rows * tiles, _BLOCK_OF_TILES),)](
                first.contiguous(), end.contiguous(), order, positions, tiles, rows * tiles,
                TILE_ROWS=tile_rows, BLOCK=_BLOCK_OF_TILES, STEP=_BLOCK,
            )  # fmt: skip
    return order


@triton.jit(do_not_specialize=["positions"])
def _bounds_kernel(
    document_start, image_end, length, first_key, end_key, positions,
    HAS_LENGTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(positions, BLOCK)
    row = tl.program_id(0) // blocks
    o_s = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    m_s = o_s < positions
    o_row = row.to(tl.int64) * positions + o_s
    b_first = tl.load(document_start + o_row, mask=m_s, other=0).to(tl.int32)
    b_end = tl.maximum(o_s + 1, tl.load(image_end + o_row, mask=m_s, other=0).to(tl.int32))
    if HAS_LENGTH:
        real = tl.load(length + row).to(tl.int32)
        b_first = tl.where(o_s < real, b_first, real)
        b_end = tl.where(o_s < real, b_end, real)
    tl.store(first_key + o_row, b_first, mask=m_s)
    tl.store(end_key + o_row, b_end, mask=m_s)


@triton.jit(do_not_specialize=["queries", "keys", "halvings"])
def _columns_kernel(
    first_key, end_key, first_query, end_query, queries, keys, halvings, BLOCK: tl.constexpr
):  # fmt: skip
    blocks = tl.cdiv(keys, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    o_n = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    # Bounds never decrease: the first query that sees a key is the first whose end passes it, and the queries that see
    # it stop where starts pass it.
    b_first = _how_many_up_to(end_key + row * queries, o_n, queries, halvings)
    b_end = _how_many_up_to(first_key + row * queries, o_n, queries, halvings)
    tl.store(first_query + row * keys + o_n, b_first, mask=o_n < keys)
    tl.store(end_query + row * keys + o_n, tl.maximum(b_first, b_end), mask=o_n < keys)


@triton.jit
def _how_many_up_to(p_sorted, b_value, size, halvings):
    """How many of `size` sorted numbers are not greater than each value, by halving what is left of them."""
    b_low = tl.zeros_like(b_value)
    b_high = b_low + size
    for _ in range(halvings):
        b_middle = (b_low + b_high) // 2
        m_open = b_low < b_high
        m_not_greater = tl.load(p_sorted + b_middle, mask=m_open, other=0) <= b_value
        b_low = tl.where(m_open & m_not_greater, b_middle + 1, b_low)
        b_high = tl.where(m_open & ~m_not_greater, b_middle, b_high)
    return b_low


@triton.jit(do_not_specialize=["positions", "tiles", "count"])
def _order_kernel(
    first, end, order, positions, tiles, count,
    TILE_ROWS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Each tile is written to its rank: how many are wider, or as wide and stand before it."""
    o_tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_width = _widths(first, end, o_tile, positions, tiles, count, TILE_ROWS)
    b_rank = tl.zeros([BLOCK], tl.int32)
    for start in range(0, count, STEP):
        o_other = start + tl.arange(0, STEP)
        b_other = _widths(first, end, o_other, positions, tiles, count, TILE_ROWS)
        m_as_wide = b_other[None, :] == b_width[:, None]
        m_before = (b_other[None, :] > b_width[:, None]) | (m_as_wide & (o_other[None, :] < o_tile[:, None]))
        b_rank += tl.sum((m_before & (o_other < count)[None, :]).to(tl.int32), 1)
    tl.store(order + b_rank, o_tile, mask=o_tile < count)


@triton.jit
def _widths(first, end, o_tile, positions, tiles, count, TILE_ROWS: tl.constexpr):
    o_row = (o_tile // tiles).to(tl.int64) * positions
    o_start = (o_tile % tiles) * TILE_ROWS
    o_last = tl.minimum(o_start + TILE_ROWS, positions) - 1
    m_tile = o_tile < count
    return tl.load(end + o_row + o_last, mask=m_tile, other=0) - tl.load(
        first + o_row + o_start, mask=m_tile, other=0
    )
