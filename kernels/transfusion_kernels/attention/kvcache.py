"""Attention of new queries to a cache of keys and values, static or paged, and writing to the cache in place.

For generation: one or a few text positions a row, or an image block, against all that came before. Forward only.

Shape suffixes: B batch, H query heads, K key heads (H is a multiple of K), S queries, N keys, D head width,
P pages of a row, L slots of a page.
"""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor

from transfusion_kernels.attention.checks import (
    check_keys_and_values,
    check_mask,
    check_queries,
    checked_scale,
    refuse_gradients,
)
from transfusion_kernels.attention.cpu import windowed_forward
from transfusion_kernels.attention.cpu_cache import ELEMENTS_WORTH_A_CALL
from transfusion_kernels.attention.layout import IntervalMask, check_tensor, validate_bounds
from transfusion_kernels.attention.reference import accumulation_dtype, reference_attention
from transfusion_kernels.dispatch import choose_for_cache


def interval_attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    mask: IntervalMask,
    *,
    block_table: Tensor | None = None,
    scale: float | None = None,
    num_splits: int = 0,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in which each query sees the cached keys `[first_key, end_key)` of `mask`. It has no gradient.

    What lies outside a row's bounds is not read. There the cache may be uninitialised memory, and entries of the block
    table anything. Nothing waits for a GPU.

    Args:
        q: Queries [B, H, S, D] of the new positions.
        k_cache: Keys of the dtype of `q`, with any strides, the last being 1. H is a multiple of K. A static cache is
            [B, K, N, D], row b of which belongs to row b of `q`. A paged one is [pages, K, slots, D].
        v_cache: Values, of the shape of `k_cache`.
        mask: Over S queries and at most as many keys as a row of the cache can hold, with B rows or one that all share.
            Its `num_keys` is the maximum over the rows, as far as the host knows. It decides how keys are split.
        block_table: int32 [B, pages of a row], for a paged cache. Key n of row b is slot `n % slots` of page
            `block_table[b, n // slots]`. Rows may share pages. A table of one column picks rows out of a static cache.
        scale: Of the scores, above 0. None takes 1 / sqrt(D).
        num_splits: In how many parts the Triton kernel takes the keys. 0 chooses by sizes that the host knows. The
            other implementations take no notice.
        return_lse: Return the log-sum-exp too.
        backend: "auto", "triton", "cpu" or "reference", as in `explain`. The Hopper kernels and the rivals take no
            cache. Where "auto" or the environment would choose them, another runs. By name here they are refused.

    Returns:
        The output [B, H, S, D] in the dtype of `q`, laid out as [B, S, H, D]. With `return_lse` also the natural
            log-sum-exp [B, H, S] of the scaled scores. It is float32, or float64 for float64 inputs, and minus infinity
            where a query sees nothing.

    Raises:
        ValueError: With the argument's name, for what does not fit or needs a gradient, and on CPU tensors for bounds
            and pages that do not exist.
    """
    _check(q, k_cache, v_cache, mask, block_table, num_splits)
    implementation = choose_for_cache(backend, q).implementation
    scale = checked_scale(q, scale)
    if q.device.type == "cpu" and not torch.compiler.is_compiling():
        validate_bounds(mask.first_key, mask.end_key, mask.num_keys)
        _validate_pages(mask, block_table, k_cache)
    out, lse = _cached_attention(
        q,
        k_cache,
        v_cache,
        mask.first_key,
        mask.end_key,
        block_table,
        mask.num_keys,
        scale,
        num_splits,
        implementation,
    )
    return (out, lse) if return_lse else out


def append_to_kvcache(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    *,
    block_table: Tensor | None = None,
) -> None:
    """Write new keys and values to their positions in a cache, in place.

    Args:
        k: New keys [B, K, S, D].
        v: New values, of the shape of `k`.
        k_cache: As `interval_attention_with_kvcache` takes it.
        v_cache: As `k_cache`.
        positions: int32 or int64 [B, S], where in its row each goes. No slot may be written
            twice. On a GPU nothing waits to see whether they lie in the cache, as they must.
        block_table: As `interval_attention_with_kvcache` takes it.

    Raises:
        ValueError: With the argument's name, for what does not fit, needs a gradient, or is a cache whose elements
            share memory, and on CPU tensors for positions outside the cache.
    """
    _check_new(k, v, k_cache, v_cache, positions, block_table)
    if positions.numel() == 0:
        return
    first_BS, slot_BS = _places(k_cache, positions, block_table)
    for cache, new in ((k_cache, k), (v_cache, v)):
        cache.transpose(1, 2).index_put_((first_BS, slot_BS), new.transpose(1, 2))


def _check_new(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    block_table: Tensor | None,
) -> None:
    check_tensor("k", k)
    if k.dim() != 4 or k.shape[1] == 0:
        raise ValueError(f"k: got shape {tuple(k.shape)}, takes [batch, key heads, positions, head_dim]")
    check_tensor("v", v)
    for what, got, wanted in (
        ("shape", tuple(v.shape), tuple(k.shape)),
        ("dtype", v.dtype, k.dtype),
        ("device", v.device, k.device),
    ):
        if got != wanted:
            raise ValueError(f"v: got {what} {got}, takes k's, {wanted}")
    check_keys_and_values(
        k,
        ("k_cache", k_cache),
        ("v_cache", v_cache),
        batch=None if block_table is not None else k.shape[0],
        rows="slots",
        like="k",
    )
    if k_cache.shape[1] != k.shape[1]:
        raise ValueError(f"k_cache: got {k_cache.shape[1]} heads, takes k's {k.shape[1]}")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if any(size > 1 and stride == 0 for size, stride in zip(cache.shape, cache.stride(), strict=True)):
            raise ValueError(
                f"{name}: got strides {cache.stride()} for shape {tuple(cache.shape)}, takes memory of its own for "
                "each element, for what is written must not overwrite what is beside it"
            )
    _check_block_table(k, k_cache, block_table, like="k")
    check_tensor("positions", positions)
    if positions.shape != (k.shape[0], k.shape[2]) or positions.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"positions: got {positions.dtype} of shape {tuple(positions.shape)}, takes int32 or int64 "
            f"[{k.shape[0]}, {k.shape[2]}] as k is {tuple(k.shape)}"
        )
    if positions.device != k.device:
        raise ValueError(f"positions: got device {positions.device}, takes k's, {k.device}")
    refuse_gradients(
        ("k", k),
        ("v", v),
        ("k_cache", k_cache),
        ("v_cache", v_cache),
        why="writing to a cache has none: call it under torch.no_grad()",
    )


def _places(k_cache: Tensor, positions: Tensor, block_table: Tensor | None) -> tuple[Tensor, Tensor]:
    """int64 [B, S], page, or row of a static cache, and slot of each position."""
    checks = k_cache.device.type == "cpu" and not torch.compiler.is_compiling()
    if checks:
        room, lowest, highest = _room(k_cache, block_table), int(positions.min()), int(positions.max())
        if lowest < 0 or highest >= room:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(
                f"positions: got {wrong}, takes those from 0 to {room - 1} that a row has room for"
            )
    position_BS = positions.long()
    if block_table is None:
        rows_B1 = torch.arange(len(positions), device=positions.device)[:, None]
        return rows_B1.expand_as(position_BS), position_BS
    page_BS = block_table.gather(1, position_BS // k_cache.shape[2]).long()
    if checks:
        _refuse_missing_pages(page_BS, k_cache.shape[0])
    return page_BS, position_BS % k_cache.shape[2]


def _check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    mask: IntervalMask,
    block_table: Tensor | None,
    num_splits: int,
) -> None:
    check_queries(q)
    check_keys_and_values(
        q,
        ("k_cache", k_cache),
        ("v_cache", v_cache),
        batch=None if block_table is not None else q.shape[0],
        rows="keys" if block_table is None else "slots",
    )
    _check_block_table(q, k_cache, block_table)
    check_mask(q, mask)
    room = _room(k_cache, block_table)
    if mask.num_keys > room:
        raise ValueError(f"mask: got num_keys {mask.num_keys}, takes at most what a row has room for, {room}")
    if not isinstance(num_splits, int) or num_splits < 0:
        raise ValueError(f"num_splits: got {num_splits!r}, takes a number of parts, or 0 to have it chosen")
    refuse_gradients(
        ("q", q),
        ("k_cache", k_cache),
        ("v_cache", v_cache),
        why="attention to a cache has none: call it under torch.no_grad(), or use interval_attention",
    )


def _check_block_table(q: Tensor, k_cache: Tensor, block_table: Tensor | None, like: str = "q") -> None:
    if block_table is None:
        return
    if k_cache.shape[2] == 0:
        raise ValueError(f"k_cache: got shape {tuple(k_cache.shape)}, takes pages of one slot or more")
    check_tensor("block_table", block_table)
    if block_table.dim() != 2 or block_table.shape[0] != q.shape[0]:
        raise ValueError(
            f"block_table: got shape {tuple(block_table.shape)}, takes [{q.shape[0]}, pages of a row] as {like} is "
            f"{tuple(q.shape)}"
        )
    if block_table.dtype != torch.int32:
        raise ValueError(f"block_table: got {block_table.dtype}, takes torch.int32")
    if block_table.device != q.device:
        raise ValueError(f"block_table: got device {block_table.device}, takes {like}'s, {q.device}")
    if block_table.shape[1] > 1 and block_table.stride(1) != 1:
        raise ValueError(
            f"block_table: got last stride {block_table.stride(1)}, takes a contiguous last dimension"
        )


def _room(k_cache: Tensor, block_table: Tensor | None) -> int:
    """How many keys a row of the cache can hold."""
    return k_cache.shape[2] * (1 if block_table is None else block_table.shape[1])


def _validate_pages(mask: IntervalMask, block_table: Tensor | None, k_cache: Tensor) -> None:
    """Raise ValueError if the bounds reach pages that do not exist. Waits for the device."""
    if block_table is None or mask.first_key.numel() == 0:
        return
    page_P = torch.arange(block_table.shape[1], device=block_table.device)
    first_B1, end_B1 = mask.first_key[:, :1], mask.end_key[:, -1:]
    slots = k_cache.shape[2]
    reached_BP = (page_P >= first_B1 // slots) & (page_P * slots < end_B1) & (first_B1 < end_B1)
    _refuse_missing_pages(block_table[reached_BP.expand_as(block_table)], k_cache.shape[0])


def _refuse_missing_pages(page: Tensor, pages: int) -> None:
    missing = (page < 0) | (page >= pages)
    if bool(missing.any()):
        raise ValueError(f"block_table: got page {int(page[missing][0])}, takes pages from 0 to {pages - 1}")


@torch.library.custom_op("transfusion::interval_attention_with_kvcache", mutates_args=())
def _cached_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    first_key: Tensor,
    end_key: Tensor,
    block_table: Tensor | None,
    num_keys: int,
    scale: float,
    num_splits: int,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    if k_cache.shape[0] == 0:  # no pages, of which then no query sees any
        out, lse = _empty_results(q)
        return out.zero_(), lse.fill_(float("-inf"))
    arguments = (q, k_cache, v_cache, first_key, end_key, block_table)
    if implementation == "reference":
        return _reference_forward(*arguments, num_keys, scale)
    if implementation == "cpu":
        return _cpu_forward(*arguments, scale)
    from transfusion_kernels.attention.decode import decode_forward

    return decode_forward(*arguments, num_keys, scale, num_splits)


@_cached_attention.register_fake
def _fake(q: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    return _empty_results(q)


def _empty_results(q: Tensor) -> tuple[Tensor, Tensor]:
    """An uninitialised output and log-sum-exp, as every implementation lays them out."""
    batch, heads, queries, width = q.shape
    out = q.new_empty(batch, queries, heads, width)
    lse = q.new_empty(batch, queries, heads, dtype=accumulation_dtype(q.dtype))
    return out.transpose(1, 2), lse.transpose(1, 2)


def _reference_forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    first_key: Tensor,
    end_key: Tensor,
    block_table: Tensor | None,
    num_keys: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The definition: the keys and values of each row, put together, with 0 where no query sees them."""
    out, lse = _empty_results(q)
    if out.numel() == 0:
        return out, lse
    key_N = torch.arange(num_keys, device=q.device)
    unseen_BN = (key_N < first_key[:, :1]) | (key_N >= end_key[:, -1:])
    rows = []
    for cache in (k_cache, v_cache):
        if block_table is not None:
            cache = _gather(cache, block_table.clamp(0, cache.shape[0] - 1))
        rows.append(cache[:, :, :num_keys].masked_fill(unseen_BN[:, None, :, None], 0.0))
    mask = IntervalMask(first_key, end_key, num_keys=num_keys)
    exact_out, exact_lse = reference_attention(q, rows[0], rows[1], mask, scale)
    return out.copy_(exact_out), lse.copy_(exact_lse)


def _gather(cache: Tensor, table_BP: Tensor) -> Tensor:
    """[B, K, P * L, D]: the pages of each row, put together."""
    pages_BPKLD = cache.index_select(0, table_BP.flatten()).unflatten(0, table_BP.shape)
    return pages_BPKLD.transpose(1, 2).flatten(2, 3)


def _cpu_forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    first_key: Tensor,
    end_key: Tensor,
    block_table: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The CPU's implementation on runs of rows with the same keys, or on all rows with 0 where a row sees nothing:
    so what lies outside a row's bounds is not read, or read and left out."""
    if q.numel() == 0:
        return _empty_results(q)
    first_key, end_key = (bound.expand(q.shape[0], -1) for bound in (first_key, end_key))
    low_B, high_B = first_key[:, 0].tolist(), end_key[:, -1].tolist()
    runs: list[tuple[slice, int, int]] = []
    for (low, high), same in groupby(zip(low_B, high_B, strict=True)):
        start = runs[-1][0].stop if runs else 0
        runs.append((slice(start, start + len(list(same))), low, high))
    results = []
    low, high = min(low_B), max(high_B)
    elements = 2 * q.shape[0] * k_cache.shape[1] * (high - low) * k_cache.shape[3]
    if len(runs) > 1 and elements < len(runs) * ELEMENTS_WORTH_A_CALL:
        if block_table is not None:  # what is unseen may lie on pages that do not exist
            block_table = block_table.clamp(0, k_cache.shape[0] - 1)
        k, v = (_keys_of(cache, block_table, slice(None), low, high) for cache in (k_cache, v_cache))
        if not bool((k.sum() + v.sum()).isfinite()):  # quicker to ask than always to copy
            key_N = torch.arange(low, high)
            unseen_BN = (key_N < first_key[:, :1]) | (key_N >= end_key[:, -1:])
            k, v = (x.masked_fill(unseen_BN[:, None, :, None], 0.0) for x in (k, v))
        runs, results = [], [windowed_forward(q, k, v, first_key - low, end_key - low, scale)]
    for rows, low, high in runs:
        if low == high:  # no key is seen, and the page that it would be on may not exist
            low = high = 0
        k, v = (_keys_of(cache, block_table, rows, low, high) for cache in (k_cache, v_cache))
        results.append(windowed_forward(q[rows], k, v, first_key[rows] - low, end_key[rows] - low, scale))
    outs, lses = zip(*results, strict=True)
    if len(results) == 1:
        return outs[0], lses[0].transpose(1, 2).contiguous().transpose(1, 2)
    out, lse = (torch.cat([x.transpose(1, 2) for x in parts]).transpose(1, 2) for parts in (outs, lses))
    return out, lse


def _keys_of(cache: Tensor, block_table: Tensor | None, rows: slice, low: int, high: int) -> Tensor:
    """[rows, K, high - low, D]: cached keys or values `[low, high)`; no copy where the storage allows it."""
    if block_table is None:
        return cache[rows, :, low:high]
    slots = cache.shape[2]
    first, end = low // slots, -(-high // slots)
    table_BP = block_table[rows, first:end]
    if table_BP.shape[1] == 1:  # only the slots that are needed
        cache = cache[:, :, low - first * slots : high - first * slots]
        if table_BP.shape[0] == 1:
            page = int(table_BP)
            return cache[page : page + 1]
        return cache.index_select(0, table_BP[:, 0])
    return _gather(cache, table_BP)[:, :, low - first * slots : high - first * slots]
