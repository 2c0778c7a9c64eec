"""Attention to a static and a paged cache on the CPU, writing to it, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from transfusion_kernels import (
    IntervalMask,
    append_to_kvcache,
    dispatch,
    interval_attention,
    interval_attention_with_kvcache,
)
from transfusion_kernels.verification.testing import (
    exact_attention,
    mask_families,
    paged,
    poisoned_memory,
    relative_error,
    without_the_unseen,
)

SIZE = 131
FAMILIES = mask_families(SIZE)


def ends(*rows: list[int], num_keys: int, first: int = 0) -> IntervalMask:
    end_key = torch.tensor(rows, dtype=torch.int32)
    return IntervalMask(torch.full_like(end_key, first), end_key, num_keys=num_keys)


def inputs_for(mask: IntervalMask, group: int, width: int, dtype: torch.dtype = torch.float32) -> Any:
    generator = torch.Generator().manual_seed(width + group)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    q = normal(2, mask.num_queries, 4, width).transpose(1, 2)
    return q, normal(2, 4 // group, mask.num_keys, width), normal(2, 4 // group, mask.num_keys, width)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_equals_the_definition_and_reads_nothing_unseen(name: str, group: int, backend: str) -> None:
    mask = FAMILIES[name]
    q, k, v = inputs_for(mask, group, 32)
    (k_nan, k_zero), (v_nan, v_zero) = without_the_unseen(k, mask), without_the_unseen(v, mask)
    exact, exact_lse, _ = exact_attention(q, k_zero, v_zero, mask, torch.zeros_like(q))
    k_pages, v_pages, table = paged(k_nan, v_nan, slots=16)
    for cache, block_table in (((k_nan, v_nan), None), ((k_pages, v_pages), table)):
        with poisoned_memory():
            out, lse = interval_attention_with_kvcache(
                q, *cache, mask, block_table=block_table, return_lse=True, backend=backend
            )
        assert relative_error(out, exact) < 5e-6
        assert out.transpose(1, 2).is_contiguous()
        torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)


def test_one_query_against_8192_keys() -> None:
    mask = ends([8192], [5001], num_keys=8192)
    q, k, v = inputs_for(mask, 2, 64)
    exact, _, _ = exact_attention(q, k, v, mask, torch.zeros_like(q))
    assert relative_error(interval_attention_with_kvcache(q, k, v, mask), exact) < 5e-6
    k_pages, v_pages, table = paged(k, v, slots=256)
    assert (
        relative_error(interval_attention_with_kvcache(q, k_pages, v_pages, mask, block_table=table), exact)
        < 5e-6
    )


def test_tables_of_one_column_pick_rows_of_a_static_cache() -> None:
    _, k, v = inputs_for(FAMILIES["causal"], 2, 32)
    mask = ends([100, 101], [60, 61], [100, 101], num_keys=SIZE)
    q = torch.randn(3, 4, 2, 32)
    rows = [1, 0, 1]
    out = interval_attention_with_kvcache(
        q, k, v, mask, block_table=torch.tensor(rows, dtype=torch.int32)[:, None]
    )
    torch.testing.assert_close(out, interval_attention(q, k[rows], v[rows], mask))


def test_fewer_keys_than_there_is_room_for() -> None:
    mask = ends([40], [33], num_keys=48)
    q, k, v = inputs_for(mask, 2, 32)
    expected = interval_attention(q, k, v, mask)
    longer = [torch.cat([x, torch.full_like(x, float("nan"))], dim=2) for x in (k, v)]
    for backend in ("cpu", "reference"):
        torch.testing.assert_close(
            interval_attention_with_kvcache(q, *longer, mask, backend=backend), expected
        )


def test_entries_of_pages_that_no_query_sees_may_be_anything() -> None:
    mask = ends([40], [17], num_keys=64)
    q, k, v = inputs_for(mask, 2, 32)
    k_pages, v_pages, table = paged(k, v, slots=16)
    table[0, 3:], table[1, 2:] = -1, 9999
    for backend in ("cpu", "reference"):
        out = interval_attention_with_kvcache(q, k_pages, v_pages, mask, block_table=table, backend=backend)
        torch.testing.assert_close(out, interval_attention(q, k, v, mask))


@pytest.mark.parametrize("slots", [0, 16, 7])
def test_what_is_appended_is_attended_to(slots: int) -> None:
    """Three rows of different lengths grow by blocks of text and of an image, as in generation."""
    lengths, blocks = torch.tensor([0, 5, 30]), [4, 1, 9, 1, 1]
    k_all, v_all = (torch.randn(3, 2, 64, 32) for _ in range(2))
    if slots:
        k_cache, v_cache, table = paged(k_all, v_all, slots)
    else:
        k_cache, v_cache, table = torch.empty_like(k_all), torch.empty_like(v_all), None
    for cache in (k_cache, v_cache):
        cache.fill_(float("nan"))

    def slice_of(x: Tensor, position: Tensor) -> Tensor:
        return x.gather(2, position[:, None, :, None].expand(-1, 2, -1, 32))

    position = torch.arange(30).expand(3, -1)  # the longest row's; the shorter write behind their length, too
    append_to_kvcache(
        slice_of(k_all, position), slice_of(v_all, position), k_cache, v_cache, position, block_table=table
    )
    for count in blocks:
        position = (lengths[:, None] + torch.arange(count)).int()
        new = (slice_of(x, position.long()) for x in (k_all, v_all))
        append_to_kvcache(*new, k_cache, v_cache, position, block_table=table)
        end = position + 1 if count == 1 else (position[:, -1:] + 1).expand(-1, count)
        mask = IntervalMask(torch.zeros_like(position), end.int().contiguous(), num_keys=64)
        q = torch.randn(3, 4, count, 32)
        out = interval_attention_with_kvcache(q, k_cache, v_cache, mask, block_table=table)
        torch.testing.assert_close(out, interval_attention(q, k_all, v_all, mask))
        lengths = lengths + count


def test_compiles_whole_and_passes_opcheck() -> None:
    mask = FAMILIES["block_against_cache"]
    q, k, v = inputs_for(mask, 2, 32)
    k_pages, v_pages, table = paged(k, v, slots=16)
    position = torch.arange(21).expand(2, -1)

    def step(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask) -> Tensor:
        append_to_kvcache(q[:, :2], q[:, 2:], k, v, position, block_table=table)
        out = interval_attention_with_kvcache(q, k, v, mask, block_table=table)
        assert isinstance(out, Tensor)
        return out

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    later = IntervalMask(mask.first_key, mask.end_key.clamp(max=45), num_keys=SIZE)
    for each in (mask, later):
        eager, ours = (f(q, k_pages.clone(), v_pages.clone(), each) for f in (step, compiled))
        torch.testing.assert_close(ours, eager)
    assert counter.frame_count == 1
    arguments = (q, k_pages, v_pages, mask.first_key, mask.end_key, table, SIZE, 0.2, 0, "cpu")
    torch.library.opcheck(torch.ops.transfusion.interval_attention_with_kvcache.default, arguments)


@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 1, 8), (2, 0, 8), (2, 3, 0)])
def test_nothing_to_do(batch: int, queries: int, keys: int) -> None:
    mask = IntervalMask(*torch.zeros(2, batch, queries, dtype=torch.int32), num_keys=keys)
    q, k = torch.randn(batch, 4, queries, 32), torch.randn(batch, 2, keys, 32)
    for backend in ("cpu", "reference"):
        out, lse = interval_attention_with_kvcache(q, k, k, mask, return_lse=True, backend=backend)
        assert out.shape == q.shape
        assert not out.any()
        assert bool((lse == float("-inf")).all())
    append_to_kvcache(k[:, :, :0], k[:, :, :0], k, k, torch.zeros(batch, 0, dtype=torch.int64))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_rows_that_see_nothing_reach_no_page(backend: str) -> None:
    k = torch.randn(3, 2, 16, 32)
    q = torch.randn(2, 4, 1, 32)
    table = torch.tensor([[0, 9, -1, 7], [1, 2, 0, 1]], dtype=torch.int32)
    mask = IntervalMask(*torch.tensor([[[17], [0]], [[17], [50]]], dtype=torch.int32), num_keys=64)
    out, lse = interval_attention_with_kvcache(
        q, k, k, mask, block_table=table, return_lse=True, backend=backend
    )
    assert not out[0].any()
    assert bool((lse[0] == float("-inf")).all())
    alone = IntervalMask(mask.first_key[1:], mask.end_key[1:], num_keys=64)
    expected = interval_attention_with_kvcache(q[1:], k, k, alone, block_table=table[1:], backend=backend)
    torch.testing.assert_close(out[1:], expected)
    blind = ends([17], [17], num_keys=64, first=17)
    out, lse = interval_attention_with_kvcache(
        q, k, k, blind, block_table=table, return_lse=True, backend=backend
    )
    assert not out.any()
    assert bool((lse == float("-inf")).all())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("pages", [0, 2])
def test_a_cache_without_pages(pages: int, backend: str) -> None:
    """No pages in the cache, with and without places for them in the table."""
    mask = ends([0], [0], num_keys=16 * pages)
    k, table = torch.empty(0, 2, 16, 32), torch.zeros(2, pages, dtype=torch.int32)
    out, lse = interval_attention_with_kvcache(
        torch.randn(2, 4, 1, 32), k, k, mask, block_table=table, return_lse=True, backend=backend
    )
    assert not out.any()
    assert bool((lse == float("-inf")).all())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast_changes_nothing(backend: str) -> None:
    mask = FAMILIES["block_against_cache"]
    q, k, v = inputs_for(mask, 2, 32)
    exact = interval_attention_with_kvcache(q, k, v, mask, return_lse=True, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        actual = interval_attention_with_kvcache(q, k, v, mask, return_lse=True, backend=backend)
    torch.testing.assert_close(actual, exact, rtol=0, atol=0)


TABLE = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.randn(2, 4, 32)}, r"q: got shape \(2, 4, 32\)"),
        ({"q": torch.randn(2, 3, 5, 32)}, "k_cache: got 2 heads, takes a number that divides q's 3"),
        (
            {"k_cache": torch.randn(3, 2, 64, 32)},
            r"k_cache: got shape .*, takes \[2, key heads, keys, 32\] as q",
        ),
        ({"v_cache": torch.randn(2, 2, 63, 32)}, "v_cache: got shape .*, takes k_cache's"),
        ({"v_cache": torch.randn(2, 2, 64, 32).half()}, "v_cache: got torch.float16, takes q's dtype"),
        ({"k_cache": torch.randn(2, 2, 32, 64).mT}, "k_cache: got last stride 64"),
        (
            {"mask": ends([1] * 4, [1] * 4, num_keys=64)},
            r"mask: got bounds of shape \(2, 4\), takes \[2 or 1, 5\]",
        ),
        ({"mask": ends([1] * 5, num_keys=65)}, "mask: got num_keys 65, takes at most .* 64"),
        ({"mask": ends([65] * 5, num_keys=64)}, "end_key: got 65, takes keys from 0 to num_keys, 64"),
        ({"block_table": TABLE.long()}, "block_table: got torch.int64, takes torch.int32"),
        ({"block_table": TABLE[:1]}, r"block_table: got shape \(1, 2\), takes \[2, pages of a row\] as q"),
        ({"block_table": TABLE.to("meta")}, "block_table: got device meta"),
        ({"block_table": TABLE.T}, "block_table: got last stride 2"),
        ({"block_table": TABLE}, "block_table: got page 2, takes pages from 0 to 1"),
        ({"block_table": [0, 1]}, "block_table: got list, takes a tensor"),
        (
            {"k_cache": torch.randn(4, 2, 0, 32), "v_cache": torch.randn(4, 2, 0, 32), "block_table": TABLE},
            r"k_cache: got shape \(4, 2, 0, 32\), takes pages of one slot or more",
        ),
        ({"num_splits": -1}, "num_splits: got -1"),
        ({"scale": float("nan")}, "scale: got nan"),
        ({"backend": "flash"}, "backend: got 'flash'"),
        (
            {"k_cache": torch.randn(2, 2, 64, 32, requires_grad=True)},
            "k_cache: got a tensor that requires a grad",
        ),
    ],
)
def test_attention_refuses(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "q": torch.randn(2, 4, 5, 32),
        "k_cache": torch.randn(2, 2, 64, 32),
        "v_cache": torch.randn(2, 2, 64, 32),
        "mask": ends([64] * 5, [64] * 5, num_keys=64),
    }
    interval_attention_with_kvcache(**arguments)
    with pytest.raises(ValueError, match=message):
        interval_attention_with_kvcache(**(arguments | changes))


def test_a_gradient_that_is_not_asked_for_is_no_reason_to_refuse() -> None:
    q, k, v = (x.requires_grad_() for x in inputs_for(FAMILIES["causal"], 1, 32))
    with torch.no_grad():
        assert not interval_attention_with_kvcache(q, k, v, FAMILIES["causal"]).requires_grad
        append_to_kvcache(k, v, k.detach().clone(), v.detach().clone(), torch.arange(SIZE).expand(2, -1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": torch.randn(2, 3, 32)}, r"k: got shape \(2, 3, 32\)"),
        ({"v": torch.randn(2, 2, 4, 32)}, r"v: got shape \(2, 2, 4, 32\), takes k's"),
        ({"v": torch.randn(2, 2, 3, 32).half()}, "v: got dtype torch.float16, takes k's, torch.float32"),
        (
            {"k_cache": torch.randn(2, 2, 64, 16)},
            r"k_cache: got shape .*, takes \[2, key heads, slots, 32\] as k is",
        ),
        (
            {"k_cache": torch.randn(2, 1, 64, 32), "v_cache": torch.randn(2, 1, 64, 32)},
            "k_cache: got 1 heads",
        ),
        ({"v_cache": torch.randn(2, 2, 64, 32).half()}, "v_cache: got torch.float16, takes k's dtype"),
        (
            {"positions": torch.zeros(2, 4, dtype=torch.int64)},
            r"positions: got .* of shape \(2, 4\), takes .*\[2, 3\]",
        ),
        ({"positions": torch.zeros(2, 3)}, "positions: got torch.float32"),
        ({"positions": torch.zeros(2, 3, dtype=torch.int64, device="meta")}, "positions: got device meta"),
        (
            {"positions": torch.tensor([[0, 1, 2], [62, 63, 64]])},
            "positions: got 64, takes those from 0 to 63",
        ),
        ({"positions": torch.tensor([[-1, 1, 2], [1, 2, 3]])}, "positions: got -1, takes those from 0 to 63"),
        ({"block_table": TABLE[:, :1] + 5}, "block_table: got page 5, takes pages from 0 to 1"),
        (
            {"k_cache": torch.randn(4, 2, 0, 32), "v_cache": torch.randn(4, 2, 0, 32), "block_table": TABLE},
            r"k_cache: got shape \(4, 2, 0, 32\), takes pages of one slot or more",
        ),
        (
            {"k_cache": torch.zeros(1, 2, 64, 32).expand(2, -1, -1, -1)},
            r"k_cache: got strides \(0, .*\) for shape \(2, 2, 64, 32\), takes memory of its own for each element",
        ),
        ({"v_cache": torch.zeros(2, 2, 1, 32).expand(-1, -1, 64, -1)}, r"v_cache: got strides .* of its own"),
        *(
            ({name: torch.randn(2, 2, size, 32, requires_grad=True)}, f"{name}: got a tensor that requires a")
            for name, size in (("k", 3), ("v", 3), ("k_cache", 64), ("v_cache", 64))
        ),
        ({"block_table": TABLE.long()}, "block_table: got torch.int64, takes torch.int32"),
    ],
)
def test_appending_refuses(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "k": torch.randn(2, 2, 3, 32),
        "v": torch.randn(2, 2, 3, 32),
        "k_cache": torch.zeros(2, 2, 64, 32),
        "v_cache": torch.zeros(2, 2, 64, 32),
        "positions": torch.tensor([[0, 1, 2], [61, 62, 63]]),
    }
    append_to_kvcache(**arguments)
    with pytest.raises(ValueError, match=message):
        append_to_kvcache(**(arguments | changes))


def test_hopper_kernels_take_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = torch.randn(1, 2, 1, 64), torch.randn(1, 2, 8, 64)
    mask = IntervalMask(*torch.tensor([[[0]], [[8]]], dtype=torch.int32), num_keys=8)
    takes = "takes 'auto', 'triton', 'cpu' or 'reference' with a cache"
    with pytest.raises(ValueError, match=f"backend: got 'hopper' by the argument 'backend', {takes}"):
        interval_attention_with_kvcache(q, k, k, mask, backend="hopper")
    monkeypatch.setenv("TRANSFUSION_ATTENTION", "hopper")
    # The environment is for training too, and leaves a cache to what takes one.
    assert dispatch.choose_for_cache("auto", q).implementation == "cpu"
    expected = interval_attention_with_kvcache(q, k, k, mask, backend="cpu")
    assert torch.equal(interval_attention_with_kvcache(q, k, k, mask), expected)
    monkeypatch.setenv("TRANSFUSION_ATTENTION", "reference")
    assert dispatch.choose_for_cache("auto", q).implementation == "reference"
    monkeypatch.setenv("TRANSFUSION_ATTENTION", "auto")
    monkeypatch.setattr(dispatch, "_automatic", lambda q: dispatch.Choice("hopper", "a Hopper GPU"))
    assert dispatch.choose("auto", q).implementation == "hopper"
    assert dispatch.choose_for_cache("auto", q).implementation == "triton"
