"""The Hopper kernels on a Hopper GPU, as `test_gpu.py` tests the portable ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_gpu import FAMILIES, inputs_for

from transfusion_kernels import explain, interval_attention
from transfusion_kernels.attention import hopper
from transfusion_kernels.verification.testing import (
    exact_attention,
    mask_of,
    poisoned_memory,
    relative_error,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
        reason="needs a GPU of compute capability 9",
    ),
]


@pytest.mark.parametrize("width", [64, 128])
def test_is_what_auto_chooses(width: int) -> None:
    mask = FAMILIES["causal"].to("cuda")
    choice = explain(*inputs_for(mask, 1, width, torch.bfloat16)[:3], mask)
    assert choice.implementation == "hopper", choice


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"size_one"}))
def test_is_as_exact_as_dense_attention(name: str, group: int, width: int, dtype: torch.dtype) -> None:
    mask = FAMILIES[name].to("cuda")
    q, k, v, grad_out = inputs_for(mask, group, width, dtype)
    dense = mask.dense()[:, None]
    sees = dense.any(-1, keepdim=True)
    grad_out = grad_out * sees
    exact_out, exact_lse, exact_gradients = exact_attention(q, k, v, mask, grad_out)
    with poisoned_memory():
        out, lse = interval_attention(q, k, v, mask, return_lse=True, backend="hopper")
        gradients = torch.autograd.grad(out, (q, k, v), grad_out)
    repeated = (x.repeat_interleave(group, dim=1) for x in (k, v))
    dense_out = F.scaled_dot_product_attention(q, *repeated, attn_mask=dense | ~sees) * sees
    dense_gradients = torch.autograd.grad(dense_out, (q, k, v), grad_out)
    for ours, theirs, exact in zip(
        (out, *gradients), (dense_out, *dense_gradients), (exact_out, *exact_gradients), strict=True
    ):
        assert relative_error(ours, exact) <= 1.5 * relative_error(theirs, exact)
    assert torch.equal(lse.isinf(), exact_lse.isinf())
    assert relative_error(lse.exp(), exact_lse.exp()) < 1e-4


@pytest.mark.parametrize("width", [64, 128])
def test_races_would_move_the_result(width: int) -> None:
    """The output and the gradients of keys and values have the same bits on every run."""
    mask = mask_of(2000, [(0, 900), (900, 2000)], [(100, 600), (950, 1300)]).to("cuda")
    q, k, v, grad_out = inputs_for(mask, 2, width, torch.bfloat16)
    first = None
    for _ in range(100):
        out = interval_attention(q, k, v, mask, backend="hopper")
        _, dk, dv = torch.autograd.grad(out, (q, k, v), grad_out)
        first = first or (out, dk, dv)
        assert all(torch.equal(again, before) for again, before in zip((out, dk, dv), first, strict=True))


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"size_one"}))
def test_programs_take_item_after_item(name: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever computes a tile, and after whichever others, it has the same bits."""
    mask = FAMILIES[name].to("cuda")
    q, k, v, _ = inputs_for(mask, 2, width, torch.bfloat16)
    alone = interval_attention(q, k, v, mask, return_lse=True, backend="hopper")
    monkeypatch.setattr(hopper, "processors", lambda device: 3)
    with poisoned_memory():
        after_others = interval_attention(q, k, v, mask, return_lse=True, backend="hopper")
    assert all(torch.equal(ours, expected) for ours, expected in zip(after_others, alone, strict=True))


@pytest.mark.parametrize("width", [64, 128])
def test_replays_in_a_graph(width: int) -> None:
    mask = FAMILIES["uneven_documents"].to("cuda")
    q, k, v, _ = inputs_for(mask, 2, width, torch.bfloat16)
    expected = interval_attention(q, k, v, mask, backend="hopper")
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = interval_attention(q, k, v, mask, backend="hopper")
    graph.replay()
    assert torch.equal(out, expected)
