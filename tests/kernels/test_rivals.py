"""Rivals behind our operator: their masks say what ours says, and their tensors come back as ours would."""

from __future__ import annotations

import gc
import sys
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    create_block_mask,
    create_mask,
    flex_attention,
)

from transfusion_kernels import IntervalMask, interval_attention
from transfusion_kernels.attention import plans
from transfusion_kernels.attention.reference import _attend, _visible, reference_attention
from transfusion_kernels.rivals import NAMES, attention, cudnn, flex, problem
from transfusion_kernels.verification.testing import (
    exact_attention,
    mask_families,
    relative_error,
    second_interval,
)

SIZES = (129, 256, 300)
FAMILIES = list(mask_families(300))
SOME = ("uneven_documents", "padded_tail", "shared_row", "block_against_cache")
SECONDS = [(name, side) for name in FAMILIES if name != "size_one" for side in ("before", "after")]
EAGER = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def qkv(mask: IntervalMask, head_dim: int = 16, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Four query heads, two key heads, two rows."""
    torch.manual_seed(0)
    shapes = ((mask.num_queries, 4), (mask.num_keys, 2), (mask.num_keys, 2))
    return [torch.randn(2, *shape, head_dim).to(dtype).transpose(1, 2) for shape in shapes]


# FlexAttention


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_block_mask_from_the_bounds_is_the_one_of_all_pairs(name: str, size: int) -> None:
    mask = mask_families(size)[name]
    rows = mask.first_key.shape[0]
    sees = flex.mask_function((mask.first_key, mask.end_key))
    theirs = create_block_mask(sees, rows, None, mask.num_queries, mask.num_keys, device="cpu")
    assert_same_blocks(flex.block_mask(mask), theirs)


def assert_same_blocks(ours: BlockMask, theirs: BlockMask) -> None:
    fields = list(
        zip(ours.as_tuple()[:-1], theirs.as_tuple()[:-1], strict=True)
    )  # the last is the mask function
    for one, other in fields:
        if isinstance(other, Tensor):
            assert torch.equal(one, other) and (one.dtype, one.stride()) == (other.dtype, other.stride())
        else:
            assert one == other
    assert sum(isinstance(one, Tensor) for one, _ in fields) == 8


@pytest.mark.parametrize(("name", "side"), SECONDS)
def test_two_intervals_give_the_block_mask_of_all_pairs_too(name: str, side: str) -> None:
    mask = mask_families(300)[name]
    second = second_interval(mask, side, batch=2)
    dense = _visible(mask, second)
    ours = flex.block_mask(mask, second)
    shape = (2, None, mask.num_queries, mask.num_keys)
    assert torch.equal(create_mask(ours.mask_mod, *shape, device="cpu")[:, 0], dense)
    theirs = create_block_mask(lambda b, h, q, key: dense[b, q, key], *shape, device="cpu")
    assert_same_blocks(ours, theirs)


def test_a_block_is_full_where_every_query_sees_it_by_two_intervals() -> None:
    """The first shows keys up to 40 and the second the others, but for one query of the second tile."""
    mask = IntervalMask(*torch.tensor([[[0] * 256], [[40] * 256]], dtype=torch.int32), num_keys=256)
    first, end = torch.full((2, 1, 256), 40, dtype=torch.int32)
    end.fill_(256)[0, 200] = 255
    order = torch.arange(256)[None]
    blocks = flex.block_mask(mask, (order, IntervalMask(first, end, num_keys=256)))
    assert blocks.full_kv_num_blocks is not None and blocks.full_kv_num_blocks[0, 0].tolist() == [2, 1]
    assert blocks.kv_num_blocks[0, 0].tolist() == [0, 1] and blocks.kv_indices[0, 0, 1, 0] == 1


def test_a_tile_that_jumps_over_blocks_does_not_list_them() -> None:
    end = torch.cat([torch.full((60,), 10), torch.full((140,), 700)]).to(torch.int32)[None]
    first = torch.cat([torch.zeros(60), torch.full((140,), 650)]).to(torch.int32)[None]
    mask = IntervalMask(first, end, num_keys=900)
    mask.validate()
    blocks = flex.block_mask(mask)
    assert blocks.kv_num_blocks[0, 0].tolist() == [2, 1]
    assert blocks.kv_indices[0, 0, 0, :2].tolist() == [0, 5]


@pytest.mark.parametrize("name", FAMILIES)
@EAGER
def test_flex_computes_what_the_reference_does(name: str) -> None:
    mask = mask_families(150)[name]
    q, k, v = qkv(mask)
    out, lse = attention("flex", q, k, v, mask, 0.3, False)
    expected, expected_lse = reference_attention(q, k, v, mask, 0.3)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    blind = (mask.first_key == mask.end_key).expand(2, -1)[:, None].expand(lse.shape)
    assert (out[blind] == 0).all() and torch.isneginf(lse[blind]).all()


@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("name", SOME)
@EAGER
def test_flex_takes_a_second_interval(name: str, side: str) -> None:
    mask = mask_families(150)[name]
    second = second_interval(mask, side, batch=2)
    q, k, v = qkv(mask)
    out, lse = interval_attention(q, k, v, mask, second=second, scale=0.3, return_lse=True, backend="flex")
    expected, expected_lse, _ = exact_attention(q, k, v, mask, torch.zeros_like(q), 0.3, second)
    assert relative_error(out, expected) < 5e-6
    torch.testing.assert_close(lse, expected_lse.float())


def test_flex_compiles_once_for_all_masks_of_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True, backend=counter)

    def attend(mask: IntervalMask, second: Any = None) -> None:
        q, k, v = qkv(mask)
        blocks, aux = flex.block_mask(mask, second), AuxRequest(lse=True)
        out, extra = compiled(q, k, v, block_mask=blocks, scale=0.3, enable_gqa=True, return_aux=aux)
        expected, lse = reference_attention(q, k, v, mask, 0.3, second)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(extra.lse, lse)

    torch.compiler.reset()
    for size, versions in ((150, 1), (200, 2), (150, 2)):
        for name in ("causal", "tiny_documents", "padded_tail"):
            attend(mask_families(size)[name])
        assert counter.frame_count == versions
    for name in ("causal", "tiny_documents", "padded_tail"):
        mask = mask_families(150)[name]
        attend(mask, second_interval(mask, "before", batch=2))
    assert counter.frame_count == 3
    settings: dict[str, Any] = {}
    monkeypatch.setattr(torch, "compile", lambda function, **given: settings.update(given))
    flex._compiled.__wrapped__()
    assert settings == {"dynamic": False, "fullgraph": True}
    assert torch._dynamo.config.recompile_limit >= flex.MAX_VERSIONS


@pytest.mark.parametrize("intervals", [1, 2])
def test_flex_is_part_of_a_larger_graph(intervals: int) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, first_key: Tensor, end_key: Tensor, *more: Tensor) -> Tensor:
        second = (more[0], IntervalMask(*more[1:], num_keys=150)) if more else None
        return flex.attention(q, k, v, IntervalMask(first_key, end_key), 0.3, second)[0]

    torch.compiler.reset()
    mask = mask_families(150)["uneven_documents"]
    rows, other = second = second_interval(mask, "before", batch=2)
    more = (rows, other.first_key, other.end_key) if intervals == 2 else ()
    inputs = qkv(mask)
    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    out = compiled(*inputs, mask.first_key, mask.end_key, *more)
    expected, _ = reference_attention(*inputs, mask, 0.3, second if more else None)
    torch.testing.assert_close(out, expected)


@EAGER
def test_the_dtype_decides_and_not_autocast() -> None:
    mask = mask_families(150)["causal"]
    q, k, v = qkv(mask)
    with torch.autocast("cpu", torch.bfloat16):
        assert flex.attention(q, k, v, mask, 0.3)[0].dtype == torch.float32


@EAGER
def test_flex_on_the_cpu_has_no_gradients_and_says_so() -> None:
    mask = mask_families(150)["causal"]
    q, k, v = (x.requires_grad_() for x in qkv(mask))
    assert problem("flex", q) == "FlexAttention has no gradients on the CPU"
    with torch.no_grad():
        assert problem("flex", q) == ""
        assert flex.attention(q, k, v, mask, 0.3)[0].shape == q.shape


# cudnn.flex_attention


def decoded(mask_func: Tensor, batch: int, keys: int) -> Tensor:
    """The dense mask [B, S, N] that the library's documentation gives to its form: `[0, F0)`, `[F1, F2)` and so on.

    What the library refuses is refused: an even number of bounds, one out of range, and one less than that before it.
    """
    assert mask_func.dtype == torch.int32 and mask_func.is_contiguous() and mask_func.shape[1] % 2 == 1
    assert mask_func.min() >= 0 and mask_func.max() <= keys and (mask_func.diff(dim=1) >= 0).all()
    end_0, *others = (bound.view(batch, -1, 1) for bound in mask_func[0])
    key = torch.arange(keys)
    dense = key < end_0
    for start, end in zip(others[::2], others[1::2], strict=True):
        dense = dense | ((key >= start) & (key < end))
    return dense


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_mask_of_cudnn_decodes_to_ours(name: str, size: int) -> None:
    mask = mask_families(size)[name]
    found = cudnn.mask_func(mask, 2)
    assert found.shape == (1, 3, 2 * mask.num_queries)
    assert torch.equal(decoded(found, 2, mask.num_keys), mask.dense().expand(2, -1, -1))


@pytest.mark.parametrize(("name", "side"), SECONDS)
def test_two_intervals_of_cudnn_decode_to_ours(name: str, side: str) -> None:
    mask = mask_families(300)[name]
    second = second_interval(mask, side, batch=2)
    found = cudnn.mask_func(mask, 2, second)
    assert found.shape == (1, 5, 2 * mask.num_queries)
    assert torch.equal(decoded(found, 2, mask.num_keys), _visible(mask, second))


@pytest.mark.parametrize("empty", [0, 3, 9])
def test_an_empty_second_interval_adds_nothing_wherever_it_is(empty: int) -> None:
    mask = IntervalMask(*torch.tensor([[[1, 2]], [[7, 8]]], dtype=torch.int32), num_keys=9)
    bounds = torch.full((1, 1), empty, dtype=torch.int32)
    second = (torch.tensor([[1]]), IntervalMask(bounds, bounds, num_keys=9))
    assert torch.equal(decoded(cudnn.mask_func(mask, 1, second), 1, 9), mask.dense())
    assert_same_blocks(flex.block_mask(mask, second), flex.block_mask(mask))


class StandIn:
    """Takes what the library takes, as strictly, and computes by the reference. Counts plans."""

    def __init__(self) -> None:
        self.plans = 0
        self.latest: Any = None
        self.given: dict[str, Any] = {}

    def create_mask_plan(
        self, mask_func: Tensor, q: Tensor, k: Tensor, v: Tensor, *, build_backward: bool
    ) -> Any:
        self.plans += 1
        dense = decoded(mask_func, q.shape[0], k.shape[1])
        self.latest = weakref.ref(dense)
        return SimpleNamespace(dense=dense, backward=build_backward, shapes=(q.shape, k.shape, v.shape))

    def flex_attn_func(self, q: Tensor, k: Tensor, v: Tensor, *, mask_plan: Any, **given: Any) -> Any:
        self.given = given
        assert mask_plan.shapes == (q.shape, k.shape, v.shape)
        for x in (q, k, v):
            self.check(x)
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = _attend(*heads_first, mask_plan.dense, given["softmax_scale"])
        out = out.transpose(1, 2).contiguous()
        if out.requires_grad:
            assert mask_plan.backward
            out.register_hook(self.check)
        return out, lse

    @staticmethod
    def check(x: Tensor) -> None:
        assert x.stride(-1) == 1 and x.data_ptr() % 16 == 0, x.stride()
        assert all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1]), x.stride()


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setattr(cudnn, "_library", lambda: stand_in)
    monkeypatch.setattr(cudnn, "_PLANS", plans.Plans())
    return stand_in


@pytest.mark.parametrize("side", [None, "before", "after"])
@pytest.mark.parametrize("name", SOME)
def test_what_cudnn_is_given_and_what_comes_back(name: str, side: str | None, library: StandIn) -> None:
    mask = mask_families(150)[name]
    second = second_interval(mask, side, batch=2) if side else None
    q, k, v = (x.requires_grad_() for x in qkv(mask))
    out, lse = attention("cudnn", q, k, v, mask, 0.3, True, second)
    assert library.given == {"softmax_scale": 0.3, "deterministic": True, "return_lse": True}
    assert out.transpose(1, 2).is_contiguous() and not lse.requires_grad
    grad_out = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (q, k, v), grad_out)
    expected, expected_lse, exact = exact_attention(q, k, v, mask, grad_out, 0.3, second)
    torch.testing.assert_close(lse, expected_lse.float())
    for found, right in zip((out, *gradients), (expected, *exact), strict=True):
        assert relative_error(found, right) < 5e-6


def test_cudnn_is_given_aligned_tensors_only(library: StandIn) -> None:
    mask = mask_families(150)["causal"]
    shifted = [torch.randn(2 * 150 * heads * 16 + 1)[1:].view(2, 150, heads, 16) for heads in (4, 2, 2)]
    q, k, v = (x.transpose(1, 2).requires_grad_() for x in shifted)
    out, _ = attention("cudnn", q, k, v, mask, 0.3, False)
    out.sum().backward()  # its gradient has strides of 0
    expected, _, exact = exact_attention(q, k, v, mask, torch.ones_like(out), 0.3)
    assert relative_error(out, expected) < 5e-6 and q.grad is not None
    assert relative_error(q.grad, exact[0]) < 5e-6


def test_a_plan_is_shared_by_layers_and_dropped_with_its_mask(library: StandIn) -> None:
    family = mask_families(150)["causal"]
    mask = IntervalMask(family.first_key.clone(), family.end_key.clone())
    inputs = qkv(mask)
    for _ in range(3):
        attention("cudnn", *inputs, mask, 0.3, False)
    assert library.plans == 1
    attention("cudnn", *(x.requires_grad_() for x in inputs), mask, 0.3, False)
    assert library.plans == 2, "one with gradients is another"
    mask.end_key[0, -1] -= 1
    out, _ = attention("cudnn", *inputs, mask, 0.3, False)
    assert library.plans == 3
    torch.testing.assert_close(out, reference_attention(*inputs, mask, 0.3)[0])
    kept = cudnn._PLANS._kept
    assert len(kept) == 1
    gone = weakref.ref(mask)
    del mask
    gc.collect()
    assert gone() is None and len(kept) == 0


@pytest.mark.parametrize("place", [0, 1, 2], ids=["mask", "rows", "second mask"])
def test_a_plan_of_two_intervals_is_kept_by_both_masks_and_the_rows(place: int, library: StandIn) -> None:
    def made() -> list[Any]:
        family = mask_families(150)["uneven_documents"]
        return [family, *second_interval(family, "before", batch=2)]

    inputs = qkv(mask_families(150)["uneven_documents"])

    def attend(mask: IntervalMask, rows: Tensor, other: IntervalMask) -> int:
        out, _ = attention("cudnn", *inputs, mask, 0.3, False, (rows, other))
        torch.testing.assert_close(out, reference_attention(*inputs, mask, 0.3, (rows, other))[0])
        return library.plans

    owners = made()
    assert attend(*owners) == attend(*owners) == 1
    changed = [owners[0].end_key, owners[1], owners[2].first_key][place]
    changed[0, -1] += 1 if place == 1 else -1
    assert attend(*owners) == 2
    plan = library.latest
    another = [*owners]
    another[place] = made()[place]
    assert attend(*another) == attend(*owners) == 3
    assert plan() is not None
    del owners[place], another, changed
    assert plan() is None


@EAGER
def test_the_plan_of_flex_is_dropped_with_its_mask_too() -> None:
    family = mask_families(150)["causal"]
    mask = IntervalMask(family.first_key.clone(), family.end_key.clone())
    flex.attention(*qkv(mask), mask, 0.3)
    assert mask in flex._PLANS._kept
    gone = weakref.ref(mask)
    del mask
    gc.collect()
    assert gone() is None


# What is refused


def like(device: str, dtype: torch.dtype = torch.bfloat16, head_dim: int = 128) -> Any:
    """Queries as `problem` looks at them."""
    shape = (2, 4, 64, head_dim)
    return SimpleNamespace(
        device=torch.device(device), dtype=dtype, shape=shape, numel=lambda: 1, requires_grad=False
    )


def test_what_rivals_cannot_take_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn, "_missing", lambda: "")
    monkeypatch.setattr(cudnn, "_captures", lambda: False)
    monkeypatch.setattr(cudnn, "_capability", lambda device: (9, 0))
    for name in NAMES:
        assert problem(name, like("cuda")) == ""
        assert problem(name, like("meta")) == "q is on meta"
        assert "torch.float64" in problem(name, like("cuda", torch.float64))
    assert problem("cudnn", like("cuda", head_dim=256)) == ""
    for head_dim in (36, 136):
        assert f"head_dim is {head_dim}" in problem("cudnn", like("cuda", head_dim=head_dim))
    assert "head_dim is 8" in problem("flex", like("cuda", head_dim=8))
    assert problem("cudnn", like("cuda", torch.float32)).startswith("the dtype is torch.float32")
    assert problem("cudnn", torch.randn(1, 1, 8, 64)) == "q is on cpu"
    assert problem("flex", torch.randn(1, 1, 0, 64)) == "q is empty"
    monkeypatch.setattr(cudnn, "_captures", lambda: True)
    assert "CUDA graph" in problem("cudnn", like("cuda"))
    monkeypatch.setattr(cudnn, "_capability", lambda device: (8, 9))
    assert problem("cudnn", like("cuda")) == "the compute capability is 8.9, it takes 9.0, 10.0, 10.3"


def test_a_library_that_is_missing_or_broken_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn, "_captures", lambda: False)
    monkeypatch.setattr(cudnn, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(cudnn.importlib.util, "find_spec", lambda name: None)
    remedy = "(pip install 'nvidia-cudnn-frontend>=1.32')"
    assert problem("cudnn", like("cuda")) == f"nvidia-cudnn-frontend is not installed {remedy}"
    monkeypatch.setattr(cudnn.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "cudnn.flex_attention", None)
    for cached in (cudnn._library, cudnn._import_failure):
        cached.cache_clear()
    told = problem("cudnn", like("cuda"))
    assert told.startswith("cudnn.flex_attention cannot be imported, ModuleNotFoundError: ")
    assert told.endswith(remedy) and "\n" not in told
    for cached in (cudnn._library, cudnn._import_failure):
        cached.cache_clear()
