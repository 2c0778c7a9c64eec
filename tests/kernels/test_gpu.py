"""The Triton kernels on a GPU, against the reference in float64 and against dense attention in the same dtype."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from transfusion_kernels import (
    IntervalMask,
    append_to_kvcache,
    explain,
    interval_attention,
    interval_attention_with_kvcache,
)
from transfusion_kernels.verification.testing import (
    exact_attention,
    mask_families,
    mask_of,
    paged,
    poisoned_memory,
    random_layout,
    relative_error,
    without_the_unseen,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FAMILIES = mask_families(700)
# Rows that see enough keys for the tiles of wide intervals: `mask.narrow` is false of them.
WIDE = {
    "causal": mask_of(2700, [(0, 2700)]),
    "image": mask_of(2700, [(0, 2700)], [(100, 2500)]),
    "two_documents": mask_of(5000, [(0, 2100), (2100, 5000)], [(5, 1900), (2100, 4999)]),
    "padded_tail": mask_of(2700, [(0, 2700)], [(600, 2600)], length=2650),
}


def inputs_for(
    mask: IntervalMask, group: int, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(width + group)
    heads = 4

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype)

    q = normal(2, mask.num_queries, heads, width).transpose(1, 2).requires_grad_()
    k = normal(2, heads // group, mask.num_keys, width).requires_grad_()
    v = normal(2, mask.num_keys, 2, heads // group, width)[:, :, 1].transpose(1, 2).requires_grad_()
    return q, k, v, normal(2, mask.num_queries, heads, width).transpose(1, 2)


def attend_with_gradients(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor], mask: IntervalMask, deterministic: bool
) -> list[Tensor]:
    q, k, v, grad_out = inputs
    with poisoned_memory():
        out = interval_attention(q, k, v, mask, deterministic=deterministic, backend="triton")
        return [out, *torch.autograd.grad(out, (q, k, v), grad_out)]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("width", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_equals_the_reference_in_float32(name: str, group: int, width: int, deterministic: bool) -> None:
    mask = FAMILIES[name].to("cuda")
    inputs = inputs_for(mask, group, width, torch.float32)
    assert explain(*inputs[:3], mask).implementation == "triton"
    exact_out, _, exact_gradients = exact_attention(*inputs[:3], mask, inputs[3])
    results = attend_with_gradients(inputs, mask, deterministic)
    for ours, exact in zip(results, (exact_out, *exact_gradients), strict=True):
        assert relative_error(ours, exact, floor=1.0) < 5e-6


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("width", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("name", WIDE)
def test_wide_intervals_equal_the_reference_in_float32(name: str, width: int, deterministic: bool) -> None:
    mask = WIDE[name].to("cuda")
    assert not mask.narrow
    inputs = inputs_for(mask, 2, width, torch.float32)
    exact_out, _, exact_gradients = exact_attention(*inputs[:3], mask, inputs[3])
    results = attend_with_gradients(inputs, mask, deterministic)
    for ours, exact in zip(results, (exact_out, *exact_gradients), strict=True):
        assert relative_error(ours, exact) < 5e-6


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"size_one"}))
def test_half_precision_is_as_exact_as_dense_attention(
    name: str, width: int, dtype: torch.dtype, deterministic: bool
) -> None:
    compare_with_dense_attention(FAMILIES[name].to("cuda"), width, dtype, deterministic)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("name", WIDE)
def test_wide_intervals_are_as_exact_as_dense_attention(
    name: str, width: int, dtype: torch.dtype, deterministic: bool
) -> None:
    mask = WIDE[name].to("cuda")
    assert not mask.narrow
    compare_with_dense_attention(mask, width, dtype, deterministic)


def compare_with_dense_attention(
    mask: IntervalMask, width: int, dtype: torch.dtype, deterministic: bool
) -> None:
    q, k, v, grad_out = inputs_for(mask, 2, width, dtype)
    dense = mask.dense()[:, None]
    sees = dense.any(-1, keepdim=True)
    grad_out = grad_out * sees
    exact_out, _, exact_gradients = exact_attention(q, k, v, mask, grad_out)
    results = attend_with_gradients((q, k, v, grad_out), mask, deterministic)
    repeated = (x.repeat_interleave(2, dim=1) for x in (k, v))
    dense_out = F.scaled_dot_product_attention(q, *repeated, attn_mask=dense | ~sees) * sees
    dense_gradients = torch.autograd.grad(dense_out, (q, k, v), grad_out)
    for ours, theirs, exact in zip(
        results, (dense_out, *dense_gradients), (exact_out, *exact_gradients), strict=True
    ):
        assert relative_error(ours, exact) <= 1.5 * relative_error(theirs, exact)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("wide", [False, True])
def test_deterministic_gradients_have_the_same_bits(wide: bool, width: int) -> None:
    mask = (WIDE["two_documents"] if wide else FAMILIES["uneven_documents"]).to("cuda")
    assert mask.narrow != wide
    inputs = inputs_for(mask, 2, width, torch.bfloat16)
    first = attend_with_gradients(inputs, mask, deterministic=True)
    for _ in range(99):
        for again, before in zip(attend_with_gradients(inputs, mask, deterministic=True), first, strict=True):
            assert torch.equal(again, before)


def test_building_a_mask_waits_for_nothing() -> None:
    starts, ends = torch.zeros(2, 8, 4096, dtype=torch.int64, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        mask = IntervalMask.from_spans(starts, ends)
        _ = mask.first_query, mask.end_query, mask.query_order, mask.key_order
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_derived_from_a_mask_is_what_the_cpu_derives(name: str) -> None:
    mask, moved = FAMILIES[name], FAMILIES[name].to("cuda")
    for derived in ("first_query", "end_query", "query_order", "key_order"):
        assert torch.equal(getattr(moved, derived).cpu(), getattr(mask, derived))


def test_a_mask_of_spans_is_what_the_cpu_makes_of_them() -> None:
    starts, ends, _, _ = random_layout(3, 700, seed=0)
    length = torch.tensor([700, 300, 0])
    mask = IntervalMask.from_spans(starts, ends, length=length)
    there = IntervalMask.from_spans(starts.cuda(), ends.cuda(), length=length.cuda())
    assert torch.equal(there.first_key.cpu(), mask.first_key)
    assert torch.equal(there.end_key.cpu(), mask.end_key)


def test_a_graph_replays_on_a_mask_that_changes() -> None:
    """What is derived from the mask is made anew by each replay, though it was there before the capture."""
    size = 300
    masks = [mask_of(size, spans).to("cuda") for spans in ([(0, size)], [(0, 90), (90, size)])]
    static = IntervalMask(masks[0].first_key.clone(), masks[0].end_key.clone())
    inputs = inputs_for(static, 2, 64, torch.float16)
    attend_with_gradients(inputs, static, deterministic=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend_with_gradients(inputs, static, deterministic=True)
    for mask in reversed(masks):
        static.first_key.copy_(mask.first_key)
        static.end_key.copy_(mask.end_key)
        graph.replay()
        for ours, right in zip(
            captured, attend_with_gradients(inputs, mask, deterministic=True), strict=True
        ):
            assert torch.equal(ours, right)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("along", [0, 1, 2])
def test_offsets_beyond_32_bits(along: int, deterministic: bool) -> None:
    """Strides fit into 32 bits and their multiples do not, so that it is the kernels that must widen them."""
    torch.manual_seed(along)
    far, width, size = 2**30 + 64, 64, [200, 200, 3][along]
    memory = torch.empty(3 * far, dtype=torch.bfloat16, device="cuda")
    shape = (3, 3, size, width)
    strides = [3 * size * width, size * width, width, 1]
    strides[along] = far
    span = 9 * size * width
    q, k, v = (
        memory.as_strided(shape, strides, begin * span).copy_(torch.randn(shape)).requires_grad_()
        for begin in range(3)
    )
    mask = mask_of(size, [(0, size // 2), (size // 2, size)], [(size // 2, size)]).to("cuda")
    grad_out = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    exact_out, _, exact_gradients = exact_attention(q, k, v, mask, grad_out)
    results = attend_with_gradients((q, k, v, grad_out), mask, deterministic)
    for ours, exact in zip(results, (exact_out, *exact_gradients), strict=True):
        assert relative_error(ours, exact) < 2e-2


# The families and an image block of 256 patches against a cache that is longer than one part.
CACHE_MASKS = {name: FAMILIES[name] for name in ("one_query", "block_against_cache", "sliding_window")}
CACHE_MASKS["image"] = IntervalMask(
    torch.zeros(2, 256, dtype=torch.int32),
    torch.tensor([[2900], [1300]], dtype=torch.int32).expand(2, 256),
    num_keys=3000,
)


@pytest.mark.parametrize(
    ("dtype", "bar"), [(torch.float32, 5e-6), (torch.float16, 2e-3), (torch.bfloat16, 1.5e-2)]
)
@pytest.mark.parametrize("parts", [0, 1, 5])
@pytest.mark.parametrize("slots", [0, 16, 7])
@pytest.mark.parametrize("width", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("name", CACHE_MASKS)
def test_attention_to_a_cache_equals_the_reference(
    name: str, width: int, slots: int, parts: int, dtype: torch.dtype, bar: float
) -> None:
    """What no query sees holds NaN, in the cache as on the pages."""
    torch.manual_seed(width)
    mask = CACHE_MASKS[name]
    q = torch.randn(2, mask.num_queries, 8, width, dtype=dtype).transpose(1, 2)
    k, v = torch.randn(2, 2, mask.num_keys, 2, width, dtype=dtype).transpose(2, 3).unbind()
    (k, k_zero), (v, v_zero) = without_the_unseen(k, mask), without_the_unseen(v, mask)
    exact, exact_lse, _ = exact_attention(
        q.cuda(), k_zero.cuda(), v_zero.cuda(), mask.to("cuda"), torch.zeros_like(q).cuda()
    )
    k, v, table = paged(k, v, slots) if slots else (k, v, None)
    with poisoned_memory():
        out, lse = interval_attention_with_kvcache(
            q.cuda(),
            k.cuda(),
            v.cuda(),
            mask.to("cuda"),
            block_table=None if table is None else table.cuda(),
            num_splits=parts,
            return_lse=True,
            backend="triton",
        )
    assert relative_error(out, exact) < bar
    torch.testing.assert_close(lse.double(), exact_lse, rtol=bar, atol=bar)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_paged", [False, True])
def test_appending_to_a_cache_writes_what_the_cpu_writes(is_paged: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    k, v = torch.randn(2, 2, 3, 5, 64, dtype=dtype).unbind()
    k_cache, v_cache = torch.randn(
        2, 10 if is_paged else 2, 3, 8 if is_paged else 40, 64, dtype=dtype
    ).unbind()
    table = torch.randperm(10)[:10].view(2, 5).int() if is_paged else None
    positions = torch.tensor([[6, 7, 8, 9, 10], [35, 36, 37, 38, 39]])
    on_gpu = [x.cuda() for x in (k, v, k_cache, v_cache, positions)]
    append_to_kvcache(k, v, k_cache, v_cache, positions, block_table=table)
    append_to_kvcache(*on_gpu, block_table=None if table is None else table.cuda())
    assert torch.equal(on_gpu[2].cpu(), k_cache)
    assert torch.equal(on_gpu[3].cpu(), v_cache)


@pytest.mark.parametrize("parts", [0, 1, 5])
@pytest.mark.parametrize("is_paged", [False, True])
def test_a_graph_of_a_cache_replays_on_new_inputs(is_paged: bool, parts: int) -> None:
    """A step of generation, captured once: new keys, positions, bounds and pages are those found at the replay."""
    torch.manual_seed(0)
    keys, slots, width = 2048, 16, 64
    half = {"dtype": torch.bfloat16, "device": "cuda"}
    rows = (2 * keys // slots, 2, slots, width) if is_paged else (2, 2, keys, width)
    k_cache, v_cache = torch.randn(2, *rows, **half).unbind()
    pages = torch.randperm(2 * keys // slots, device="cuda").view(2, -1).int()
    table = pages.clone() if is_paged else None
    q, k, v = torch.randn(2, 8, 1, width, **half), *torch.randn(2, 2, 2, 1, width, **half).unbind()
    positions = torch.tensor([[900], [3]], device="cuda")
    first_key = torch.zeros(2, 1, dtype=torch.int32, device="cuda")
    end_key = (positions + 1).int()

    def step() -> Tensor:
        mask = IntervalMask(first_key, end_key, num_keys=keys)
        append_to_kvcache(k, v, k_cache, v_cache, positions, block_table=table)
        return interval_attention_with_kvcache(
            q, k_cache, v_cache, mask, block_table=table, num_splits=parts, backend="triton"
        )

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for moved in ([[2000], [4]], [[17], [1500]]):
        positions.copy_(torch.tensor(moved))
        end_key.copy_(positions + 1)
        for x in (q, k, v):
            x.normal_()
        if table is not None:
            table.copy_(pages.flip(1))
        graph.replay()
        replayed = out.clone()
        assert torch.equal(replayed, step())
        assert relative_error(replayed, _against_rows(q, k_cache, v_cache, end_key, table)) < 1.5e-2


def _against_rows(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, end_key: Tensor, table: Tensor | None
) -> Tensor:
    """The reference in float64, against the rows that a table makes of pages."""
    if table is not None:
        k_cache, v_cache = (x[table.long()].transpose(1, 2).flatten(2, 3) for x in (k_cache, v_cache))
    mask = IntervalMask(torch.zeros_like(end_key), end_key, num_keys=k_cache.shape[2])
    return exact_attention(q, k_cache, v_cache, mask, torch.zeros_like(q))[0]
