"""The Hopper kernels: their source in a simulator, with mutants that it must catch; what they compile to.

They run on no GPU here: `test_hopper_gpu.py` does that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from transfusion_kernels import dispatch, interval_attention
from transfusion_kernels.verification.testing import (
    exact_attention,
    mask_families,
    mask_of,
    relative_error,
    second_interval,
)

triton = pytest.importorskip("triton", reason="triton is not installed")

from hopper_cases import (  # noqa: E402
    BACKWARD_MUTANTS,
    BAR,
    FORWARD_MUTANTS,
    UNMASKED_END,
    WIDTH,
    backward_errors,
    caught,
    forward_errors,
    low_score_gradients,
    random_mask,
    simulated,
)

from transfusion_kernels.attention import hopper, tiles  # noqa: E402
from transfusion_kernels.verification.shipped import compile_case  # noqa: E402

SIZE = 170
FAMILIES = list(mask_families(SIZE))


RUNS = {"forward": forward_errors, "backward": backward_errors}
MUTANTS = [
    *(("forward", mutant) for mutant in FORWARD_MUTANTS),
    *(("backward", mutant) for mutant in BACKWARD_MUTANTS),
]


@pytest.mark.parametrize("direction", RUNS)
@pytest.mark.parametrize("name", FAMILIES)
def test_equals_the_reference(name: str, direction: str) -> None:
    with simulated(seed=len(name)):
        errors = RUNS[direction](mask_families(SIZE)[name], 1 + len(name) % 2, 0)
    assert max(errors.values()) < BAR, errors


@pytest.mark.parametrize("direction", RUNS)
@pytest.mark.parametrize("seed", range(6))
def test_on_random_masks(seed: int, direction: str) -> None:
    with simulated(seed):
        errors = RUNS[direction](random_mask(seed, size=129 + 20 * seed), 4, seed)
    assert max(errors.values()) < BAR, errors


@pytest.mark.parametrize(("direction", "mutant"), MUTANTS)
def test_mutants_are_caught(direction: str, mutant: str) -> None:
    mutants = FORWARD_MUTANTS if direction == "forward" else BACKWARD_MUTANTS
    assert caught(mutants[mutant], RUNS[direction])


def test_very_low_scores_beside_keys_past_the_last() -> None:
    with simulated():
        assert all(bool(gradient.isfinite().all()) for gradient in low_score_gradients())
    with simulated(changes=[UNMASKED_END]):
        assert not all(bool(gradient.isfinite().all()) for gradient in low_score_gradients())


@pytest.fixture
def on_any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that are simulated run anywhere."""
    monkeypatch.setattr(dispatch, "_hopper_problem", lambda q: "")


@pytest.mark.usefixtures("on_any_device")
@pytest.mark.parametrize(("width", "dtype"), [(64, torch.float16), (128, torch.bfloat16)])
def test_the_operator_at_the_size_of_a_gpu(width: int, dtype: torch.dtype) -> None:
    """The tiles that are shipped, in half precision, from the public function and its gradient."""
    mask = mask_of(200, [(0, 60), (60, 200)], [(80, 170)], length=190)
    q = torch.randn(1, 200, 2, width).to(dtype).transpose(1, 2).requires_grad_()
    k, v = (torch.randn(1, 1, 200, width).to(dtype).requires_grad_() for _ in range(2))
    grad_out = torch.randn_like(q)
    exact = exact_attention(q, k, v, mask, grad_out)
    with simulated(small_tiles=False):
        out, lse = interval_attention(q, k, v, mask, return_lse=True, backend="hopper")
        # What would spill with this version of Triton is left to kernels that are not simulated.
        gradients = torch.autograd.grad(out, (q, k, v), grad_out) if width in hopper.BACKWARD else ()
    assert out.transpose(1, 2).is_contiguous()
    assert relative_error(lse.exp(), exact[1].exp()) < 1e-5
    bar = 2e-3 if dtype == torch.float16 else 1e-2
    for ours, expected in zip((out, *gradients), (exact[0], *exact[2]), strict=False):
        assert relative_error(ours, expected) < bar


@pytest.mark.usefixtures("on_any_device")
@pytest.mark.parametrize("side", ["before", "after"])
def test_a_second_interval(side: str) -> None:
    mask = mask_families(SIZE)["uneven_documents"]
    second = second_interval(mask, side, batch=2)
    q = torch.randn(2, SIZE, 4, WIDTH).transpose(1, 2).requires_grad_()
    k, v = (torch.randn(2, 2, SIZE, WIDTH).requires_grad_() for _ in range(2))
    grad_out = torch.randn_like(q)
    exact = exact_attention(q, k, v, mask, grad_out, second=second)
    with simulated():
        out, lse = interval_attention(q, k, v, mask, second=second, return_lse=True, backend="hopper")
        gradients = torch.autograd.grad(out, (q, k, v), grad_out)
    assert relative_error(lse.exp(), exact[1].exp()) < BAR
    for ours, expected in zip((out, *gradients), (exact[0], *exact[2]), strict=True):
        assert relative_error(ours, expected) < BAR


def test_heads_that_fit_the_cache_go_together() -> None:
    mib = 1 << 20
    found = [
        tiles.heads_together(heads, size)
        for heads, size in ((16, 8 * mib), (16, mib), (12, 5 * mib), (7, 9 * mib))
    ]
    assert found == [4, 16, 4, 1]
    assert tiles.heads_together(5, 0) == 5


def test_gradients_that_triton_computes() -> None:
    assert dispatch.backward_implementation("hopper", 64, deterministic=False) == "hopper"
    assert dispatch.backward_implementation("hopper", 64, deterministic=True) == "triton"
    assert dispatch.backward_implementation("hopper", 96, deterministic=False) == "triton"
    assert dispatch.backward_implementation("cpu", 64, deterministic=True) == "cpu"


def _unaligned_start(x: Tensor) -> Tensor:
    storage = torch.empty(x.numel() + 1)
    return storage[1:].view(x.shape).copy_(x)


def _unaligned_stride(x: Tensor) -> Tensor:
    return torch.cat([x, x[..., :3]], -1)[..., : x.shape[-1]]


@pytest.mark.parametrize("layout", [_unaligned_start, _unaligned_stride, lambda x: x[:1].expand_as(x)])
def test_layouts_that_cannot_be_copied_by_hardware(layout: Any) -> None:
    mask = mask_families(SIZE)["uneven_documents"]
    q, k, v = (layout(x) for x in torch.randn(3, 2, 1, SIZE, 16))
    with simulated():
        out, _ = hopper.attention_forward(q, k, v, mask.first_key, mask.end_key, mask.query_order, 0.25)
    assert relative_error(out, exact_attention(q, k, v, mask, torch.zeros_like(q))[0]) < BAR


@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 8, 8), (2, 0, 8), (2, 4, 0)])
def test_nothing_to_do(batch: int, queries: int, keys: int) -> None:
    q, k = torch.randn(batch, 2, queries, 64), torch.randn(batch, 2, keys, 64)
    bound = torch.zeros(batch, queries, dtype=torch.int32)
    out, lse = hopper.attention_forward(q, k, k, bound, bound, torch.zeros(0, dtype=torch.int32), 1.0)
    assert out.shape == q.shape
    assert not out.any()
    assert bool((lse == float("-inf")).all())


def test_asked_for_by_name_it_is_never_replaced() -> None:
    q = torch.randn(1, 1, 8, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"backend: got 'hopper' by the argument 'backend'.* q is on cpu"):
        interval_attention(q, q, q, mask_of(8, [(0, 8)]), backend="hopper")


@pytest.mark.usefixtures("on_any_device")
def test_compiles_whole() -> None:
    mask = mask_of(40, [(0, 40)], [(5, 20)])
    q, k, v = torch.randn(3, 1, 1, 40, 64).bfloat16()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = interval_attention(q, k, v, mask, backend="hopper")
        assert isinstance(out, Tensor)
        return out

    with simulated(small_tiles=False):
        out = torch.compile(attend, fullgraph=True, backend="aot_eager")(q, k, v)
        torch.testing.assert_close(out, attend(q, k, v))


@pytest.mark.slow
@pytest.mark.parametrize("case", hopper.compile_cases(), ids=lambda case: case.name)
def test_compiles_for_hopper(
    case: hopper.CompileCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without registers spilled to memory, with loads by TMA, and products that are waited for together."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    report, wrong = compile_case(case)
    assert not wrong, report


@pytest.mark.parametrize("width", hopper.BACKWARD)
def test_statistics_compile(width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"ROWS": 64, "WIDTH": width}
    types = {"out": "*bf16", "grad_out": "*bf16", "lse": "*fp32", "statistics": "*fp32"}
    signature = {name: types.get(name, "i32") for name in hopper.statistics_kernel.arg_names}
    case = hopper.CompileCase("statistics", hopper.statistics_kernel, signature, constants, {"num_warps": 4})
    report, _ = compile_case(case)
    assert report.spill_stores == report.spill_loads == 0
