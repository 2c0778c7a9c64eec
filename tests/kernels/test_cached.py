"""All layers of one forward against a paged cache, held against the two functions that it stands for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from transfusion_kernels import (
    CachedAttention,
    IntervalMask,
    append_to_kvcache,
    interval_attention_with_kvcache,
)

LAYERS, PAGES, SLOTS, KEY_HEADS, WIDTH = 2, 40, 16, 2, 32

# Pages and lengths of rows.
ROWS: dict[str, tuple[list[list[int]], list[int]]] = {
    "one": ([[3, 4, 5]], [37]),
    "one, apart": ([[9, 2, 5]], [37]),
    "alike, equally far": ([[0, 1, 2], [4, 5, 6], [8, 9, 10]], [30, 30, 30]),
    "alike, not equally far": ([[0, 1, 2], [4, 5, 6], [7, 8, 9]], [30, 30, 30]),
    "alike, backwards": ([[8, 9, 10], [4, 5, 6]], [30, 30]),
    "of many lengths": ([[0, 1, 2], [4, 5, 6], [30, 8, 9], [11]], [20, 39, 17, 0]),
    "two runs": ([[0, 1], [2, 3], [4, 5], [6, 7]], [20, 20, 9, 9]),
    "shared beginnings": ([[0, 1, 2], [0, 1, 7], [0, 1, 3]], [33, 33, 36]),
    "long": ([list(range(20)), list(range(20, 40))], [300, 300]),
    "long, of two lengths": ([list(range(20)), list(range(20, 40))], [300, 190]),
}


def caches(laid_end_to_end: bool) -> Tensor:
    """Keys and values that are not a number, as memory nobody has written to may be."""
    shape = (LAYERS, 2, KEY_HEADS, PAGES, SLOTS, WIDTH)
    if laid_end_to_end:
        return torch.full(shape, float("nan")).transpose(2, 3)
    return torch.full((LAYERS, 2, PAGES, KEY_HEADS, SLOTS, WIDTH), float("nan"))


def mask_of(lengths: list[int], counts: list[int], size: int, *, causal: bool) -> IntervalMask:
    ends = [
        [length + (min(place + 1, count) if causal else count) for place in range(size)]
        for length, count in zip(lengths, counts, strict=True)
    ]
    end_key = torch.tensor(ends, dtype=torch.int32)
    most = max(length + count for length, count in zip(lengths, counts, strict=True))
    return IntervalMask(torch.zeros_like(end_key), end_key, num_keys=most)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("laid_end_to_end", [True, False])
@pytest.mark.parametrize("few", [0, 10**9])
@pytest.mark.parametrize(("size", "causal", "pads"), [(1, True, False), (4, False, False), (4, True, True)])
@pytest.mark.parametrize("name", ROWS)
def test_equals_the_two_functions_in_each_layer(
    name: str,
    size: int,
    causal: bool,
    pads: bool,
    few: int,
    laid_end_to_end: bool,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """few: below how many elements rows are put together in one call, so that both ways are taken."""
    monkeypatch.setattr("transfusion_kernels.attention.cpu_cache.ELEMENTS_WORTH_A_CALL", few)
    pages, lengths = ROWS[name]
    counts = [size - row % 2 if pads else size for row in range(len(pages))]
    ours = caches(laid_end_to_end)
    theirs = ours.clone()
    table = torch.zeros(len(pages), max(map(len, pages)), dtype=torch.int32)
    for row, row_pages in enumerate(pages):
        table[row, : len(row_pages)] = torch.tensor(row_pages, dtype=torch.int32)

    def write(layer: int, row: int, k: Tensor, v: Tensor, start: int) -> None:
        position = torch.arange(start, start + k.shape[2])[None]
        append_to_kvcache(k, v, *theirs[layer], position, block_table=table[row : row + 1])

    for layer in range(LAYERS):
        for row, length in enumerate(lengths):
            write(layer, row, *torch.randn(2, 1, KEY_HEADS, length, WIDTH).unbind(), 0)
    ours.copy_(theirs)
    mask = mask_of(lengths, counts, size, causal=causal)
    attention = CachedAttention(ours, mask, pages, lengths, counts, backend=backend)
    for layer in range(LAYERS):
        q, k, v = (
            torch.randn(len(pages), size, heads, WIDTH).transpose(1, 2)
            for heads in (2 * KEY_HEADS, KEY_HEADS, KEY_HEADS)
        )
        out = attention(layer, q, k, v)
        for row, count in enumerate(counts):
            write(layer, row, k[row : row + 1, :, :count], v[row : row + 1, :, :count], lengths[row])
        exact = interval_attention_with_kvcache(
            q, *theirs[layer], mask, block_table=table, backend="reference"
        )
        assert isinstance(exact, Tensor)
        torch.testing.assert_close(out, exact)
    assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())


def test_what_does_not_fit_is_refused() -> None:
    mask = mask_of([3], [1], 1, causal=True)
    q, kv = torch.randn(1, 2, 1, WIDTH), torch.randn(1, KEY_HEADS, 1, WIDTH)
    with pytest.raises(ValueError, match="pages: got page 99, takes pages from 0 to 39"):
        CachedAttention(caches(True), mask, [[99]], [3], [1])(0, q, kv, kv)
    with pytest.raises(ValueError, match="k_cache: got shape"):
        CachedAttention(caches(True), mask, [[1]], [3], [1])(0, q[..., 1:], kv, kv)
    far = mask_of([16], [1], 1, causal=True)
    with pytest.raises(ValueError, match="counts: got 1 after 16, takes what a row of 16 has room for"):
        CachedAttention(caches(True), far, [[1]], [16], [1])(0, q, kv, kv)
    with pytest.raises(ValueError, match="mask: got end_key 17, takes what a row has room for, 16"):
        CachedAttention(caches(True), far, [[1]], [15], [1])(0, q, kv, kv)
    with pytest.raises(ValueError, match="q: got a tensor that requires a gradient"):
        CachedAttention(caches(True), mask, [[1]], [3], [1])(0, q.requires_grad_(), kv, kv)
