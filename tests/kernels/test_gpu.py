"""The Triton kernels on a GPU, against the reference in float64 and against dense attention in the same dtype."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transfusion_kernels import IntervalMask, explain, interval_attention
from transfusion_kernels.testing import (
    exact_attention,
    mask_families,
    mask_of,
    poisoned_memory,
    relative_error,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FAMILIES = mask_families(700)


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
        out = interval_attention(q, k, v, mask, deterministic=deterministic)
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
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"size_one"}))
def test_half_precision_is_as_exact_as_dense_attention(
    name: str, width: int, dtype: torch.dtype, deterministic: bool
) -> None:
    mask = FAMILIES[name].to("cuda")
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


def test_deterministic_gradients_have_the_same_bits() -> None:
    mask = FAMILIES["uneven_documents"].to("cuda")
    inputs = inputs_for(mask, 2, 64, torch.bfloat16)
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


def test_offsets_beyond_32_bits() -> None:
    """Rows of a view that starts more than 2^31 elements into its storage."""
    mask = mask_of(256, [(0, 100), (100, 256)], [(120, 200)]).to("cuda")
    storage = torch.empty(2**31 + 4 * 256 * 64, dtype=torch.bfloat16, device="cuda")
    far = storage.as_strided((2, 1, 256, 64), (2**31 + 64, 256 * 64, 64, 1))
    far.copy_(torch.randn(2, 1, 256, 64))
    out = interval_attention(far, far, far, mask)
    torch.testing.assert_close(out, interval_attention(*(far.clone() for _ in range(3)), mask))
