"""A second interval for some queries by the Triton kernels, in Triton's interpreter: see `test_interpreted.py`."""

from __future__ import annotations

import pytest
import torch

from transfusion_kernels import interval_attention
from transfusion_kernels.verification.testing import (
    exact_attention,
    mask_families,
    poisoned_memory,
    relative_error,
    second_interval,
)

triton = pytest.importorskip("triton", reason="triton is not installed")
pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(
        not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1 in a process of its own"
    ),
]

SIZE = 70


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("name", ["uneven_documents", "padded_tail", "sliding_window", "shared_row"])
def test_equals_the_definition(name: str, side: str, deterministic: bool) -> None:
    mask = mask_families(SIZE)[name]
    second = second_interval(mask, side, batch=2)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, mask.num_queries, 2, 32, generator=generator).transpose(1, 2).requires_grad_()
    k, v = (torch.randn(2, 1, mask.num_keys, 32, generator=generator).requires_grad_() for _ in range(2))
    grad_out = torch.randn(q.shape, generator=generator)
    with poisoned_memory():
        out, lse = interval_attention(
            q, k, v, mask, second=second, deterministic=deterministic, return_lse=True, backend="triton"
        )
        gradients = torch.autograd.grad(out, (q, k, v), grad_out)
    exact_out, exact_lse, exact_gradients = exact_attention(q, k, v, mask, grad_out, second=second)
    assert relative_error(lse.exp(), exact_lse.exp()) < 5e-6
    for ours, expected in zip((out, *gradients), (exact_out, *exact_gradients), strict=True):
        assert relative_error(ours, expected, floor=1.0) < 5e-6
