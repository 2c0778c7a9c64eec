"""Keys and values of the rows being generated: pages of one memory, written in place, shared by equal beginnings.

Every row has its own length. A forward writes its positions behind that length, and they count only once `advance` is
called. So an image is computed anew at each denoising step over a prefix that is computed once, and stays only in its
final form.

R rows of one forward, S positions of one forward, P pages of a row, L slots of a page, K key heads, E head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from transfusion.model.attention import Attend
from transfusion_kernels import IntervalMask, append_to_kvcache, interval_attention_with_kvcache

# Slots of a page: rows share beginnings by whole pages, and waste half of one on average.
PAGE_SLOTS = 16


def pages_for(positions: int) -> int:
    """How many pages hold so many positions."""
    return -(-positions // PAGE_SLOTS)


@dataclass(eq=False, slots=True)
class Row:
    """One sequence of a cache.

    Attributes:
        pages: Where its positions are: position n in slot `n % PAGE_SLOTS` of page `pages[n // PAGE_SLOTS]`.
        length: How many positions count.
    """

    pages: list[int] = field(default_factory=list)
    length: int = 0

    @property
    def room(self) -> int:
        """How many positions its pages hold."""
        return len(self.pages) * PAGE_SLOTS


class PagedCache:
    """The memory of all layers. Pages and lengths are host integers, so that nothing here waits for the device.

    Args:
        layers: Of the model.
        pages: How many there are. Memory is taken at the first write, in the type of the keys written.
        device: Where the model is.
        backend: The implementation of attention to a cache, as `interval_attention_with_kvcache` takes it.
    """

    def __init__(self, layers: int, pages: int, device: torch.device, backend: str = "auto") -> None:
        self.device, self.backend = device, backend
        # Lowest first, so that the pages of a row tend to lie side by side.
        self._free = list(range(pages - 1, -1, -1))
        self._owners = [0] * pages
        self._storage: list[tuple[Tensor, Tensor] | None] = [None] * layers

    @property
    def free_pages(self) -> int:
        """How many pages no row has."""
        return len(self._free)

    def row(self, positions: int) -> Row:
        """An empty row with room for so many positions. There must be as many free pages."""
        row = Row()
        self._grow(row, positions)
        return row

    def fork(self, row: Row, positions: int, length: int | None = None) -> Row:
        """A row that begins as the first `length` positions of another, all of them unless given.

        It shares the full pages, and has a copy of the last one. `positions`: what it has room for, at least its
        length.
        """
        length = row.length if length is None else length
        shared = length // PAGE_SLOTS
        forked = Row(row.pages[:shared], length)
        for page in forked.pages:
            self._owners[page] += 1
        self._grow(forked, positions)
        if length % PAGE_SLOTS:
            source, target = row.pages[shared], forked.pages[shared]
            for pair in self._storage:
                for stored_PLKE in pair or ():
                    stored_PLKE[target] = stored_PLKE[source]
        return forked

    def release(self, row: Row) -> None:
        """Give back the pages of a row that is not read any more."""
        for page in reversed(row.pages):
            self._owners[page] -= 1
            if self._owners[page] == 0:
                self._free.append(page)
        if row.pages:
            self._free.sort(reverse=True)
        row.pages, row.length = [], 0

    def copy(self, source: Row, target: Row) -> None:
        """Let a row with pages of its own, and room enough, begin as another."""
        pages = pages_for(source.length)
        for pair in self._storage:
            for stored_PLKE in pair or ():
                stored_PLKE[target.pages[:pages]] = stored_PLKE[source.pages[:pages]]
        target.length = source.length

    def view(self, rows: Sequence[Row]) -> CacheRows:
        """Rows as a forward reads and extends them. None may come twice."""
        return CacheRows(self, rows)

    def storage(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [pages, K, L, E] of a layer, made at first use for keys [..., K, S, E] like the given.

        In memory the slots of pages in a row follow each other, so that the CPU reads those without a copy.
        """
        pair = self._storage[layer]
        if pair is None:
            shape = (len(self._owners), PAGE_SLOTS, like.shape[1], like.shape[3])
            pair = self._storage[layer] = (like.new_zeros(shape), like.new_zeros(shape))
        return pair[0].transpose(1, 2), pair[1].transpose(1, 2)

    def _grow(self, row: Row, positions: int) -> None:
        wanted = pages_for(positions) - len(row.pages)
        if wanted > len(self._free):
            raise ValueError(f"the cache has {len(self._free)} free pages, {wanted} are asked for")
        for _ in range(wanted):
            page = self._free.pop()
            self._owners[page] = 1
            row.pages.append(page)


class CacheRows:
    """Rows of a cache for one forward after another; `layers` is what the model's `run_blocks` takes."""

    def __init__(self, cache: PagedCache, rows: Sequence[Row]) -> None:
        self._cache, self._rows = cache, rows
        most = max(len(row.pages) for row in rows)
        table = [row.pages + [0] * (most - len(row.pages)) for row in rows]
        self._table_RP = torch.tensor(table, dtype=torch.int32, device=cache.device).view(len(rows), most)
        self._position, self._table = self._table_RP, self._table_RP
        self._real_N: Tensor | None = None
        self.layers: list[Attend] = [partial(self._attend, layer) for layer in range(len(cache._storage))]

    @property
    def lengths(self) -> list[int]:
        """How many positions of each row count."""
        return [row.length for row in self._rows]

    def mask(self, end_RS: Tensor, counts: Sequence[int]) -> IntervalMask:
        """The mask of S positions behind each row's length, of which the first `counts` are real.

        They see all keys up to `length + end_RS`, so far as these are real.
        """
        for row, count in zip(self._rows, counts, strict=True):
            if row.length + count > row.room:
                raise ValueError(f"{count} positions do not fit after {row.length} in a row of {row.room}")
        lengths, size = self.lengths, end_RS.shape[1]
        length_R1 = torch.tensor(lengths, device=self._cache.device)[:, None]
        position_RS = length_R1 + torch.arange(size, device=self._cache.device)
        self._real_N = None
        self._position, self._table = position_RS, self._table_RP
        if min(counts) < size:
            # Padding is not written: each position goes by itself, with the table of its row.
            real = [row * size + place for row, count in enumerate(counts) for place in range(count)]
            self._real_N = torch.tensor(real, device=self._cache.device)
            self._position = position_RS.flatten()[self._real_N][:, None]
            self._table = self._table_RP[self._real_N // size]
        end_key_RS = (length_R1 + end_RS).to(torch.int32)
        most = max(length + count for length, count in zip(lengths, counts, strict=True))
        return IntervalMask(torch.zeros_like(end_key_RS), end_key_RS, num_keys=most)

    def advance(self, counts: Sequence[int]) -> None:
        """Let the first positions of the last forward count, for each row as many as given."""
        for row, count in zip(self._rows, counts, strict=True):
            row.length += count

    def _attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: IntervalMask) -> Tensor:
        """Attention of one layer to the keys of these rows and the new ones, which it writes: an `Attend`."""
        keys, values = self._cache.storage(layer, key)
        if self._real_N is not None:
            key, value = (
                x.transpose(1, 2).flatten(0, 1).index_select(0, self._real_N)[:, :, None]
                for x in (key, value)
            )
        append_to_kvcache(key, value, keys, values, self._position, block_table=self._table)
        attended = interval_attention_with_kvcache(
            query, keys, values, mask, block_table=self._table_RP, backend=self._cache.backend
        )
        assert isinstance(attended, Tensor)  # not a pair: the log-sum-exp is not asked for
        return attended
