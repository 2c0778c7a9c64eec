"""Attention of all layers of one forward to their paged caches, which it writes to.

Shape suffixes: T layers, B batch, H query heads, K key heads, S queries, D head width, P pages of a row, N real
positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from transfusion_kernels.attention.checks import (
    check_keys_and_values,
    check_mask,
    check_queries,
    checked_scale,
    refuse_gradients,
)
from transfusion_kernels.attention.cpu_cache import PagedPlan, lies_end_to_end, padded_table, plan_calls
from transfusion_kernels.attention.kvcache import append_to_kvcache, interval_attention_with_kvcache
from transfusion_kernels.attention.layout import IntervalMask, validate_bounds
from transfusion_kernels.attention.reference import accumulation_dtype
from transfusion_kernels.dispatch import choose_for_cache


class TableAttention:
    """In each layer of one forward, `append_to_kvcache` and then `interval_attention_with_kvcache`.

    All that says where keys are is in tensors, so a CUDA graph of such a forward serves whatever they hold later.

    Args:
        kv_cache: Keys and values [T, 2, pages, K, slots, D] of all layers.
        mask: Over S new queries of each row, the same in all layers.
        table_BP: int32, the pages of each row.
        positions: int32 or int64 [B, S], where in their rows the new keys go.
        backend: As `interval_attention_with_kvcache` takes it.
        write_table: As `table_BP`, of the rows of what is written, if those are others. `positions` are in them.
    """

    def __init__(
        self,
        kv_cache: Tensor,
        mask: IntervalMask,
        table_BP: Tensor,
        positions: Tensor,
        *,
        backend: str = "auto",
        write_table: Tensor | None = None,
    ) -> None:
        self._kv_cache, self._mask, self._backend = kv_cache, mask, backend
        self._table_BP, self._positions = table_BP, positions
        self._write_table = table_BP if write_table is None else write_table

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `CachedAttention.__call__`. k and v: of the rows that are written."""
        k_cache, v_cache = self._kv_cache[layer]
        append_to_kvcache(k, v, k_cache, v_cache, self._positions, block_table=self._write_table)
        attended = interval_attention_with_kvcache(
            q, k_cache, v_cache, self._mask, block_table=self._table_BP, backend=self._backend
        )
        assert isinstance(attended, Tensor)  # not a pair: the log-sum-exp is not asked for
        return attended


class CachedAttention:
    """What `TableAttention` does, for rows that the host knows.

    On a CPU what the layers have in common is checked and looked up once, by the first of them.

    Args:
        kv_cache: Keys and values [T, 2, pages, K, slots, D] of all layers. A CPU is quickest where it is a view of a
            contiguous [T, 2, K, pages, slots, D].
        mask: Over S new queries of each row, the same in all layers.
        pages: Of each row. Key n is in slot `n % slots` of page `pages[n // slots]`.
        lengths: How many keys each row has. The new ones go behind them, where it has room.
        counts: How many of the S new positions of each row are real. The others are padding, and not written.
        backend: As `interval_attention_with_kvcache` takes it.
    """

    def __init__(
        self,
        kv_cache: Tensor,
        mask: IntervalMask,
        pages: Sequence[Sequence[int]],
        lengths: Sequence[int],
        counts: Sequence[int],
        *,
        backend: str = "auto",
    ) -> None:
        self._kv_cache, self._mask, self._backend = kv_cache, mask, backend
        self._pages, self._lengths, self._counts = pages, lengths, counts
        size, self._real_N = mask.num_queries, None
        if min(counts) < size:
            real = [row * size + place for row, count in enumerate(counts) for place in range(count)]
            self._real_N = torch.tensor(real, device=kv_cache.device)
        self._is_planned = False
        self._plan: PagedPlan | None = None

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write the new keys and values of a layer, then attend to all that the mask shows.

        Args:
            layer: Number of the layer. All have inputs of one shape.
            q: Queries [B, H, S, D].
            k: New keys [B, K, S, D].
            v: New values, of the shape of `k`.

        Returns:
            The output [B, H, S, D].

        Raises:
            ValueError: With the argument's name, for what does not fit.
        """
        if not self._is_planned:
            self._plan, self._is_planned = self._make_plan(q), True
        if self._real_N is not None:
            # Each real position as a row of its own.
            k, v = (x.transpose(1, 2).flatten(0, 1).index_select(0, self._real_N)[:, :, None] for x in (k, v))
        if self._plan is not None:
            return self._plan.attend(layer, q, k, v)
        return self._tables(layer, q, k, v)

    @cached_property
    def _tables(self) -> TableAttention:
        device, size = self._kv_cache.device, self._mask.num_queries
        table_BP = write_table = padded_table(self._pages).to(device)
        length_B1 = torch.tensor(self._lengths, device=device)[:, None]
        positions = length_B1 + torch.arange(size, device=device)
        if self._real_N is not None:
            positions = positions.flatten()[self._real_N][:, None]
            write_table = table_BP[self._real_N // size]
        return TableAttention(
            self._kv_cache, self._mask, table_BP, positions, backend=self._backend, write_table=write_table
        )

    def _make_plan(self, q: Tensor) -> PagedPlan | None:
        """The plan of all layers on the CPU, or None for all else."""
        if q.device.type != "cpu" or choose_for_cache(self._backend, q).implementation != "cpu":
            return None
        if q.numel() == 0 or self._kv_cache.numel() == 0 or not lies_end_to_end(self._kv_cache):
            return None
        mask, (k_cache, v_cache) = self._mask, self._kv_cache[0]
        check_queries(q)
        check_keys_and_values(q, ("k_cache", k_cache), ("v_cache", v_cache), batch=None, rows="slots")
        check_mask(q, mask)
        refuse_gradients(("q", q), ("kv_cache", self._kv_cache), why="attention to a cache has none")
        validate_bounds(mask.first_key, mask.end_key, mask.num_keys)
        slots = k_cache.shape[2]
        written = []
        for pages, length, count in zip(self._pages, self._lengths, self._counts, strict=True):
            if length + count > len(pages) * slots:
                raise ValueError(
                    f"counts: got {count} after {length}, takes what a row of {len(pages) * slots} has room for"
                )
            written += [pages[n // slots] * slots + n % slots for n in range(length, length + count)]
        first_key, end_key = (bound.expand(len(q), -1) for bound in (mask.first_key, mask.end_key))
        calls = plan_calls(first_key, end_key, self._pages, k_cache, accumulation_dtype(q.dtype))
        return PagedPlan(self._kv_cache, torch.tensor(written), calls, checked_scale(q, None))
