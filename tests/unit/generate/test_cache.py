"""The paged cache, slot by slot."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from transfusion.inference.cache import PAGE_SLOTS, PagedCache, Row

K, E = 2, 3
CPU = torch.device("cpu")


def write(cache: PagedCache, rows: list[Row], counts: list[int], value: float) -> None:
    """Let the first `counts` positions of a forward count, each key telling its row and place."""
    view, size = cache.view(rows), max(counts)
    row, place = torch.arange(len(rows)).view(-1, 1, 1, 1), torch.arange(size).view(1, 1, -1, 1)
    key = (value + 100.0 * row + place).expand(len(rows), K, size, E).contiguous()
    ends = torch.tensor([[min(place + 1, count) for place in range(size)] for count in counts])
    view.layers[0](key, key, -key, view.mask(ends, counts))
    view.advance(counts)


def keys(cache: PagedCache, row: Row) -> list[float]:
    """The first number of each key of a row that counts."""
    key, value = cache.storage(torch.empty(1, K, 1, E))[0]
    assert torch.equal(key, -value)
    found: Tensor = torch.cat([key[page, 0, :, 0] for page in row.pages])[: row.length]
    return found.tolist()


def test_rows_are_written_behind_their_own_length() -> None:
    cache = PagedCache(1, 4, CPU)
    rows = [cache.row(20), cache.row(20)]
    write(cache, rows, [4, 2], 1.0)
    write(cache, rows, [2, 2], 50.0)
    assert keys(cache, rows[0]) == [1, 2, 3, 4, 50, 51]
    assert keys(cache, rows[1]) == [101, 102, 150, 151]


def test_what_does_not_count_is_written_over() -> None:
    cache = PagedCache(1, 2, CPU)
    row = cache.row(20)
    write(cache, [row], [18], 1.0)
    row.length = 15
    write(cache, [row], [3], 30.0)
    assert keys(cache, row) == [*range(1, 16), 30, 31, 32]


def test_padding_is_not_written() -> None:
    """A short row whose page ends where the padding of a longer one would begin."""
    cache = PagedCache(1, 3, CPU)
    short, long = cache.row(PAGE_SLOTS), cache.row(2 * PAGE_SLOTS)
    write(cache, [short, long], [PAGE_SLOTS, 2 * PAGE_SLOTS], 1.0)
    assert keys(cache, short) == [*range(1, 17)]
    assert keys(cache, long) == [*range(101, 133)]


def test_a_fork_shares_full_pages_and_copies_the_last() -> None:
    cache = PagedCache(1, 5, CPU)
    row = cache.row(20)
    write(cache, [row], [20], 1.0)
    fork = cache.fork(row, 40)
    assert fork.pages[0] == row.pages[0] and fork.pages[1] != row.pages[1] and cache.free_pages == 1
    write(cache, [fork], [2], 70.0)
    write(cache, [row], [2], 90.0)
    assert keys(cache, fork) == [*range(1, 21), 70, 71]
    assert keys(cache, row) == [*range(1, 21), 90, 91]
    cache.release(row)
    assert cache.free_pages == 2, "the shared page is still read"
    assert keys(cache, fork) == [*range(1, 21), 70, 71]
    cache.release(fork)
    assert cache.free_pages == 5


def test_a_fork_of_the_beginning() -> None:
    cache = PagedCache(1, 4, CPU)
    row = cache.row(20)
    write(cache, [row], [20], 1.0)
    assert keys(cache, cache.fork(row, 16, 10)) == [*range(1, 11)]


def test_what_does_not_fit_is_an_error() -> None:
    cache = PagedCache(1, 2, CPU)
    row = cache.row(16)
    with pytest.raises(ValueError, match=r"17 positions do not fit after 0 in a row of 16"):
        write(cache, [row], [17], 1.0)
    with pytest.raises(ValueError, match=r"1 free pages, 2 are asked for"):
        cache.row(17)


def test_pages_are_given_back() -> None:
    """As if nothing had happened, whatever came and went: the memory of a long life is that of a short one."""
    cache = PagedCache(1, 6, CPU)
    for turn in range(50):
        rows = [cache.row(1 + turn % 30), cache.row(17)]
        forks = [cache.fork(rows[1], 20)] if cache.free_pages >= 2 else []
        for row in (*rows, *forks)[:: (-1) ** turn]:
            cache.release(row)
        assert cache.free_pages == 6
    assert cache.row(6 * PAGE_SLOTS).pages == [0, 1, 2, 3, 4, 5]
