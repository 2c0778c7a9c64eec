"""The Triton kernels run by Triton's interpreter on the CPU: every mask, and a cover of pairs of everything else.

Needs TRITON_INTERPRET=1 before the first import of the kernels, so a process of its own: `test_interpreter.py` starts
one. bfloat16 is left to a GPU, because the interpreter's products of it are wrong.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from transfusion_kernels import IntervalMask, interval_attention
from transfusion_kernels.testing import (
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

FAMILIES = mask_families(80)
# Heads and widths, taken in turn by the masks.
FORMS = itertools.cycle([(1, 32), (2, 96), (4, 64), (2, 32), (1, 96)])
CASES = [(name, group, width) for name, (group, width) in zip(FAMILIES, FORMS, strict=False)]


def compare(mask: IntervalMask, group: int, width: int, dtype: torch.dtype, bar: float) -> None:
    torch.manual_seed(width)
    heads = max(group, 2)
    q = torch.randn(2, mask.num_queries, heads, width, dtype=dtype).transpose(1, 2).requires_grad_()
    k = torch.randn(2, heads // group, mask.num_keys, width, dtype=dtype).requires_grad_()
    v = torch.randn(2, mask.num_keys, 2, heads // group, width, dtype=dtype)[:, :, 1].transpose(1, 2)
    v.requires_grad_()
    grad_out = torch.randn_like(q)
    exact_out, exact_lse, exact_gradients = exact_attention(q, k, v, mask, grad_out)
    for deterministic in (False, True):
        with poisoned_memory():
            out, lse = interval_attention(
                q, k, v, mask, backend="triton", deterministic=deterministic, return_lse=True
            )
            gradients = torch.autograd.grad(out, (q, k, v), grad_out)
        assert relative_error(out, exact_out) < bar
        for name, gradient, exact in zip("qkv", gradients, exact_gradients, strict=True):
            assert relative_error(gradient, exact, floor=1.0) < bar, (name, deterministic)
        sees = ~exact_lse.isinf()
        assert bool((lse[~sees] == float("-inf")).all())
        torch.testing.assert_close(lse[sees].double(), exact_lse[sees], rtol=bar, atol=bar)


@pytest.mark.parametrize(("name", "group", "width"), CASES)
def test_equals_the_reference_in_float32(name: str, group: int, width: int) -> None:
    compare(FAMILIES[name], group, width, torch.float32, bar=5e-6)


@pytest.mark.parametrize("name", ["uneven_documents", "block_against_cache"])
def test_equals_the_reference_in_float16(name: str) -> None:
    compare(FAMILIES[name], 2, 32, torch.float16, bar=1e-3)


@pytest.mark.parametrize("width", [128, 256])
def test_wide_heads(width: int) -> None:
    compare(mask_of(33, [(0, 20), (20, 33)], [(22, 30)], length=31), 1, width, torch.float32, bar=5e-6)


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
    mask = FAMILIES["shared_row"]
    q, k, v = (torch.randn(2, 2, 80, 32) for _ in range(3))
    compiled = torch.compile(
        lambda *x: interval_attention(*x, mask, backend="triton"), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(q, k, v), interval_attention(q, k, v, mask))


def test_operator_passes_opcheck() -> None:
    mask = mask_of(40, [(0, 40)], [(5, 20)])
    q, k, v = (torch.randn(1, 2, 40, 32, requires_grad=True) for _ in range(3))
    columns = (mask.first_query, mask.end_query, mask.query_order, mask.key_order)
    arguments = (q, k, v, mask.first_key, mask.end_key, *columns, 0.2, True, "triton")
    torch.library.opcheck(torch.ops.transfusion.interval_attention.default, arguments)
