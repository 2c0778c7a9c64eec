"""The Triton kernels run by Triton's interpreter on the CPU: every mask, and a cover of pairs of everything else.

Needs TRITON_INTERPRET=1 before the first import of the kernels, so a process of its own: `test_interpreter.py` starts
one. bfloat16 is left to a GPU, because the interpreter's products of it are wrong.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from transfusion_kernels import IntervalMask, interval_attention
from transfusion_kernels.attention import tiles
from transfusion_kernels.verification.testing import (
    exact_attention,
    mask_families,
    mask_of,
    poisoned_memory,
    relative_error,
)

triton = pytest.importorskip("triton", reason="triton is not installed")
pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(
        not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1 in a process of its own"
    ),
]

AXES = {
    "family": list(mask_families(64)),
    "size": [64, 77, 127, 128],
    "group": [1, 2, 8],
    "width": [32, 64, 96, 128],
    # How rows lie in memory: heads apart, joined, one of several projections in one tensor, and at addresses that
    # descriptors do not take.
    "layout": ["heads", "joined", "packed", "unaligned"],
    "deterministic": [False, True],
}


@pytest.fixture(autouse=True)
def _products_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's products are numpy's, whose order of sums depends on the processor. Here it does not."""
    matmul = np.matmul
    monkeypatch.setattr(np, "matmul", lambda a, b, dtype: matmul(a, b, dtype=np.float64).astype(dtype))


def pairwise_cover(axes: dict[str, list[Any]], seed: int) -> list[dict[str, Any]]:
    """Cases that between them hold every pair of values of two axes, found greedily among random ones."""
    source = random.Random(seed)
    missing = {
        frozenset([(one, x), (other, y)])
        for one, other in itertools.combinations(axes, 2)
        for x, y in itertools.product(axes[one], axes[other])
    }
    cases = []
    while missing:
        # Seeded with a pair that is missing, so that each case removes one.
        wanted = dict(min(missing, key=sorted_text))
        candidates = [{name: source.choice(axes[name]) for name in axes} | wanted for _ in range(40)]
        best = max(candidates, key=lambda case: len(missing & pairs_of(case)))
        missing -= pairs_of(best)
        cases.append(best)
    return cases


def pairs_of(case: dict[str, Any]) -> set[frozenset[tuple[str, Any]]]:
    return {frozenset(pair) for pair in itertools.combinations(case.items(), 2)}


def sorted_text(pair: frozenset[tuple[str, Any]]) -> list[str]:
    return sorted(map(str, pair))


def rows_in_memory(layout: str, heads: int, size: int, width: int, dtype: torch.dtype) -> Tensor:
    """Random [2, heads, size, width] of that layout."""
    if layout == "heads":
        rows = torch.randn(2, heads, size, width, dtype=dtype)
    elif layout == "joined":
        rows = torch.randn(2, size, heads, width, dtype=dtype).transpose(1, 2)
    elif layout == "packed":
        rows = torch.randn(2, size, 2, heads, width, dtype=dtype)[:, :, 1].transpose(1, 2)
    else:
        rows = torch.randn(2, heads, size, width + 1, dtype=dtype)[..., 1:]
    return rows.requires_grad_()


def compare(
    mask: IntervalMask,
    group: int,
    width: int,
    dtype: torch.dtype,
    bar: float,
    layout: str = "joined",
    deterministic: bool = False,
) -> None:
    torch.manual_seed(width)
    heads = max(group, 2)
    q = rows_in_memory(layout, heads, mask.num_queries, width, dtype)
    k, v = (rows_in_memory(layout, heads // group, mask.num_keys, width, dtype) for _ in range(2))
    grad_out = torch.randn_like(q)
    exact_out, exact_lse, exact_gradients = exact_attention(q, k, v, mask, grad_out)
    with poisoned_memory():
        out, lse = interval_attention(
            q, k, v, mask, backend="triton", deterministic=deterministic, return_lse=True
        )
        gradients = torch.autograd.grad(out, (q, k, v), grad_out)
    assert relative_error(out, exact_out) < bar
    for name, gradient, exact in zip("qkv", gradients, exact_gradients, strict=True):
        assert relative_error(gradient, exact, floor=1.0) < bar, name
    sees = ~exact_lse.isinf()
    assert bool((lse[~sees] == float("-inf")).all())
    torch.testing.assert_close(lse[sees].double(), exact_lse[sees], rtol=bar, atol=bar)


CASES = pairwise_cover(AXES, seed=0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_equals_the_reference_in_float32(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # Heads one by one, a few or all side by side.
    monkeypatch.setattr(tiles, "LEAST_TOGETHER", 1)
    monkeypatch.setattr(tiles, "CACHE_BYTES", (0, 60_000, tiles.CACHE_BYTES)[CASES.index(case) % 3])
    mask = mask_families(case["size"])[case["family"]]
    settings = {name: case[name] for name in ("group", "width", "layout", "deterministic")}
    compare(mask, **settings, dtype=torch.float32, bar=5e-6)


@pytest.mark.parametrize("name", ["uneven_documents", "block_against_cache"])
def test_equals_the_reference_in_float16(name: str) -> None:
    for deterministic in (False, True):
        compare(mask_families(80)[name], 2, 32, torch.float16, bar=1e-3, deterministic=deterministic)


@pytest.mark.parametrize("deterministic", [False, True])
def test_widest_heads(deterministic: bool) -> None:
    mask = mask_of(33, [(0, 20), (20, 33)], [(22, 30)], length=31)
    compare(mask, 1, 256, torch.float32, bar=5e-6, deterministic=deterministic)


def test_very_low_scores_beside_keys_past_the_last() -> None:
    """A log-sum-exp far below 0 must not turn the padding of the last tile of keys into infinite weights."""
    mask = mask_of(70, [(0, 70)], [(0, 70)])
    q = torch.full((1, 1, 70, 32), 10.0, requires_grad=True)
    k = torch.full((1, 1, 70, 32), -10.0, requires_grad=True)
    v = torch.randn(1, 1, 70, 32, requires_grad=True)
    out = interval_attention(q, k, v, mask, backend="triton")
    for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
        assert bool(gradient.isfinite().all())


def test_nothing_to_do() -> None:
    for shape, queries, keys in (((0, 2), 8, 8), ((2, 2), 0, 8), ((2, 2), 4, 0)):
        q = torch.randn(*shape, queries, 32, requires_grad=True)
        k, v = (torch.randn(*shape, keys, 32, requires_grad=True) for _ in range(2))
        mask = IntervalMask(*torch.zeros(2, shape[0], queries, dtype=torch.int32), num_keys=keys)
        out = interval_attention(q, k, v, mask, backend="triton")
        assert not out.any()
        for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
            assert not gradient.any()


def test_compiles_whole() -> None:
    mask = mask_families(80)["shared_row"]
    q, k, v = (torch.randn(2, 2, 80, 32) for _ in range(3))
    compiled = torch.compile(
        lambda *x: interval_attention(*x, mask, backend="triton"), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(q, k, v), interval_attention(q, k, v, mask))


def test_a_mask_with_what_is_derived_from_it_compiles_nothing_anew() -> None:
    """As layers get masks on a GPU, where all is derived before the first of them."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask) -> Tensor:
        out = interval_attention(q, k, v, mask, backend="triton")
        assert isinstance(out, Tensor)
        return out

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    inputs = [torch.randn(2, 2, 80, 32, requires_grad=True) for _ in range(3)]
    for name in ("uneven_documents", "padded_tail"):
        mask = mask_families(80)[name]
        _ = mask.query_order, mask.key_order
        grad_out = torch.randn(2, 2, 80, 32)
        _, _, exact = exact_attention(*inputs, mask, grad_out)
        for ours, right in zip(
            torch.autograd.grad(compiled(*inputs, mask), inputs, grad_out), exact, strict=True
        ):
            assert relative_error(ours, right) < 5e-6
    assert counter.frame_count == 1


def test_operator_passes_opcheck() -> None:
    mask = mask_of(40, [(0, 40)], [(5, 20)])
    q, k, v = (torch.randn(1, 2, 40, 32, requires_grad=True) for _ in range(3))
    columns = (mask.first_query, mask.end_query, mask.query_order, mask.key_order)
    arguments = (
        q,
        k,
        v,
        mask.first_key,
        mask.end_key,
        *columns,
        *[None] * 7,
        0.2,
        True,
        False,
        False,
        "triton",
    )
    torch.library.opcheck(torch.ops.transfusion.interval_attention.default, arguments)
