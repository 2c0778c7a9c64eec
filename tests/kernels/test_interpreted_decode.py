"""The Triton kernels of attention to a cache, run by Triton's interpreter: every mask, whole and in parts.

Needs TRITON_INTERPRET=1, as `test_interpreted.py` does.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from transfusion_kernels import IntervalMask, interval_attention_with_kvcache
from transfusion_kernels.verification.testing import (
    exact_attention,
    mask_families,
    paged,
    poisoned_memory,
    relative_error,
    without_the_unseen,
)

triton = pytest.importorskip("triton", reason="triton is not installed")
pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(
        not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1 in a process of its own"
    ),
]

FAMILIES = mask_families(75)
# Group, head width, parts and slots of a page, taken in turn by the masks.
FORMS = itertools.cycle([(1, 32, 1, 16), (4, 96, 3, 0), (2, 64, 5, 7), (2, 32, 2, 0), (4, 32, 1, 32)])
CASES = [(name, *form) for name, form in zip(FAMILIES, FORMS, strict=False)]


def compare(
    mask: IntervalMask, group: int, width: int, parts: int, slots: int, dtype: torch.dtype, bar: float
) -> None:
    torch.manual_seed(width)
    q = torch.randn(2, mask.num_queries, 4, width, dtype=dtype).transpose(1, 2)
    k, v = torch.randn(2, 2, mask.num_keys, 4 // group, width, dtype=dtype).transpose(2, 3).unbind()
    (k, k_zero), (v, v_zero) = without_the_unseen(k, mask), without_the_unseen(v, mask)
    exact, exact_lse, _ = exact_attention(q, k_zero, v_zero, mask, torch.zeros_like(q))
    table = None
    if slots:
        k, v, table = paged(k, v, slots)
    with poisoned_memory():
        out, lse = interval_attention_with_kvcache(
            q, k, v, mask, block_table=table, num_splits=parts, return_lse=True, backend="triton"
        )
    assert relative_error(out, exact) < bar
    assert out.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(lse.double(), exact_lse, rtol=bar, atol=bar)


@pytest.mark.parametrize(("name", "group", "width", "parts", "slots"), CASES)
def test_equals_the_definition_in_float32(name: str, group: int, width: int, parts: int, slots: int) -> None:
    compare(FAMILIES[name], group, width, parts, slots, torch.float32, bar=5e-6)


@pytest.mark.parametrize("name", ["one_query", "block_against_cache", "sliding_window", "padded_tail"])
def test_equals_the_definition_in_float16(name: str) -> None:
    compare(FAMILIES[name], 2, 32, 3, 16, torch.float16, bar=1e-3)


@pytest.mark.parametrize("width", [128, 256])
def test_wide_heads(width: int) -> None:
    compare(FAMILIES["block_against_cache"], 2, width, 2, 16, torch.float32, bar=5e-6)


@pytest.mark.parametrize("slots", [0, 256])
def test_one_query_against_8192_keys_in_parts_of_its_own_choice(slots: int) -> None:
    end_key = torch.tensor([[8192], [5001]], dtype=torch.int32)
    mask = IntervalMask(torch.zeros_like(end_key), end_key, num_keys=8192)
    compare(mask, 4, 32, 0, slots, torch.float32, bar=5e-6)


def test_an_image_block_against_a_cache() -> None:
    """64 patches that see the same keys, and beside them a row in which 40 real ones see a shorter prefix."""
    end_key = torch.full((2, 64), 200, dtype=torch.int32)
    end_key[1] = 77
    first_key = torch.zeros_like(end_key)
    first_key[1, 40:] = 77
    mask = IntervalMask(first_key, end_key, num_keys=200)
    compare(mask, 4, 32, 0, 16, torch.float32, bar=5e-6)


@pytest.mark.parametrize(("parts", "slots"), [(1, 16), (3, 0)])
def test_a_wide_window_that_slides(parts: int, slots: int) -> None:
    """Steps in part before the first keys, whole ones, and steps in part behind the last, in every tile."""
    position = torch.arange(12, dtype=torch.int32).expand(2, -1)
    mask = IntervalMask(7 * position, 180 + 3 * position, num_keys=220)
    compare(mask, 2, 32, parts, slots, torch.float32, bar=5e-6)


@pytest.mark.parametrize("parts", [1, 3])
def test_tables_of_one_column_pick_rows_of_a_static_cache(parts: int) -> None:
    end_key = torch.tensor([[74], [40], [74]], dtype=torch.int32)
    mask = IntervalMask(torch.zeros_like(end_key), end_key, num_keys=75)
    q, (k, v) = torch.randn(3, 4, 1, 32), torch.randn(2, 2, 2, 75, 32).unbind()
    rows = [1, 0, 0]
    exact, _, _ = exact_attention(q, k[rows], v[rows], mask, torch.zeros_like(q))
    table = torch.tensor(rows, dtype=torch.int32)[:, None]
    out = interval_attention_with_kvcache(
        q, k, v, mask, block_table=table, num_splits=parts, backend="triton"
    )
    assert relative_error(out, exact) < 5e-6


def test_nothing_to_do() -> None:
    for batch, queries, keys in ((0, 1, 8), (2, 0, 8), (2, 3, 0)):
        mask = IntervalMask(*torch.zeros(2, batch, queries, dtype=torch.int32), num_keys=keys)
        q, k = torch.randn(batch, 4, queries, 32), torch.randn(batch, 2, keys, 32)
        for parts in (1, 2):
            out, lse = interval_attention_with_kvcache(
                q, k, k, mask, num_splits=parts, return_lse=True, backend="triton"
            )
            assert not out.any()
            assert bool((lse == float("-inf")).all())


@pytest.mark.parametrize(
    ("programs", "num_keys", "parts"),
    [
        (1, 8192, 32),
        (1, 100_000, 64),
        (1, 300, 1),
        (131, 8192, 3),
        (132, 8192, 1),
        (1000, 8192, 1),
        (8, 0, 1),
    ],
)
def test_parts_fill_the_processors_and_are_worth_merging(programs: int, num_keys: int, parts: int) -> None:
    from transfusion_kernels.attention.decode import parts_for

    assert parts_for(programs, num_keys, processors=132) == parts
