"""The kernels that make masks and what is derived from them, in Triton's interpreter: what PyTorch's operations give.

Needs TRITON_INTERPRET=1, as `test_interpreted.py` does.
"""

from __future__ import annotations

import pytest
import torch

from transfusion_kernels import IntervalMask
from transfusion_kernels.attention.layout import TILE_ROWS, longest_first
from transfusion_kernels.verification.testing import mask_families, poisoned_memory, random_layout

triton = pytest.importorskip("triton", reason="triton is not installed")
pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(
        not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1 in a process of its own"
    ),
]

SIZE = 700


@pytest.mark.parametrize("has_length", [False, True])
@pytest.mark.parametrize("size", [1, 255, 300])
def test_bounds_of_spans(size: int, has_length: bool) -> None:
    from transfusion_kernels.attention.derived import bounds_from_spans

    start, end, _, _ = random_layout(3, size, seed=size)
    length = torch.tensor([[size, size // 2, 0], [9, 9, 9]]).t()[:, 0] if has_length else None
    expected = IntervalMask.from_spans(start, end, length=length)
    with poisoned_memory():
        first_key, end_key = bounds_from_spans(start, end, length)
    assert torch.equal(first_key, expected.first_key)
    assert torch.equal(end_key, expected.end_key)


@pytest.mark.parametrize("name", mask_families(64))
def test_columns_and_orders(name: str) -> None:
    from transfusion_kernels.attention import derived

    mask = mask_families(SIZE)[name]
    with poisoned_memory():
        columns = derived.columns(mask.first_key, mask.end_key, mask.num_keys)
    assert torch.equal(columns[0], mask.first_query)
    assert torch.equal(columns[1], mask.end_query)
    for first, end in ((mask.first_key, mask.end_key), columns):
        with poisoned_memory():
            order = derived.longest_first(first, end, TILE_ROWS)
        assert torch.equal(order, longest_first(first, end))


def test_many_tiles_of_few_widths() -> None:
    """More tiles than one program ranks, or compares with at a time; most are as wide as others."""
    from transfusion_kernels.attention import derived

    first, end = torch.zeros(2, 40, 8 * TILE_ROWS - 5, dtype=torch.int32)
    end += torch.randint(1, 4, (40, 1), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    assert torch.equal(derived.longest_first(first, end, TILE_ROWS), longest_first(first, end))


def test_nothing_to_do() -> None:
    from transfusion_kernels.attention import derived

    for rows, size, keys in ((0, 8, 8), (2, 0, 8), (2, 8, 0)):
        first, end = torch.zeros(2, rows, size, dtype=torch.int32)
        first_query, end_query = derived.columns(first, end, keys)
        assert first_query.shape == end_query.shape == (rows, keys)
        assert not first_query.any() and not end_query.any()
        assert derived.longest_first(first, end, TILE_ROWS).shape == (rows * -(-size // TILE_ROWS),)
