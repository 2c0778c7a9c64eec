"""The CPU implementation against the reference in float64."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from transfusion_kernels import IntervalMask, interval_attention
from transfusion_kernels.attention import cpu, cpu_plan
from transfusion_kernels.verification.testing import (
    exact_attention,
    mask_families,
    mask_of,
    poisoned_memory,
    relative_error,
)

FAMILIES = mask_families(300)
HEADS = 4


def inputs_for(
    mask: IntervalMask, group: int, width: int, dtype: torch.dtype = torch.float32, batch: int = 2
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v that need gradients and a gradient of the output, in different memory layouts."""
    generator = torch.Generator().manual_seed(width + group)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    q = normal(batch, mask.num_queries, HEADS, width).transpose(1, 2)
    k = normal(batch, HEADS // group, mask.num_keys, width)
    v = normal(batch, mask.num_keys, 2, HEADS // group, width)[:, :, 1].transpose(1, 2)
    return (
        *(x.requires_grad_() for x in (q, k, v)),
        normal(batch, mask.num_queries, HEADS, width).transpose(1, 2),
    )


def attend_with_gradients(
    q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, grad_out: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    with poisoned_memory():
        out, lse = interval_attention(q, k, v, mask, return_lse=True, backend="cpu")
        return out, lse, torch.autograd.grad(out, (q, k, v), grad_out)


@pytest.mark.parametrize("width", [32, 64, 96])
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_equals_the_reference_in_float32(name: str, group: int, width: int) -> None:
    mask = FAMILIES[name]
    q, k, v, grad_out = inputs_for(mask, group, width)
    out, lse, gradients = attend_with_gradients(q, k, v, mask, grad_out)
    exact_out, exact_lse, exact_gradients = exact_attention(q, k, v, mask, grad_out)

    assert relative_error(out, exact_out) < 5e-6
    for gradient, exact, name in zip(gradients, exact_gradients, "qkv", strict=True):
        assert gradient.shape == exact.shape
        # The gradients of q and k are 0 where queries have one key each: then the error is not relative.
        assert relative_error(gradient, exact, floor=1.0) < 5e-6, name
    sees = ~exact_lse.isinf()
    assert torch.equal(~lse.isinf(), sees)
    assert bool((lse[~sees] == float("-inf")).all())
    torch.testing.assert_close(lse[sees].double(), exact_lse[sees], rtol=1e-5, atol=1e-5)


def campaign() -> Any:
    """campaigns/verify_cpu_attention.py, which runs the full product in a minute."""
    path = Path(__file__).parents[2] / "campaigns" / "verify_cpu_attention.py"
    specification = importlib.util.spec_from_file_location("verify_cpu_attention", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # where its data classes look for it
    specification.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_sample_of_the_full_product() -> None:
    verify = campaign()
    cases = list(verify.cases())
    assert len(cases) == len(set(cases)) == 2 * 16 * 3 * 5 * 2 * 3
    for case in random.Random(0).sample(cases, 80):
        assert not verify.misses(*verify.errors(case)), case


def test_the_full_product_misses_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    verify = campaign()
    case = verify.Case("uneven_documents", 67, 2, 32, "fp32", "fused")
    assert verify.misses(*verify.errors(case)) == []
    right = verify.attend
    monkeypatch.setattr(verify, "attend", lambda *x: tuple(y * (1 + 1e-5) for y in right(*x)))
    assert verify.misses(*verify.errors(case)) == ["out", "dq", "dk", "dv"]
    nothing = {name: float("nan") for name in verify.RESULT_NAMES}
    assert len(verify.misses(nothing, {})) == len(verify.misses(nothing, nothing)) == 4


@pytest.mark.parametrize("name", ["causal", "padding_only", "one_query"])
def test_padding_gets_zeros(name: str) -> None:
    mask = FAMILIES[name]
    q, k, v, grad_out = inputs_for(mask, 2, 32)
    out, _, (dq, dk, dv) = attend_with_gradients(q, k, v, mask, grad_out)
    dense = mask.dense()
    seen, sees = dense.any(1)[:, None, :, None], dense.any(2)[:, None, :, None]
    assert not out.masked_select(~sees).any()
    assert not dq.masked_select(~sees).any()
    assert not dk.masked_select(~seen).any()
    assert not dv.masked_select(~seen).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"size_one"}))
@pytest.mark.parametrize("short", [0, cpu.SHORT])
def test_half_precision_is_as_exact_as_dense_attention(
    name: str, dtype: torch.dtype, short: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "SHORT", short)
    mask = FAMILIES[name]
    q, k, v, grad_out = inputs_for(mask, 2, 64, dtype)
    dense = mask.dense()[:, None]
    sees = dense.any(-1, keepdim=True)
    grad_out = grad_out * sees
    out, _, gradients = attend_with_gradients(q, k, v, mask, grad_out)
    exact_out, _, exact_gradients = exact_attention(q, k, v, mask, grad_out)

    repeated_k, repeated_v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    dense_out = F.scaled_dot_product_attention(q, repeated_k, repeated_v, attn_mask=dense | ~sees) * sees
    dense_gradients = torch.autograd.grad(dense_out, (q, k, v), grad_out)
    for ours, theirs, exact in zip(
        (out, *gradients), (dense_out, *dense_gradients), (exact_out, *exact_gradients), strict=True
    ):
        assert relative_error(ours, exact) <= 1.5 * relative_error(theirs, exact)


def test_float64_gradients_are_those_of_finite_differences() -> None:
    mask = mask_of(12, [(0, 5), (5, 12)], [(1, 4), (6, 11)], length=11)
    q, k, v = (torch.randn(1, 2, 12, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    torch.autograd.gradcheck(lambda *x: interval_attention(*x, mask, backend="cpu"), (q, k, v))
    torch.autograd.gradcheck(lambda *x: interval_attention(*x, mask, backend="reference"), (q, k, v))


def test_one_query_against_a_long_cache() -> None:
    mask = IntervalMask(
        torch.zeros(2, 1, dtype=torch.int32),
        torch.tensor([[8192], [5000]], dtype=torch.int32),
        num_keys=8192,
    )
    q, k, v, grad_out = inputs_for(mask, 2, 64)
    out, _, gradients = attend_with_gradients(q, k, v, mask, grad_out)
    exact_out, _, exact_gradients = exact_attention(q, k, v, mask, grad_out)
    assert relative_error(out, exact_out) < 5e-6
    for gradient, exact in zip(gradients, exact_gradients, strict=True):
        assert relative_error(gradient, exact) < 5e-6


def test_documents_do_not_see_their_place_in_the_row() -> None:
    """A document alone, and the same one packed behind others in another row, give the same output."""
    lengths, image = [40, 150, 9, 101], (3, 8)
    q, k, v = (torch.randn(1, HEADS, 300, 32) for _ in range(3))
    spans, start = [], 0
    for length in lengths:
        spans.append((start, start + length))
        start += length
    mask = mask_of(300, spans, [(a + image[0], a + image[1]) for a, _ in spans])
    packed = interval_attention(q, k, v, mask)
    for a, b in spans:
        alone = interval_attention(*(x[:, :, a:b] for x in (q, k, v)), mask_of(b - a, [(0, b - a)], [image]))
        torch.testing.assert_close(packed[:, :, a:b], alone, rtol=1e-5, atol=1e-6)


def test_scale_is_that_of_the_scores() -> None:
    mask = FAMILIES["uneven_documents"]
    q, k, v, grad_out = inputs_for(mask, 1, 32)
    out = interval_attention(q, k, v, mask, scale=0.5)
    assert relative_error(out, exact_attention(q, k, v, mask, grad_out, scale=0.5)[0]) < 5e-6


def test_a_mask_changed_in_place_is_noticed() -> None:
    mask = mask_of(100, [(0, 100)])
    q, k, v, grad_out = inputs_for(mask, 1, 32)
    interval_attention(q, k, v, mask)
    mask.first_key[:, 50:] = 50
    out = interval_attention(q, k, v, mask)
    assert relative_error(out, exact_attention(q, k, v, mask, grad_out)[0]) < 5e-6


def test_layers_share_one_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    make_plan = cpu_plan.make_plan
    monkeypatch.setattr(cpu_plan, "_kept", [])
    monkeypatch.setattr(cpu_plan, "make_plan", lambda *bounds: made.append(1) or make_plan(*bounds))
    mask = mask_of(200, [(0, 60), (60, 200)], [(70, 90)])
    q, k, v, grad_out = inputs_for(mask, 1, 32)
    hidden = q
    for _ in range(3):
        hidden = interval_attention(hidden, k, v, IntervalMask(mask.first_key.clone(), mask.end_key))
    torch.autograd.grad(hidden, (q, k, v), grad_out)
    assert len(made) == 1


def test_plans_made_in_inference_mode_serve_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_plan, "_kept", [])
    q, k, v, grad_out = inputs_for(FAMILIES["uneven_documents"], 1, 32)
    with torch.inference_mode():
        mask = mask_families(300)["uneven_documents"]
        interval_attention(q, k, v, mask)
    attend_with_gradients(q, k, v, FAMILIES["uneven_documents"], grad_out)


class LargestTensor(TorchDispatchMode):
    """Notes the most elements that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("documents", [1, 64])
def test_holds_no_tensor_of_all_pairs(documents: int) -> None:
    size = 2048
    length = size // documents
    spans = [(start, start + length) for start in range(0, size, length)]
    mask = mask_of(size, spans, [(a + 2, a + 18) for a, _ in spans])
    q, k, v = (torch.randn(1, 1, size, 32, requires_grad=True) for _ in range(3))
    with LargestTensor() as largest:
        interval_attention(q, k, v, mask).sum().backward()
    assert largest.elements <= max(size * 32 * 2, size * cpu_plan.SHORT_DOCUMENT)


def test_wrong_values_of_a_mask_are_refused() -> None:
    mask = mask_of(8, [(0, 8)])
    mask.end_key[0, 3] = 9
    q, k, v, _ = inputs_for(mask, 1, 32)
    with pytest.raises(ValueError, match="end_key: got 9 then 5"):
        interval_attention(q, k, v, mask)
    cache_mask = IntervalMask(mask.first_key[:, :1] + 3, mask.first_key[:, :1] + 2, num_keys=8)
    with pytest.raises(ValueError, match="end_key: got 2 at query 0"):
        interval_attention(q[:, :, :1], k, v, cache_mask)


@pytest.mark.parametrize(("batch", "size"), [(0, 8), (2, 0)])
def test_nothing_to_do(batch: int, size: int) -> None:
    mask = IntervalMask(*torch.zeros(2, batch, size, dtype=torch.int32))
    q, k, v = (torch.randn(batch, 2, size, 32, requires_grad=True) for _ in range(3))
    out = interval_attention(q, k, v, mask)
    out.sum().backward()
    assert out.shape == q.shape
    assert q.grad is not None
