"""Bugs that others' attention kernels shipped with, each as a test that would have found it in ours.

Each test has a mutant beside it that has the bug, so that the test is seen to fail. What needs Triton's interpreter is
in `test_interpreted_public_bugs.py`, and what only a GPU can show in `test_public_bugs_gpu.py`.

| public bug | what went wrong there |
|---|---|
| flash-attention #2623 | gradients 150 to 700 times too large at head_dim 64, finite, behind an exact forward |
| flash-attention #2756 | a backward on Hopper that did not wait for the kernel whose results it reads |
| flash-attention #2429 | a mask made for tiles of one size, read by a kernel with tiles of another |
| pytorch #188322 | a mask ignored where it has nothing to hide within the tiles that are visited |
| lerobot #4179 | the cumsum and the comparison that make a mask, compiled to something else, so that the loss was NaN |
| triton #10573 | illegal accesses of a backward at head_dim 32, with tiles of 32 or 64 queries and 128 keys |
"""

from __future__ import annotations

import contextlib
import operator
import os
import shutil
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from public_bugs import (
    FILLS,
    Guards,
    Late,
    Noted,
    attend,
    attend_between_guards,
    between_guards,
    bounds_of_documents,
    changed_outside,
    differing,
    errors,
    inputs_for,
    whole_tiles,
)
from torch import Tensor
from torch._inductor import config as inductor

from transfusion_kernels import IntervalMask, interval_attention
from transfusion_kernels.attention import layout
from transfusion_kernels.verification.testing import mask_of, poisoned_memory, relative_error

triton = pytest.importorskip("triton", reason="triton is not installed")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter's are in test_interpreted_public_bugs.py", allow_module_level=True)

from gluon_simulator import Fault  # noqa: E402
from hopper_cases import BACKWARD_MUTANTS, WIDTH, Change, backward_errors, caught, simulated  # noqa: E402

from transfusion_kernels.attention import hopper  # noqa: E402
from transfusion_kernels.attention.tiles import Tile  # noqa: E402

BAR = 5e-6
IMPLEMENTATIONS = ["cpu", "reference", "hopper"]
TILE = 64  # of the simulated kernels, but for those at the size of a GPU


@contextlib.contextmanager
def able_to_run(
    implementation: str, small_tiles: bool = True, changes: list[Change] | None = None
) -> Iterator[None]:
    """Within it, Hopper's kernels are simulated where they are asked for."""
    simulator = simulated(changes=changes or [], small_tiles=small_tiles)
    with poisoned_memory(), simulator if implementation == "hopper" else contextlib.nullcontext():
        yield


# flash-attention #2623


def long_mask(name: str) -> IntervalMask:
    """Of several tiles. Made anew for each test, since what is derived from a mask is for one size of tiles."""
    if name == "causal":
        return mask_of(300, [(0, 300)])
    return mask_of(300, [(0, 140), (140, 300)], [(10, 90), (150, 290)], length=297)


@pytest.mark.parametrize("name", ["causal", "image"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_at_head_dim_64_have_the_right_size(implementation: str, name: str) -> None:
    """With the tiles that are shipped, over several tiles of keys and steps without a mask."""
    mask = long_mask(name)
    inputs = inputs_for(mask, 64, group=2)
    with able_to_run(implementation, small_tiles=False):
        results = attend(implementation, inputs, mask)
    assert max(errors(results, inputs, mask).values()) < BAR


# What is wrong in the backward alone, and the least error that it makes somewhere.
SIZED_MUTANTS: dict[str, tuple[list[Change], float]] = {
    # As where a mask's tile is taken for two of the kernel's: here it is in the order of tiles twice.
    "every tile is taken twice": ([], 0.99),
    "statistics are those of the first step": (
        [
            (
                "tma_load(d_statistics, [row, head, 0, query]",
                "tma_load(d_statistics, [row, head, 0, 0 * query + base]",
            )
        ],
        20.0,
    ),
    "a gradient is 150 times too large": ([("(b_dk * scale)", "(b_dk * (150 * scale))")], 148.0),
}


@pytest.mark.parametrize("mutant", SIZED_MUTANTS)
def test_gradients_of_the_wrong_size_are_noticed(mutant: str) -> None:
    """The forward stays exact and the gradients finite, as in the bug. Some even keep their direction."""
    changes, least = SIZED_MUTANTS[mutant]
    mask = long_mask("causal")
    q, k, v, grad_out = inputs_for(mask, 64, group=2)
    inputs = (4 * q, k, v, grad_out)
    right = attend("cpu", inputs, mask)
    with able_to_run("hopper", small_tiles=False, changes=changes), contextlib.ExitStack() as stack:
        if not changes:
            twice = mask.key_order.repeat(2)
            stack.enter_context(mock.patch.object(IntervalMask, "key_order", twice))
        results = attend("hopper", inputs, mask)
    found = errors(results, inputs, mask)
    assert found["out"] < BAR
    assert all(bool(x.isfinite().all()) for x in results)
    assert max(found.values()) > least
    if mutant != "statistics are those of the first step":
        for ours, expected in zip(results, right, strict=True):
            assert F.cosine_similarity(ours.flatten(), expected.flatten(), dim=0) > 0.999


# flash-attention #2756


def test_no_launch_overlaps_the_one_before_it() -> None:
    """What the backward reads is written by a launch before it, none of which may start early."""
    launches: list[tuple[str, dict[str, Any]]] = []
    mask = long_mask("image")
    with able_to_run("hopper"), contextlib.ExitStack() as stack:
        for name in ("forward_kernel", "statistics_kernel", "backward_kernel"):
            noted = Noted(name, getattr(hopper, name), launches)
            stack.enter_context(mock.patch.object(hopper, name, noted))
        attend("hopper", inputs_for(mask, WIDTH), mask)
    assert [name for name, _ in launches] == ["forward_kernel", "statistics_kernel", "backward_kernel"]
    assert not any(options.get("launch_pdl") for _, options in launches)


@pytest.mark.parametrize("late", ["statistics", "zeros"])
def test_a_backward_that_starts_early_is_noticed(late: str) -> None:
    """Memory from which nobody has read yet holds NaN in these tests. What an earlier run left there would hide it."""
    mask = long_mask("image")
    inputs = inputs_for(mask, WIDTH)
    with able_to_run("hopper"), contextlib.ExitStack() as stack:
        statistics = Late(hopper.statistics_kernel)
        if late == "statistics":
            stack.enter_context(mock.patch.object(hopper, "statistics_kernel", statistics))
        else:
            stack.enter_context(mock.patch.object(Tensor, "new_zeros", Tensor.new_empty))
        results = attend("hopper", inputs, mask)
        statistics.catch_up()
    assert bool(results[0].isfinite().all())
    assert bool(results[1].isnan().any())


@pytest.mark.parametrize("what", ["keys", "queries"])
def test_a_wait_left_out_of_the_backward_is_a_race(what: str) -> None:
    """Within the kernel. `test_hopper.py` has the other barriers, fences and stores."""
    mutant = BACKWARD_MUTANTS[f"a consumer does not wait for {what}"]
    assert caught(mutant, backward_errors).startswith("race: ")


# flash-attention #2429


def test_tiles_that_do_not_divide_the_masks_are_refused() -> None:
    with pytest.raises(ValueError, match="rows: got 96, takes a divisor of 128"):
        Tile(96, 64, 4, 2)


@pytest.mark.parametrize(("forward", "backward"), [(16, 64), (64, 16), (128, 32), (32, 128)])
def test_one_mask_serves_a_forward_and_a_backward_of_other_steps(forward: int, backward: int) -> None:
    mask = long_mask("image")
    inputs = inputs_for(mask, WIDTH, group=2)
    with able_to_run("hopper"), contextlib.ExitStack() as stack:
        for name, step in (("FORWARD", forward), ("BACKWARD", backward)):
            stack.enter_context(mock.patch.object(hopper, name, {WIDTH: hopper.Ring(step, stages=2)}))
        results = attend("hopper", inputs, mask)
    assert max(errors(results, inputs, mask).values()) < BAR


@pytest.mark.parametrize("rows", [TILE // 2, TILE, 2 * TILE])
def test_a_mask_made_for_tiles_of_another_size_is_noticed(rows: int) -> None:
    """Its orders name too many tiles, or leave out half of them."""
    mask = long_mask("image")
    inputs = inputs_for(mask, WIDTH)
    with mock.patch.object(layout, "TILE_ROWS", rows):
        _ = mask.query_order, mask.key_order
    fault = ""
    with able_to_run("hopper"):
        try:
            found = errors(attend("hopper", inputs, mask), inputs, mask)
        except Fault as raised:
            fault, found = str(raised), {}
    if rows == TILE:
        assert not fault
        assert max(found.values()) < BAR
    else:
        assert fault or not max(found.values()) < 0.1


# pytorch #188322


def ignoring_bounds(size: int) -> list[Change]:
    """Every tile visits all of the row and masks nothing, since no visited tile had anything to mask."""
    return [
        (f"gl.load({bound} + {place})", f"(0 * gl.load({bound} + {place}) + {value})")
        for bound, value in (("p_first", 0), ("p_end", size))
        for place in ("start", "last")
    ]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_mask_with_nothing_to_hide_within_tiles_still_counts(implementation: str) -> None:
    """What one document gets does not depend on a bit of what stands in the others."""
    rows = TILE if implementation == "hopper" else layout.TILE_ROWS
    mask = whole_tiles(3, rows)
    inputs = inputs_for(mask, WIDTH, group=2)
    document = slice(rows, 2 * rows)
    with able_to_run(implementation):
        results = attend(implementation, inputs, mask)
        others = attend(implementation, changed_outside(inputs, rows, 2 * rows, by=30.0), mask)
    assert max(errors(results, inputs, mask).values()) < BAR
    for ours, again in zip(results, others, strict=True):
        assert torch.equal(ours[:, :, document], again[:, :, document])
        assert not torch.equal(ours, again)


def test_a_mask_that_is_ignored_is_noticed() -> None:
    mask, inputs = whole_tiles(3, TILE), inputs_for(whole_tiles(3, TILE), WIDTH, group=2)
    with able_to_run("hopper", changes=ignoring_bounds(mask.num_keys)):
        results = attend("hopper", inputs, mask)
    assert min(errors(results, inputs, mask).values()) > 0.3


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("sees", ["everything", "nothing"])
def test_masks_without_an_edge(sees: str, implementation: str) -> None:
    size = 2 * layout.TILE_ROWS
    begin = torch.zeros(1, size, dtype=torch.int32)
    mask = IntervalMask(begin, begin + (size if sees == "everything" else 0))
    inputs = inputs_for(mask, WIDTH)
    with able_to_run(implementation):
        results = attend(implementation, inputs, mask)
    if sees == "nothing":
        assert not any(bool(x.any()) for x in results)
        return
    q, k, v = (x.double().requires_grad_() for x in inputs[:3])
    out = F.scaled_dot_product_attention(q, k, v)
    dense = (out.detach(), *torch.autograd.grad(out, (q, k, v), inputs[3].double()))
    for ours, right in zip(results, dense, strict=True):
        assert relative_error(ours, right) < BAR


# lerobot #4179


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")
def test_a_compiled_mask_is_the_mask() -> None:
    """In the compiler's own code, for short rows of any length, with the loss and the gradient that come of it."""

    def step(
        q: Tensor, k: Tensor, v: Tensor, begins: Tensor, image_end: Tensor, length: Tensor
    ) -> tuple[Tensor, ...]:
        bounds = bounds_of_documents(begins, image_end, length)
        out = interval_attention(q, k, v, IntervalMask(*bounds[:2]))
        assert isinstance(out, Tensor)
        return out.square().mean(), *bounds

    losses = []

    def compiled_bounds(begins: Tensor, image_end: Tensor, length: Tensor) -> tuple[Tensor, ...]:
        q, k, v = torch.randn(3, len(begins), 2, begins.shape[1], 32).unbind()
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        loss, *bounds = compiled(*inputs, begins, image_end, length)
        eager, *_ = step(*inputs, begins, image_end, length)
        torch.testing.assert_close(loss, eager)
        for ours, right in zip(
            torch.autograd.grad(loss, inputs), torch.autograd.grad(eager, inputs), strict=True
        ):
            torch.testing.assert_close(ours, right)
        losses.append(float(loss.detach()))
        return tuple(bounds)

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    # To know which vector instructions there are the compiler builds a program for each, for five seconds.
    with inductor.patch({"cpp.vec_isa_ok": True, "compile_threads": 1}):
        for seed, (rows, size) in enumerate([(3, 7), (2, 33), (4, 129), (2, 300)]):
            assert differing(compiled_bounds, seed, rows, size) == []
    assert len(losses) == 4


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("cumsum", "cumprod"), (operator.lt, operator.le), (torch.maximum, torch.minimum)],
)
def test_a_compiler_that_errs_is_noticed(right: Any, wrong: Any) -> None:
    """One operation of the graph is computed as another."""

    def erring(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        nodes = [node for node in graph.graph.nodes if node.target == right]
        assert nodes
        for node in nodes:
            node.target = wrong
        graph.recompile()
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(bounds_of_documents, fullgraph=True, dynamic=True, backend=erring)
    assert differing(compiled, seed=0, rows=3, size=33)


# triton #10573


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("size", [1, 33, 130])
@pytest.mark.parametrize("implementation", ["cpu", "hopper"])
def test_nothing_outside_is_read_or_written(implementation: str, size: int, fill: float) -> None:
    """The interpreter has the same for the Triton kernels at head_dim 32."""
    mask = mask_of(size, [(0, size // 2), (size // 2, size)], [(size // 2, size)])
    width = WIDTH if implementation == "hopper" else 32
    inputs = inputs_for(mask, width, group=2)
    with able_to_run(implementation):
        results, intact = attend_between_guards(implementation, inputs, mask, fill)
    assert intact
    assert max(errors(results, inputs, mask).values()) < BAR


@pytest.mark.parametrize("fill", FILLS)
def test_guards_tell_what_crosses_them(fill: float) -> None:
    mask = mask_of(33, [(0, 33)])
    inputs = inputs_for(mask, 32)
    q, k, v, grad_out = (between_guards(x, fill) for x in inputs)
    # One row more than there is, which queries are said to see.
    longer = [x.as_strided((2, 2, 34, 32), x.stride(), x.storage_offset()) for x in (k, v)]
    seeing = IntervalMask(mask.first_key, torch.full_like(mask.end_key, 34), num_keys=34)
    with poisoned_memory():
        results = attend("cpu", (q, *longer, grad_out), seeing)  # type: ignore[arg-type]
    all_seen = IntervalMask(mask.first_key, torch.full_like(mask.end_key, 33))
    assert not errors(results[:1] * 4, inputs, all_seen)["out"] < 0.1
    with Guards() as guards:
        rows = q.new_empty(2, 33)
        counts = torch.zeros(33, dtype=torch.int32)
    assert guards.intact()
    assert bool(rows.isnan().all()) and not counts.any()
    for written in (rows, counts):
        for place in (-1, written.numel()):
            around = written.as_strided((1,), (1,), written.storage_offset() + place)
            before = around.clone()
            around.fill_(3)
            assert not guards.intact()
            around.copy_(before)
    assert guards.intact()
