"""Attention to a paged cache on the CPU: calls of PyTorch's flash attention, planned once for all layers.

Pages that follow each other in memory are read where they are. Rows that see few keys are put together in one call.

Shape suffixes: B batch, H query heads, K key heads, S queries, Q queries of a call, W keys of a call, D head width,
P pages of a row, N new positions, T layers, U keys and values of all layers, G slots of all pages for one head and then
the next, M of them that are written.
"""

from __future__ import annotations

from collections.abc import Sequence
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

# With fewer elements of keys and values a row, one call for all rows is quicker than one for each.
ELEMENTS_WORTH_A_CALL = 100_000


@dataclass(frozen=True)
class Strips:
    """Slots that follow each other, a strip for each row. From one strip to the next it is equally far.

    Attributes:
        begin: The first slot, if all pages are laid end to end.
        length: Of a strip.
        rows: How many there are.
        distance: From the beginning of one to that of the next.
    """

    begin: int
    length: int
    rows: int = 1
    distance: int = 0

    def with_row(self, begin: int, length: int) -> Strips | None:
        """These and the strip of one row more, or None where it does not go with them."""
        distance = self.distance if self.rows > 1 else begin - self.begin
        fits = length == self.length and distance >= 0 and begin == self.begin + self.rows * distance
        return Strips(self.begin, length, self.rows + 1, distance) if fits else None

    def view(self, flat_UGD: Tensor, heads: int) -> Tensor:
        """What lies there, [U, rows, K, W, D]."""
        layers, slots, width = flat_UGD.shape
        return flat_UGD.as_strided(
            (layers, self.rows, heads, self.length, width),
            (slots * width, self.distance * width, slots // heads * width, width, 1),
            flat_UGD.storage_offset() + self.begin * width,
        )


@dataclass(frozen=True)
class Call:
    """Rows and queries that one call serves.

    Attributes:
        rows: Of the batch.
        queries: Of those rows.
        slots: int64 [rows, W], where their keys are if all pages are laid end to end, or the strips where they lie.
        bias: [rows, 1, Q, W], or None where every query sees all keys.
        empty: bool [rows, 1, Q], queries that see nothing, or None.
    """

    rows: slice
    queries: slice
    slots: Tensor | Strips
    bias: Tensor | None
    empty: Tensor | None

    def serves(self, batch: int, queries: int) -> bool:
        """Whether it serves all rows and queries."""
        return len(range(*self.rows.indices(batch))) == batch and (
            len(range(*self.queries.indices(queries))) == queries
        )


def lies_end_to_end(kv_cache: Tensor) -> bool:
    """Whether each head's slots of all pages [T, 2, pages, K, slots, D] follow each other, and so do the heads."""
    return kv_cache.transpose(2, 3).is_contiguous()


def padded_table(pages: Sequence[Sequence[int]]) -> Tensor:
    """int32 [B, P], the pages of each row, and page 0 where it has no more."""
    longest = max(map(len, pages))
    table = [[*row, *[0] * (longest - len(row))] for row in pages]
    return torch.tensor(table, dtype=torch.int32).view(len(table), longest)


def plan_calls(
    first_key: Tensor, end_key: Tensor, pages: Sequence[Sequence[int]], k_cache: Tensor, dtype: torch.dtype
) -> tuple[Call, ...]:
    """The calls for valid bounds [B, S].

    Args:
        first_key: int32 [B, S], where the keys begin that each query sees.
        end_key: Where they end.
        pages: Of each row.
        k_cache: Keys of a layer [pages, K, slots, D].
        dtype: Of the biases.

    Raises:
        ValueError: If the bounds reach pages that do not exist.
    """
    batch, queries = first_key.shape
    all_pages, key_heads, slots, width = k_cache.shape
    low_B, high_B = first_key[:, 0].tolist(), end_key[:, -1].tolist()
    _refuse_missing_pages(low_B, high_B, pages, slots, all_pages)
    one_for_all = [queries == 1] * batch
    if 1 < queries <= QUERY_BLOCK:
        one_for_all = ((first_key[:, 0] == first_key[:, -1]) & (end_key[:, 0] == end_key[:, -1])).tolist()
    runs = _runs(low_B, high_B, one_for_all, pages, slots)
    widest = max(high - low for low, high in zip(low_B, high_B, strict=True))
    elements = 2 * batch * key_heads * width * widest
    if len(runs) > 1 and queries <= QUERY_BLOCK and elements < len(runs) * ELEMENTS_WORTH_A_CALL:
        return _one_call(first_key, end_key, padded_table(pages), slots, widest, dtype)
    calls = []
    for rows, strips in runs:
        if strips is not None:
            calls.append(Call(rows, slice(0, queries), strips, None, None))
            continue
        row_pages = pages[rows.start]
        for window in windows(first_key[rows], end_key[rows], dtype):
            low, length = window.keys.start, window.keys.stop - window.keys.start
            begin = _begin(row_pages, low, low + length, slots)
            found: Tensor | Strips
            if begin is None:
                found = _slots_of(padded_table([row_pages]), torch.arange(low, low + length)[None], slots)
            else:
                found = Strips(begin, length)
            calls.append(Call(rows, window.queries, found, window.bias, window.empty))
    return tuple(calls)


def _refuse_missing_pages(
    low_B: list[int], high_B: list[int], pages: Sequence[Sequence[int]], slots: int, all_pages: int
) -> None:
    for low, high, row_pages in zip(low_B, high_B, pages, strict=True):
        if low < high > len(row_pages) * slots:
            raise ValueError(
                f"mask: got end_key {high}, takes what a row has room for, {len(row_pages) * slots}"
            )
        if low < high:
            for page in row_pages[low // slots : -(-high // slots)]:
                if not 0 <= page < all_pages:
                    raise ValueError(f"pages: got page {page}, takes pages from 0 to {all_pages - 1}")


def _runs(
    low_B: list[int], high_B: list[int], one_for_all: list[bool], pages: Sequence[Sequence[int]], slots: int
) -> list[tuple[slice, Strips | None]]:
    """Rows whose queries all see one strip of slots, joined as far as may be, and each other row by itself."""
    runs: list[tuple[slice, Strips | None]] = []
    for row, (low, high) in enumerate(zip(low_B, high_B, strict=True)):
        begin = _begin(pages[row], low, high, slots) if one_for_all[row] and low < high else None
        if begin is None:
            runs.append((slice(row, row + 1), None))
            continue
        rows, strips = runs[-1] if runs else (slice(0, 0), None)
        joined = None if strips is None else strips.with_row(begin, high - low)
        if joined is None:
            runs.append((slice(row, row + 1), Strips(begin, high - low)))
        else:
            runs[-1] = (slice(rows.start, row + 1), joined)
    return runs


def _begin(row_pages: Sequence[int], low: int, high: int, slots: int) -> int | None:
    """Where the keys of a row from `low` on begin if all pages are laid end to end, None if they lie apart."""
    reached = row_pages[low // slots : -(-high // slots)]
    follow = list(reached) == list(range(reached[0], reached[0] + len(reached)))
    return reached[0] * slots + low % slots if follow else None


def _one_call(
    first_key: Tensor, end_key: Tensor, table_BP: Tensor, slots: int, widest: int, dtype: torch.dtype
) -> tuple[Call, ...]:
    if widest == 0:
        return ()
    low_B1, high_B1 = first_key[:, :1], end_key[:, -1:]
    place_BW = low_B1 + torch.arange(widest)
    # What stands past a row's keys is its last one again, so that nothing is read that it does not see.
    key_BW = torch.minimum(place_BW, (high_B1 - 1).clamp(min=0))
    place_B1W = place_BW[:, None]
    visible_BSW = (place_B1W >= first_key[..., None]) & (place_B1W < end_key[..., None])
    empty_BS = first_key == end_key
    hidden_BSW = ~(visible_BSW | empty_BS[..., None])
    bias = None
    if bool(hidden_BSW.any()):
        bias = torch.zeros(hidden_BSW.shape, dtype=dtype).masked_fill_(hidden_BSW, float("-inf"))[:, None]
    # Of a row that sees nothing no page may exist.
    table_BP = table_BP.masked_fill(low_B1 == high_B1, 0)
    empty = empty_BS[:, None] if bool(empty_BS.any()) else None
    return (Call(slice(None), slice(None), _slots_of(table_BP, key_BW, slots), bias, empty),)


def _slots_of(table_BP: Tensor, key_BW: Tensor, slots: int) -> Tensor:
    """int64 [B, W], where keys of each row are if all pages are laid end to end."""
    page_BW = table_BP.gather(1, key_BW // slots).long()
    return page_BW * slots + key_BW % slots


class PagedPlan:
    """What all layers of one forward do alike: where they write, and the calls by which they read.

    Args:
        kv_cache: Keys and values [T, 2, pages, K, slots, D] that lie end to end.
        slot_N: int64, where the new keys and values go if all pages are laid end to end.
        calls: Of `plan_calls`.
        scale: Of the scores.
    """

    def __init__(self, kv_cache: Tensor, slot_N: Tensor, calls: tuple[Call, ...], scale: float) -> None:
        self._calls, self._scale = calls, scale
        heads = kv_cache.shape[3]
        # First the keys of a layer, then its values.
        flat_UGD = kv_cache.transpose(2, 3).flatten(2, 4).flatten(0, 1)
        self._flat = flat_UGD.unbind()
        head_K = torch.arange(heads) * (flat_UGD.shape[1] // heads)
        self._written_M = (slot_N[:, None] + head_K).flatten()
        self._read = [
            call.slots.view(flat_UGD, heads).unbind()
            if isinstance(call.slots, Strips)
            else call.slots[:, None] + head_K[:, None]
            for call in calls
        ]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write the new keys and values of a layer and attend to its cache: [B, H, S, D]."""
        for x_GD, new in zip(self._flat[2 * layer : 2 * layer + 2], (k, v), strict=True):
            x_GD.index_copy_(0, self._written_M, new.transpose(1, 2).flatten(0, 2))
        if len(self._calls) == 1 and self._calls[0].serves(len(q), q.shape[2]):
            return self._answer(0, layer, q)
        out = torch.zeros_like(q)
        for number, call in enumerate(self._calls):
            here = (call.rows, slice(None), call.queries)
            out[here] = self._answer(number, layer, q[here])
        return out

    def _answer(self, number: int, layer: int, rows: Tensor) -> Tensor:
        """The output of a call for its rows and queries."""
        call, read, keys_and_values = self._calls[number], self._read[number], slice(2 * layer, 2 * layer + 2)
        if isinstance(read, Tensor):
            index, shape = read.flatten(), (*read.shape, rows.shape[3])
            k, v = (x_GD.index_select(0, index).view(shape) for x_GD in self._flat[keys_and_values])
        else:
            k, v = read[keys_and_values]
        heads, key_heads = rows.shape[1], k.shape[1]
        bias = folded_bias(call.bias, heads // key_heads)
        out, _ = flash_forward(fold(rows, key_heads), k, v, 0.0, False, attn_mask=bias, scale=self._scale)
        out = unfold(out, heads)
        return out if call.empty is None else out.masked_fill(call.empty[..., None], 0.0)
