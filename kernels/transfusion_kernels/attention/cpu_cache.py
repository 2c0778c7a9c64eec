"""Attention to a paged cache on the CPU: calls of PyTorch's flash attention, planned once for all layers.

Pages that follow each other in memory are read where they are. Rows that see few keys are put together in one call.

Shape suffixes: B batch, H query heads, K key heads, S queries, Q queries of a call, W keys of a call, D head width,
P pages of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from transfusion_kernels.attention.cpu import (
    QUERY_BLOCK,
    flash_forward,
    fold,
    folded_bias,
    unfold,
    windows,
)
from transfusion_kernels.attention.reference import accumulation_dtype

# With fewer elements of keys and values a row, one call for all rows is quicker than one for each.
ELEMENTS_WORTH_A_CALL = 100_000


@dataclass(frozen=True)
class Call:
    """Rows and queries that one call serves.

    Attributes:
        rows: Of the batch.
        queries: Of those rows.
        slots: int64 [rows * W], where their keys are if all pages are laid end to end, or the range where they lie.
        bias: [rows, 1, Q, W], or None where every query sees all keys.
        empty: bool [rows, 1, Q], queries that see nothing, or None.
    """

    rows: slice
    queries: slice
    slots: Tensor | slice
    bias: Tensor | None
    empty: Tensor | None

    def serves(self, batch: int, queries: int) -> bool:
        """Whether it serves all rows and queries."""
        return len(range(*self.rows.indices(batch))) == batch and (
            len(range(*self.queries.indices(queries))) == queries
        )


def lies_end_to_end(cache: Tensor) -> bool:
    """Whether the slots of all pages [pages, K, slots, D] have one stride, so that they can be seen as one row."""
    return cache.shape[0] == 1 or cache.stride(0) == cache.shape[2] * cache.stride(2)


def plan_calls(
    first_key: Tensor, end_key: Tensor, table_BP: Tensor, slots: int, elements_of_key: int, dtype: torch.dtype
) -> tuple[Call, ...]:
    """The calls for valid bounds [B, S] and pages.

    Args:
        first_key: int32 [B, S], where the keys begin that each query sees.
        end_key: Where they end.
        table_BP: int32, the pages of each row.
        slots: Of a page.
        elements_of_key: Of the keys and values of one position.
        dtype: Of the biases.
    """
    batch, queries = first_key.shape
    low_B, high_B = first_key[:, 0].tolist(), end_key[:, -1].tolist()
    widest = max(high - low for low, high in zip(low_B, high_B, strict=True))
    if batch > 1 and queries <= QUERY_BLOCK and elements_of_key * widest < ELEMENTS_WORTH_A_CALL:
        return _one_call(first_key, end_key, table_BP, slots, widest, dtype)
    calls = []
    for row in range(batch):
        here = slice(row, row + 1)
        for window in windows(first_key[here], end_key[here], dtype):
            low, high = window.keys.start, window.keys.stop
            pages = table_BP[row, low // slots : -(-high // slots)].tolist()
            begin = pages[0] * slots + low % slots
            found: Tensor | slice = slice(begin, begin + high - low)
            if pages != list(range(pages[0], pages[0] + len(pages))):
                found = _slots_of(table_BP[row], torch.arange(low, high), slots)
            calls.append(Call(here, window.queries, found, window.bias, window.empty))
    return tuple(calls)


def _one_call(
    first_key: Tensor, end_key: Tensor, table_BP: Tensor, slots: int, widest: int, dtype: torch.dtype
) -> tuple[Call, ...]:
    if widest == 0:
        return ()
    low_B1, high_B1 = first_key[:, :1], end_key[:, -1:]
    # What stands past a row's keys is its last one again, so that nothing is read that it does not see.
    key_BW = torch.minimum(low_B1 + torch.arange(widest), (high_B1 - 1).clamp(min=0))
    place_B1W = (low_B1 + torch.arange(widest))[:, None]
    visible_BSW = (place_B1W >= first_key[..., None]) & (place_B1W < end_key[..., None])
    empty_BS = first_key == end_key
    hidden_BSW = ~(visible_BSW | empty_BS[..., None])
    bias = None
    if bool(hidden_BSW.any()):
        bias = torch.zeros(hidden_BSW.shape, dtype=dtype).masked_fill_(hidden_BSW, float("-inf"))[:, None]
    # Of a row that sees nothing no page may exist.
    table_BP = table_BP.masked_fill((low_B1 == high_B1).expand_as(table_BP), 0)
    found = torch.cat(
        [_slots_of(table_P, key_W, slots) for table_P, key_W in zip(table_BP, key_BW, strict=True)]
    )
    empty = empty_BS[:, None] if bool(empty_BS.any()) else None
    return (Call(slice(None), slice(None), found, bias, empty),)


def _slots_of(table_P: Tensor, key_W: Tensor, slots: int) -> Tensor:
    return table_P[key_W // slots].long() * slots + key_W % slots


def paged_forward(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, calls: tuple[Call, ...], scale: float
) -> tuple[Tensor, Tensor]:
    """The output [B, H, S, D], laid out as [B, S, H, D], and the log-sum-exp [B, H, S], of planned calls.

    The pages of both caches lie end to end.
    """
    batch, heads, size, width = q.shape
    key_heads = k_cache.shape[1]
    # [slots of all pages, K, D]
    keys, values = (cache.transpose(1, 2).flatten(0, 1) for cache in (k_cache, v_cache))
    if len(calls) == 1 and calls[0].serves(batch, size):
        out, lse = _forward(q, keys, values, calls[0], key_heads, scale)
        return out.transpose(1, 2).contiguous().transpose(1, 2), lse
    out = q.new_zeros(batch, size, heads, width).transpose(1, 2)
    lse = q.new_full((batch, heads, size), float("-inf"), dtype=accumulation_dtype(q.dtype))
    for call in calls:
        rows = q[call.rows, :, call.queries]
        out_c, lse_c = _forward(rows, keys, values, call, key_heads, scale)
        out[call.rows, :, call.queries], lse[call.rows, :, call.queries] = out_c, lse_c
    return out, lse


def _forward(
    rows: Tensor, keys: Tensor, values: Tensor, call: Call, key_heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of one call, for its rows and queries."""
    heads = rows.shape[1]
    k, v = (
        (x[call.slots] if isinstance(call.slots, slice) else x.index_select(0, call.slots))
        .unflatten(0, (rows.shape[0], -1))
        .transpose(1, 2)
        for x in (keys, values)
    )
    bias = folded_bias(call.bias, heads // key_heads)
    out, lse = flash_forward(fold(rows, key_heads), k, v, 0.0, False, attn_mask=bias, scale=scale)
    out, lse = unfold(out, heads), unfold(lse[..., None], heads)[..., 0]
    if call.empty is not None:
        out = out.masked_fill(call.empty[..., None], 0.0)
        lse = lse.masked_fill(call.empty, float("-inf"))
    return out, lse
