"""Keys and values of the rows being generated: pages of one memory, written in place, shared by equal beginnings.

Every row has its own length. A forward writes its positions behind that length, and they count only once `advance` is
called. So an image is computed anew at each denoising step over a prefix that is computed once, and stays only in its
final form.

T layers, R rows of one forward, S positions of one forward, P pages of a row, L slots of a page, K key heads, E head
dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from transfusion.inference.captured import CapturedCalls, next_power_of_two
from transfusion.model.attention import Attend
from transfusion_kernels import CachedAttention, IntervalMask, TableAttention

# Slots of a page: rows share beginnings by whole pages, and waste half of one on average.
PAGE_SLOTS = 16
# Tables of captured calls have so many pages, or a power of two above: a short text grows through few shapes.
_LEAST_TABLE = 16


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
        captured: Launches calls over its rows that come again and again. None: each is called.
    """

    def __init__(
        self,
        layers: int,
        pages: int,
        device: torch.device,
        backend: str = "auto",
        captured: CapturedCalls | None = None,
    ) -> None:
        self.device, self.backend, self.captured = device, backend, captured
        # Lowest first, so that the pages of a row tend to lie side by side.
        self._free = list(range(pages - 1, -1, -1))
        self._owners = [0] * pages
        self.layers = layers
        self._storage: Tensor | None = None

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
            if self._storage is not None:
                self._storage[:, :, target] = self._storage[:, :, source]
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

    def view(self, rows: Sequence[Row]) -> CacheRows:
        """Rows as a forward reads and extends them. None may come twice."""
        return CacheRows(self, rows)

    def storage(self, like: Tensor) -> Tensor:
        """Keys and values [T, 2, pages, K, L, E] of all layers, made at first use for keys [..., K, S, E] like these.

        In memory the slots of all pages of a head follow each other, so that the CPU reads pages in a row in one go.
        """
        if self._storage is None:
            shape = (self.layers, 2, like.shape[1], len(self._owners), PAGE_SLOTS, like.shape[3])
            self._storage = like.new_zeros(shape).transpose(2, 3)
        return self._storage

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
        self.cache, self._rows = cache, rows
        self._counts: list[int] = []
        self._attention: CachedAttention | None = None

    @property
    def layers(self) -> list[Attend]:
        """The attention of each layer. Made at each call, for what refers to itself lives on for a while."""
        return [partial(self._attend, layer) for layer in range(self.cache.layers)]

    @property
    def lengths(self) -> list[int]:
        """How many positions of each row count."""
        return [row.length for row in self._rows]

    def mask(self, end_RS: Tensor, counts: Sequence[int]) -> IntervalMask:
        """The mask of S positions behind each row's length, of which the first `counts` are real.

        They see all keys up to `length + end_RS`, so far as these are real.
        """
        self._check_room(counts)
        self._counts, self._attention = list(counts), None
        length_R1 = torch.tensor(self.lengths, device=self.cache.device)[:, None]
        end_key_RS = (length_R1 + end_RS).to(torch.int32)
        most = max(length + count for length, count in zip(self.lengths, counts, strict=True))
        return IntervalMask(torch.zeros_like(end_key_RS), end_key_RS, num_keys=most)

    def packed(self, count: int, rows: int | None = None) -> Tensor:
        """What `FixedRows` takes, int32 [R, 1 + P], for `count` more positions of each row.

        rows: As many as this. Those that are added are the last one once more.
        """
        self._check_room([count] * len(self._rows))
        pages = next_power_of_two(max(_LEAST_TABLE, *(len(row.pages) for row in self._rows)))
        lines = [[row.length, *row.pages, *[0] * (pages - len(row.pages))] for row in self._rows]
        lines += lines[-1:] * ((rows or len(lines)) - len(lines))
        return torch.tensor(lines, dtype=torch.int32).to(self.cache.device, non_blocking=True)

    def advance(self, counts: Sequence[int]) -> None:
        """Let the first positions of the last forward count, for each row as many as given."""
        for row, count in zip(self._rows, counts, strict=True):
            row.length += count

    def _check_room(self, counts: Sequence[int]) -> None:
        for row, count in zip(self._rows, counts, strict=True):
            if row.length + count > row.room:
                raise ValueError(f"{count} positions do not fit after {row.length} in a row of {row.room}")

    def _attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: IntervalMask) -> Tensor:
        """Attention of one layer to the keys of these rows and the new ones, which it writes: an `Attend`."""
        if self._attention is None:
            pages = [row.pages for row in self._rows]
            storage, backend = self.cache.storage(key), self.cache.backend
            self._attention = CachedAttention(
                storage, mask, pages, self.lengths, self._counts, backend=backend
            )
        return self._attention(layer, query, key, value)


class FixedRows:
    """Rows as a tensor has them, for one forward. A captured call over them serves whatever the tensor has later.

    Args:
        cache: Theirs.
        rows_RQ: As `CacheRows.packed` makes it. Padding is as the row that it repeats, and writes the same.
        end_RS: int64, up to where each of S new positions sees, counted from the row's length.
    """

    def __init__(self, cache: PagedCache, rows_RQ: Tensor, end_RS: Tensor) -> None:
        self._cache, self._table_RP = cache, rows_RQ[:, 1:]
        self.length_R1 = rows_RQ[:, :1]
        end_key_RS = (self.length_R1 + end_RS).to(torch.int32)
        keys = self._table_RP.shape[1] * PAGE_SLOTS
        self.mask = IntervalMask(torch.zeros_like(end_key_RS), end_key_RS, num_keys=keys)
        self._attention: TableAttention | None = None

    @property
    def layers(self) -> list[Attend]:
        """As those of `CacheRows`."""
        return [partial(self._attend, layer) for layer in range(self._cache.layers)]

    def _attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: IntervalMask) -> Tensor:
        """Attention of one layer to the keys of these rows and the new ones, which it writes: an `Attend`."""
        if self._attention is None:
            position_RS = self.length_R1 + torch.arange(mask.num_queries, device=key.device)
            self._attention = TableAttention(
                self._cache.storage(key), mask, self._table_RP, position_RS, backend=self._cache.backend
            )
        return self._attention(layer, query, key, value)
