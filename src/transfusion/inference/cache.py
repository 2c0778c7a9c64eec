"""Keys and values of the rows being generated: allocated once, written in place.

Every row has its own length. A forward writes its positions behind that length, and they count only once
`advance` is called: so an image block is computed anew at each denoising step over a prefix that is computed
once, and stays only in its final form.

B rows of the cache, R rows of one forward, L slots a row, S positions of one forward, K key heads, E head
dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from transfusion.model.attention import WHOLE_ROWS, Attend
from transfusion_kernels import IntervalMask


class KeyValueCache:
    """The cache of all layers. Lengths are host integers, so that nothing here waits for the device.

    Storage takes the type of the first keys written.
    """

    def __init__(
        self, layers: int, rows: int, max_length: int, device: torch.device, attend: Attend = WHOLE_ROWS
    ) -> None:
        """attend: carries out the attention to the keys of a row, once they are together."""
        self.max_length, self.attend = max_length, attend
        self.lengths = [0] * rows
        self.device = device
        self._storage: list[tuple[Tensor, Tensor] | None] = [None] * layers

    @staticmethod
    def gathered(parts: Sequence[tuple[KeyValueCache, Sequence[int]]], max_length: int) -> KeyValueCache:
        """A cache of its own that starts as copies of the given rows, cache after cache.

        max_length: its room, at least the longest of those rows. A row may be given more than once.
        """
        first = parts[0][0]
        lengths = [cache.lengths[row] for cache, rows in parts for row in rows]
        gathered = KeyValueCache(len(first._storage), len(lengths), max_length, first.device, first.attend)
        gathered.lengths = lengths
        row_tensors = [torch.tensor(rows, device=first.device) for _, rows in parts]
        for layer in range(len(first._storage)):
            for which in range(2):
                start = 0
                for (cache, rows), row_R in zip(parts, row_tensors, strict=True):
                    kept = min(cache.max_length, max_length)
                    old_RLKE = cache._written(layer)[which][:, :kept][row_R]
                    new_BLKE = gathered.storage(layer, old_RLKE)[which]
                    new_BLKE[start : start + len(rows), :kept] = old_RLKE
                    start += len(rows)
        return gathered

    def view(self, rows: Sequence[int] | None = None) -> CacheRows:
        """The given rows, all of them by default, as a forward reads and extends them."""
        return CacheRows(self, list(range(len(self.lengths)) if rows is None else rows))

    def storage(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, L, K, E] of a layer, made at first use for keys [..., K, E] like the given."""
        pair = self._storage[layer]
        if pair is None:
            shape = (len(self.lengths), self.max_length, *like.shape[-2:])
            # Zeros, not empty memory: a hidden key is multiplied by weight 0 and must be finite.
            pair = self._storage[layer] = (like.new_zeros(shape), like.new_zeros(shape))
        return pair

    def _written(self, layer: int) -> tuple[Tensor, Tensor]:
        pair = self._storage[layer]
        if pair is None:
            raise ValueError("the cache is empty: no forward has written the rows to be copied")
        return pair


class CacheRows:
    """Rows of a cache for one forward after another; `layers` is what the model's `run_blocks` takes."""

    def __init__(self, cache: KeyValueCache, rows: list[int]) -> None:
        self._cache = cache
        self._rows = rows
        # Where a forward takes every row, the storage itself is read; else the rows are gathered from it.
        whole = rows == list(range(len(cache.lengths)))
        self._row_R = None if whole else torch.tensor(rows, device=cache.device)
        self._slot_N: Tensor | None = None
        self.layers: list[Attend] = [partial(self._attend, layer) for layer in range(len(cache._storage))]

    @property
    def lengths(self) -> list[int]:
        """How many positions of each row count."""
        return [self._cache.lengths[row] for row in self._rows]

    def mask(self, end_RS: Tensor) -> IntervalMask:
        """The mask of S positions behind each row's length, seeing all keys up to `length + end_RS`."""
        length_R1 = torch.tensor(self.lengths, device=self._cache.device)[:, None]
        end_key_RS = (length_R1 + end_RS).to(torch.int32)
        return IntervalMask(torch.zeros_like(end_key_RS), end_key_RS, num_keys=self._cache.max_length)

    def advance(self, counts: Sequence[int]) -> None:
        """Let the first positions of the last forward count, for each row as many as given."""
        for row, count in zip(self._rows, counts, strict=True):
            self._cache.lengths[row] += count
        self._slot_N = None

    def write(self, layer: int, key_RKSE: Tensor, value_RKSE: Tensor) -> tuple[Tensor, Tensor]:
        """Write behind each row's length; returns all keys and values of these rows, [R, K, L, E]."""
        key_RSKE, value_RSKE = key_RKSE.transpose(1, 2), value_RKSE.transpose(1, 2)
        slot_N = self._slots(key_RSKE.shape[1])
        storage = self._cache.storage(layer, key_RSKE)
        results = []
        for stored_BLKE, new_RSKE in zip(storage, (key_RSKE, value_RSKE), strict=True):
            stored_BLKE.flatten(0, 1).index_copy_(0, slot_N, new_RSKE.flatten(0, 1))
            rows_RLKE = stored_BLKE if self._row_R is None else stored_BLKE[self._row_R]
            results.append(rows_RLKE.transpose(1, 2))
        return results[0], results[1]

    def _attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: IntervalMask) -> Tensor:
        """Attention of one layer to the keys of these rows and the new ones, which it writes: an `Attend`."""
        return self._cache.attend(query, *self.write(layer, key, value), mask)

    def _slots(self, count: int) -> Tensor:
        """Where the next `count` positions of each row go: int64 [R * count] into [B * L]."""
        if self._slot_N is None or len(self._slot_N) != len(self._rows) * count:
            room = self._cache.max_length
            if max(self.lengths) + count > room:
                raise ValueError(f"{count} positions do not fit after {max(self.lengths)} in rows of {room}")
            starts = [row * room + length for row, length in zip(self._rows, self.lengths, strict=True)]
            start_R1 = torch.tensor(starts, device=self._cache.device)[:, None]
            self._slot_N = (start_R1 + torch.arange(count, device=self._cache.device)).flatten()
        return self._slot_N
