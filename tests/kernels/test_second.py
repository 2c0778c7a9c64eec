"""A second interval for some queries, against the dense definition in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from transfusion_kernels import IntervalMask, interval_attention
from transfusion_kernels.verification.testing import (
    exact_attention,
    mask_families,
    mask_of,
    relative_error,
    second_interval,
)

BAR = 5e-6
SIZE = 170
FAMILIES = [name for name in mask_families(SIZE) if name != "size_one"]
Second = tuple[Tensor, IntervalMask]


def inputs(mask: IntervalMask, group: int, width: int = 32, seed: int = 0) -> tuple[Tensor, ...]:
    """Strided queries, keys and values of two rows, and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    heads = max(2, group)
    q = torch.randn(2, mask.num_queries, heads, width, generator=generator).transpose(1, 2)
    k = torch.randn(2, heads // group, mask.num_keys, width, generator=generator)
    v = torch.randn(2, mask.num_keys, 2, heads // group, width, generator=generator)[:, :, 1].transpose(1, 2)
    return q, k, v, torch.randn(q.shape, generator=generator)


def errors(mask: IntervalMask, second: Second, tensors: tuple[Tensor, ...], **how: Any) -> dict[str, float]:
    q, k, v, grad_out = tensors
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = interval_attention(*leaves, mask, second=second, return_lse=True, **how)
    gradients = torch.autograd.grad(out, leaves, grad_out)
    exact_out, exact_lse, exact_gradients = exact_attention(q, k, v, mask, grad_out, second=second)
    assert how["backend"] == "reference" or out.transpose(1, 2).is_contiguous()
    return {
        "out": relative_error(out, exact_out),
        "lse": relative_error(lse.exp(), exact_lse.exp()),
        **{
            name: relative_error(ours, exact, floor=1.0)
            for name, ours, exact in zip(("dq", "dk", "dv"), gradients, exact_gradients, strict=True)
        },
    }


@pytest.mark.parametrize("backend", ["cpu", pytest.param("reference", marks=pytest.mark.slow)])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("name", FAMILIES)
def test_equals_the_definition(name: str, side: str, group: int, backend: str) -> None:
    mask = mask_families(SIZE)[name]
    second = second_interval(mask, side, batch=2)
    found = errors(mask, second, inputs(mask, group), backend=backend)
    assert max(found.values()) < BAR, found


def test_it_is_seen() -> None:
    """The definition itself: named queries attend to both, the others to the first alone."""
    mask = mask_of(12, [(0, 6), (6, 12)])
    rows = torch.tensor([[8, 10]])
    second = (rows, IntervalMask(*torch.tensor([[[1, 1]], [[4, 5]]], dtype=torch.int32), num_keys=12))
    q, k, v, _ = inputs(mask, 1)
    out = interval_attention(q, k, v, mask, second=second, backend="reference")
    assert isinstance(out, Tensor)
    for query in range(12):
        keys = list(range(0 if query < 6 else 6, query + 1))
        keys += {8: [1, 2, 3], 10: [1, 2, 3, 4]}.get(query, [])
        scores = (q[:, :, query, None] * k[:, :, keys]).sum(-1) * 32**-0.5
        torch.testing.assert_close(out[:, :, query], (scores.softmax(-1)[..., None] * v[:, :, keys]).sum(2))


def test_a_second_interval_that_is_empty_adds_nothing() -> None:
    mask = mask_families(SIZE)["uneven_documents"]
    rows, other = second_interval(mask, "before", batch=2)
    empty = IntervalMask(other.end_key, other.end_key, num_keys=SIZE)
    q, k, v, _ = inputs(mask, 1)
    plain = interval_attention(q, k, v, mask)
    torch.testing.assert_close(
        interval_attention(q, k, v, mask, second=(rows, empty)), plain, rtol=0, atol=1e-7
    )
    none = torch.zeros(2, 0, dtype=torch.int64)
    nothing = IntervalMask(none.int(), none.int(), num_keys=SIZE)
    for backend in ("cpu", "reference"):
        q.requires_grad_()
        out = interval_attention(q, k, v, mask, second=(none, nothing), backend=backend)
        torch.testing.assert_close(out, plain)
        assert isinstance(out, Tensor)
        out.sum().backward()


def test_the_order_of_rows_and_their_type_do_not_matter() -> None:
    mask = mask_families(SIZE)["uneven_documents"]
    rows, other = second_interval(mask, "after", batch=1)
    q, k, v, _ = inputs(mask, 1)
    one = interval_attention(q, k, v, mask, second=(rows, other))
    two = interval_attention(q, k, v, mask, second=(rows.int().expand(2, -1), other))
    assert torch.equal(one, two)  # type: ignore[arg-type]


def test_compiles_whole_and_passes_opcheck() -> None:
    mask = mask_families(SIZE)["uneven_documents"]
    rows, other = second_interval(mask, "before", batch=2)
    q, k, v, grad_out = inputs(mask, 2)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]

    def attend(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, first: Tensor, end: Tensor) -> Tensor:
        second = (rows, IntervalMask(first, end, num_keys=SIZE))
        out = interval_attention(q, k, v, mask, second=second)
        assert isinstance(out, Tensor)
        return out

    arguments = (*leaves, rows, other.first_key, other.end_key)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")(*arguments)
    plain = attend(*arguments)
    torch.testing.assert_close(compiled, plain)
    for ours, theirs in zip(
        torch.autograd.grad(compiled, leaves, grad_out),
        torch.autograd.grad(plain, leaves, grad_out),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    bounds = (mask.first_key, mask.end_key, None, None, None, None)
    others = (rows, other.first_key, other.end_key, None, None, None, None)
    operator = torch.ops.transfusion.interval_attention.default
    torch.library.opcheck(operator, (*leaves, *bounds, *others, 0.2, False, False, False, "cpu"))


def interval(first: int, end: int, count: int = 1, keys: int = 8) -> IntervalMask:
    return IntervalMask(
        *(torch.full((1, count), value, dtype=torch.int32) for value in (first, end)), num_keys=keys
    )


@pytest.mark.parametrize(
    ("rows", "other", "message"),
    [
        (
            torch.tensor([[5]]),
            interval(3, 5),
            r"second\[1\]: got keys 3 to 5 for query 5 of row 0, .*, 4 to 6",
        ),
        (torch.tensor([[5, 5]]), interval(0, 2, 2), r"second\[0\]: got query 5 twice in row 0"),
        (torch.tensor([[8]]), interval(0, 2), r"second\[0\]: got query 8, takes queries from 0 to 7"),
        (torch.tensor([[-1]]), interval(0, 2), r"second\[0\]: got query -1"),
        (torch.tensor([5]), interval(0, 2), r"second\[0\]: got shape \(1,\)"),
        (torch.tensor([[5.0]]), interval(0, 2), r"second\[0\]: got torch.float32"),
        (
            torch.tensor([[5]]),
            interval(0, 2, 2),
            r"second\[1\]: got bounds of shape \(1, 2\), takes \[1 or 1, 1\]",
        ),
        (torch.tensor([[5]]), interval(0, 2, keys=9), r"second\[1\]: got num_keys 9, takes the mask's, 8"),
        (torch.tensor([[5]]), interval(0, 9), r"end_key: got 9"),
        (torch.tensor([[5]]), "no mask", r"second\[1\]: got str, takes an IntervalMask"),
        ([[5]], interval(0, 2), r"second\[0\]: got list, takes a tensor"),
    ],
)
def test_what_is_no_second_interval_is_refused(rows: Any, other: Any, message: str) -> None:
    mask = mask_of(8, [(0, 4), (4, 8)])
    q = torch.randn(1, 2, 8, 16)
    with pytest.raises(ValueError, match=message):
        interval_attention(q, q, q, mask, second=(rows, other))
