"""The public function as PyTorch sees it: compilation, checkpointing, choice of implementation, refusals."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from transfusion_kernels import IntervalMask, explain, interval_attention
from transfusion_kernels.verification.testing import mask_families, mask_of, relative_error

CHECKOUT = Path(__file__).parents[2]
SIZE = 96
MASK = mask_families(SIZE)["uneven_documents"]


def qkv(requires_grad: bool = True, key_heads: int = 2, size: int = SIZE) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, size, 4, 32, generator=generator).transpose(1, 2)
    k, v = (torch.randn(2, key_heads, size, 32, generator=generator) for _ in range(2))
    return tuple(x.requires_grad_(requires_grad) for x in (q, k, v))  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["uneven_documents", "padded_tail", "shared_row", "sliding_window"])
def test_operator_passes_opcheck(name: str) -> None:
    mask = mask_families(SIZE)[name]
    operator = torch.ops.transfusion.interval_attention.default
    tensors = (mask.first_key, mask.end_key, None, None, None, None)
    torch.library.opcheck(operator, (*qkv(), *tensors, *[None] * 7, 0.2, False, False, False, "cpu"))


@pytest.mark.parametrize("name", ["uneven_documents", "causal"])
def test_operator_passes_opcheck_on_one_row_that_is_laid_out_by_heads(name: str) -> None:
    mask = mask_families(SIZE)[name]
    operator = torch.ops.transfusion.interval_attention.default
    tensors = (mask.first_key[:1], mask.end_key[:1], None, None, None, None)
    for key_heads in (2, 4):
        inputs = (x[:1].detach().contiguous().requires_grad_() for x in qkv(key_heads=key_heads))
        torch.library.opcheck(operator, (*inputs, *tensors, *[None] * 7, 0.2, False, False, False, "cpu"))


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_whole_for_batches_and_rows_of_any_size(dynamic: bool | None) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, first_key: Tensor, end_key: Tensor) -> Tensor:
        out = interval_attention(q, k, v, IntervalMask(first_key, end_key))
        assert isinstance(out, Tensor)
        return out

    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch, size in ((2, 64), (3, 96), (1, 70)):
        q = torch.randn(batch, 4, size, 32)
        k, v = torch.randn(2, batch, 2, size, 32).unbind()
        end_key = torch.arange(1, size + 1, dtype=torch.int32).expand(batch, -1).contiguous()
        arguments = (q, k, v, torch.zeros_like(end_key), end_key)
        torch.testing.assert_close(compiled(*arguments), attend(*arguments))


def test_compiles_whole_for_any_scale() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out = interval_attention(q, k, v, MASK, scale=scale)
        assert isinstance(out, Tensor)
        return out

    inputs = qkv(requires_grad=False)
    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for scale in (0.25, 0.5, 0.125):
        torch.testing.assert_close(compiled(*inputs, scale), attend(*inputs, scale))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast_changes_nothing(backend: str) -> None:
    """The dtype of the inputs says how exact the output is to be."""
    plain, others = qkv(), qkv()
    exact, exact_lse = interval_attention(*plain, MASK, return_lse=True, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = interval_attention(*others, MASK, return_lse=True, backend=backend)
    assert out.dtype == lse.dtype == torch.float32
    torch.testing.assert_close(out, exact, rtol=0, atol=0)
    torch.testing.assert_close(lse, exact_lse, rtol=0, atol=0)
    gradients = (torch.autograd.grad(x.square().sum(), y) for x, y in ((out, others), (exact, plain)))
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_second_derivatives_only_the_reference_has() -> None:
    for backend in ("cpu", "reference"):
        inputs = qkv()
        out = interval_attention(*inputs, MASK, backend=backend)
        (first,) = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
        if backend == "reference":
            torch.autograd.grad(first.square().sum(), inputs)
            continue
        with pytest.raises(RuntimeError, match=r"no second derivatives.*backend='reference'"):
            torch.autograd.grad(first.square().sum(), inputs)


def test_compiles_whole_and_once_for_all_masks() -> None:
    def loss(q: Tensor, k: Tensor, v: Tensor, document_start: Tensor, image_end: Tensor) -> Tensor:
        mask = IntervalMask.from_spans(document_start, image_end)
        for _ in range(2):
            out, lse = interval_attention(q, k, v, mask, return_lse=True)
            q = q + out
        return q.square().mean() + lse.mean()

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for start in (30, 50):
        document_start, image_end = torch.zeros(2, 2, SIZE, dtype=torch.int64)
        document_start[:, start:] = start
        image_end[:, 4:20] = 20
        eager_inputs, compiled_inputs = qkv(), qkv()
        eager = loss(*eager_inputs, document_start, image_end)
        ours = compiled(*compiled_inputs, document_start, image_end)
        torch.testing.assert_close(ours, eager)
        for expected, actual in zip(
            torch.autograd.grad(eager, eager_inputs), torch.autograd.grad(ours, compiled_inputs), strict=True
        ):
            torch.testing.assert_close(actual, expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["cpu", "reference", "auto"])
def test_compiles_with_a_mask_from_outside(backend: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask) -> tuple[Tensor, Tensor, Tensor]:
        columns = mask.first_query + mask.end_query + mask.key_order.sum() + mask.query_order.sum()
        return interval_attention(q, k, v, mask, backend=backend), columns, mask.dense()

    inputs = qkv()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")(*inputs, MASK)
    for ours, eager in zip(compiled, attend(*inputs, MASK), strict=True):
        torch.testing.assert_close(ours, eager)


def test_a_mask_from_outside_compiles_nothing_anew() -> None:
    """As the blocks of a network get it."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask) -> Tensor:
        out = interval_attention(q, k, v, mask)
        assert isinstance(out, Tensor)
        return out

    inputs = qkv()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for name in ("uneven_documents", "tiny_documents", "padded_tail", "causal"):
        mask = mask_families(SIZE)[name]
        torch.testing.assert_close(compiled(*inputs, mask), attend(*inputs, mask))
    assert counter.frame_count == 1


def test_checkpointing_gives_the_same_gradients() -> None:
    projection = nn.Linear(32, 32)

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return interval_attention(projection(q), k, v, MASK)

    plain, again = qkv(), qkv()
    expected = torch.autograd.grad(block(*plain).square().sum(), (*plain, projection.weight))
    out = checkpoint(block, *again, use_reentrant=False)
    actual = torch.autograd.grad(out.square().sum(), (*again, projection.weight))
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_output_is_laid_out_for_joining_heads() -> None:
    for backend in ("cpu", "reference"):
        out = interval_attention(*qkv(), MASK, backend=backend)
        assert out.shape == (2, 4, SIZE, 32)
    assert interval_attention(*qkv(), MASK).transpose(1, 2).is_contiguous()


def test_log_sum_exp_carries_no_gradient() -> None:
    for backend in ("cpu", "reference"):
        out, lse = interval_attention(*qkv(), MASK, return_lse=True, backend=backend)
        assert out.requires_grad
        assert not lse.requires_grad
        assert lse.dtype == torch.float32


def test_gradient_of_an_expanded_number() -> None:
    # Whole rows are not gathered, so that the expanded gradient reaches the kernel.
    mask = mask_of(SIZE, [(0, SIZE)])
    inputs, others = qkv(), qkv()
    expected = torch.autograd.grad(interval_attention(*others, mask, backend="reference").sum(), others)
    for ours, theirs in zip(
        torch.autograd.grad(interval_attention(*inputs, mask).sum(), inputs), expected, strict=True
    ):
        assert relative_error(ours, theirs, floor=1.0) < 5e-6


def test_explains_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRANSFUSION_ATTENTION", raising=False)
    inputs = qkv()
    assert explain(*inputs, MASK).implementation == "cpu"
    assert "argument" in str(explain(*inputs, MASK, backend="reference"))
    monkeypatch.setenv("TRANSFUSION_ATTENTION", "reference")
    assert explain(*inputs, MASK).implementation == "reference"
    assert "TRANSFUSION_ATTENTION" in explain(*inputs, MASK).reason
    assert explain(*inputs, MASK, backend="cpu").implementation == "cpu"
    monkeypatch.setenv("TRANSFUSION_ATTENTION", "fastest")
    with pytest.raises(ValueError, match="TRANSFUSION_ATTENTION: got 'fastest'"):
        explain(*inputs, MASK)


def test_a_device_without_a_kernel_gets_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRANSFUSION_ATTENTION", raising=False)
    q, k, v = (x.to("meta") for x in qkv(requires_grad=False))
    mask = MASK.to("meta")
    assert explain(q, k, v, mask).implementation == "reference"
    assert interval_attention(q, k, v, mask).shape == q.shape
    with pytest.raises(ValueError, match="backend: got 'cpu'"):
        interval_attention(q, k, v, mask, backend="cpu")


Change = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0], k, v), r"q: got shape \(4, 96, 32\)"),
        (lambda q, k, v: (None, k, v), "q: got NoneType, takes a tensor"),
        (lambda q, k, v: (q, k, [v]), "v: got list, takes a tensor"),
        (lambda q, k, v: (q[:, :0], k, v), r"q: got shape \(2, 0, 96, 32\)"),
        (lambda q, k, v: (q[..., :0], k[..., :0], v[..., :0]), r"q: got shape \(2, 4, 96, 0\)"),
        (lambda q, k, v: (q.long(), k, v), "q: got torch.int64, takes a floating dtype"),
        (lambda q, k, v: (q.to(torch.float8_e4m3fn), k, v), "q: got torch.float8_e4m3fn"),
        (lambda q, k, v: (q, k.half(), v), "k: got torch.float16, takes q's dtype, torch.float32"),
        (lambda q, k, v: (q, k.to("meta"), v), "k: got device meta, takes q's, cpu"),
        (lambda q, k, v: (q, k[:1], v), r"k: got shape \(1, 2, 96, 32\)"),
        (lambda q, k, v: (q, k, v[0]), r"v: got shape \(2, 96, 32\), takes \[2, key heads, keys, 32\]"),
        (lambda q, k, v: (q, k, v.double()), "v: got torch.float64, takes q's dtype, torch.float32"),
        (lambda q, k, v: (q, k, v.to("meta")), "v: got device meta, takes q's, cpu"),
        (lambda q, k, v: (q, k[..., :16], v[..., :16]), r"k: got shape \(2, 2, 96, 16\)"),
        (lambda q, k, v: (q, k[:, :0], v[:, :0]), "k: got 0 heads, takes a number that divides q's 4"),
        (lambda q, k, v: (q, k, v[:, :, 1:]), r"v: got shape \(2, 2, 95, 32\), takes k's"),
        (lambda q, k, v: (q[:, :3], k, v), "k: got 2 heads, takes a number that divides q's 3"),
        (lambda q, k, v: (q.mT.contiguous().mT, k, v), "q: got last stride 96"),
        (lambda q, k, v: (q, k.mT.contiguous().mT, v), "k: got last stride 96"),
        (lambda q, k, v: (q, k, v.mT.contiguous().mT), "v: got last stride 96, takes a contiguous last"),
        (lambda q, k, v: (q[:1], k[:1], v[:1]), r"mask: got bounds of shape \(2, 96\), takes \[1 or 1, 96\]"),
        (lambda q, k, v: (q[:, :, 1:], k, v), r"mask: got bounds of shape \(2, 96\), takes \[2 or 1, 95\]"),
        (lambda q, k, v: (q, k[:, :, 1:], v[:, :, 1:]), "mask: got num_keys 96, takes .* 95"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change: Change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        interval_attention(*change(*qkv(requires_grad=False)), MASK)


def test_other_refusals() -> None:
    inputs = qkv(requires_grad=False)
    with pytest.raises(ValueError, match="backend: got 'cuda', takes 'auto' or one of"):
        interval_attention(*inputs, MASK, backend="cuda")
    with pytest.raises(ValueError, match="mask: got device meta"):
        interval_attention(*inputs, MASK.to("meta"))
    with pytest.raises(ValueError, match="mask: got Tensor, takes an IntervalMask"):
        interval_attention(*inputs, MASK.dense())  # type: ignore[arg-type]
    for scale in (float("nan"), float("inf"), 0.0, -0.5, "0.5"):
        with pytest.raises(ValueError, match=r"scale: got .*, takes a finite number above 0"):
            interval_attention(*inputs, MASK, scale=scale)  # type: ignore[arg-type]
    odd_width = [x[..., :24] for x in inputs]
    with pytest.raises(ValueError, match=r"head_dim is 24, they take \(32, 64, 96, 128, 256\)"):
        interval_attention(*odd_width, MASK, backend="triton")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_values_of_a_mask_are_checked_on_the_cpu_whatever_runs(backend: str) -> None:
    mask = mask_of(SIZE, [(0, SIZE)])
    mask.end_key[0, -1] = SIZE + 1
    with pytest.raises(ValueError, match=f"end_key: got {SIZE + 1}, takes keys from 0 to num_keys, {SIZE}"):
        interval_attention(*qkv(requires_grad=False), mask, backend=backend)


def run_python(code: str, folder: Path | None = None) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=folder
    )
    return result.stdout + result.stderr


def test_imports_without_triton_and_without_asking_for_it() -> None:
    code = "import sys; sys.modules['triton'] = None; import transfusion_kernels; print('imported')"
    assert "imported" in run_python(code)


def test_the_name_of_another_package_stays_free(tmp_path: Path) -> None:
    """In a checkout, where `python -c` looks first, `import kernels` finds the package of that name on PyPI."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("theirs = True\n", encoding="utf-8")
    code = (
        f"import sys; sys.path.insert(1, {str(tmp_path)!r}); import kernels; print('theirs', kernels.theirs)"
    )
    assert "theirs True" in run_python(code, CHECKOUT)


@pytest.mark.slow
@pytest.mark.parametrize("library", ["transformers", "diffusers"])
def test_a_folder_named_kernels_is_no_package_to_others(library: str, tmp_path: Path) -> None:
    pytest.importorskip(library)
    code = f"from {library}.utils import is_kernels_available; print('found', is_kernels_available())"
    inside, outside = run_python(code, CHECKOUT), run_python(code, tmp_path)
    assert "found" in inside and inside == outside
