"""The static cache, slot by slot."""

from __future__ import annotations

import pytest
import torch

from transfusion.inference.cache import KeyValueCache

K, E = 2, 3


def filled(rows: int, count: int, value: float) -> torch.Tensor:
    """Keys or values [R, K, S, E] that tell their row and position."""
    row, position = torch.arange(rows).view(-1, 1, 1, 1), torch.arange(count).view(1, 1, -1, 1)
    return (value + 100.0 * row + position).expand(rows, K, count, E).contiguous()


def write(
    cache: KeyValueCache, rows: list[int] | None, count: int, value: float
) -> tuple[torch.Tensor, torch.Tensor]:
    view = cache.view(rows)
    return view.write(0, filled(len(view.lengths), count, value), -filled(len(view.lengths), count, value))


def test_rows_are_written_behind_their_own_length() -> None:
    cache = KeyValueCache(1, 2, 8, torch.device("cpu"))
    write(cache, None, 4, 1.0)
    cache.view().advance([4, 2])
    key, value = write(cache, None, 2, 50.0)
    assert key.shape == (2, K, 8, E) and torch.equal(key, -value)
    assert key[0, 0, :, 0].tolist() == [1, 2, 3, 4, 50, 51, 0, 0]
    assert key[1, 1, :, 2].tolist() == [101, 102, 150, 151, 0, 0, 0, 0]
    assert cache.lengths == [4, 2]


def test_what_is_not_advanced_over_is_written_over() -> None:
    cache = KeyValueCache(1, 1, 4, torch.device("cpu"))
    write(cache, None, 2, 1.0)
    cache.view().advance([1])
    write(cache, None, 3, 20.0)
    key, _ = write(cache, None, 3, 30.0)
    assert key[0, 0, :, 0].tolist() == [1, 30, 31, 32]


def test_some_rows_leave_the_others_alone() -> None:
    cache = KeyValueCache(1, 3, 3, torch.device("cpu"))
    write(cache, None, 1, 1.0)
    cache.view().advance([1, 1, 1])
    key, _ = write(cache, [2, 0], 1, 7.0)
    assert key[:, 0, :, 0].tolist() == [[201, 7, 0], [1, 107, 0]]
    cache.view([2, 0]).advance([1, 1])
    assert cache.lengths == [2, 1, 2]
    key, _ = cache.storage(0, torch.empty(0))
    assert key[:, :, 0, 0].tolist() == [[1, 107, 0], [101, 0, 0], [201, 7, 0]]


def test_gathered_rows_are_copies_with_their_own_room() -> None:
    first, second = KeyValueCache(1, 2, 3, torch.device("cpu")), KeyValueCache(1, 1, 5, torch.device("cpu"))
    for cache, value in ((first, 1.0), (second, 9.0)):
        write(cache, None, 2, value)
        cache.view().advance([2] * len(cache.lengths))
    gathered = KeyValueCache.gathered([(first, [1, 1]), (second, [0])], 4)
    key, _ = write(gathered, None, 2, 50.0)
    assert gathered.lengths == [2, 2, 2]
    assert key[:, 0, :, 0].tolist() == [[101, 102, 50, 51], [101, 102, 150, 151], [9, 10, 250, 251]]
    assert first.storage(0, torch.empty(0))[0][:, 2:].abs().max() == 0


def test_the_mask_counts_from_each_rows_length() -> None:
    cache = KeyValueCache(1, 2, 9, torch.device("cpu"))
    write(cache, None, 5, 0.0)
    cache.view().advance([5, 2])
    mask = cache.view().mask(torch.tensor([[1, 2, 3], [3, 3, 3]]))
    assert mask.num_keys == 9
    assert mask.first_key.tolist() == [[0, 0, 0]] * 2
    assert mask.end_key.tolist() == [[6, 7, 8], [5, 5, 5]]


def test_a_full_row_refuses_more() -> None:
    cache = KeyValueCache(1, 2, 4, torch.device("cpu"))
    write(cache, None, 3, 0.0)
    cache.view().advance([3, 1])
    with pytest.raises(ValueError, match="do not fit"):
        write(cache, None, 2, 0.0)
    with pytest.raises(ValueError, match="no forward"):
        KeyValueCache.gathered([(KeyValueCache(1, 1, 4, torch.device("cpu")), [0])], 4)
