"""The Hopper kernels in the simulator, behind their own host code: what the tests and the campaign share.

Tiles are smaller than on a GPU, so that short rows have many of them, and inputs are float32, so that an error is not
taken for rounding.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import torch
from gluon_simulator import Fault, SimulatedKernel, Simulator
from torch import Tensor

from transfusion_kernels import IntervalMask
from transfusion_kernels.attention import hopper, hopper_backward, hopper_forward, layout, tiles
from transfusion_kernels.verification.testing import exact_attention, mask_of, poisoned_memory, relative_error

WIDTH = 16
SCALE = 0.3
BAR = 5e-6
Change = tuple[str, str]
Run = Callable[[IntervalMask, int, int], dict[str, float]]


@contextlib.contextmanager
def simulated(seed: int = 0, changes: Sequence[Change] = (), small_tiles: bool = True) -> Iterator[None]:
    """Within it the host code of `hopper` launches simulated kernels, with `changes` made to their source."""
    forward, backward = Path(hopper_forward.__file__), Path(hopper_backward.__file__)
    # A change is made to every file that has the text, and must be to one of them.
    texts = [path.read_text(encoding="utf-8") for path in (forward, backward)]
    of_forward, of_both = ([c for c in changes if c[0] in text] for text in (texts[0], "".join(texts)))
    simulators = {
        "forward_kernel": Simulator(forward, changes=of_forward, seed=seed),
        "statistics_kernel": (both := Simulator(forward, backward, changes=of_both, seed=seed)),
        "backward_kernel": both,
    }
    assert len(of_both) == len(changes)
    with contextlib.ExitStack() as stack:
        for name, simulator in simulators.items():
            kernel = SimulatedKernel(simulator, name, hopper.OPTIONS)
            stack.enter_context(mock.patch.object(hopper, name, kernel))
        # Heads one by one, a few or all together.
        cache_bytes = (0, 3000, tiles.CACHE_BYTES)[seed % 3]
        stack.enter_context(mock.patch.object(tiles, "CACHE_BYTES", cache_bytes))
        stack.enter_context(mock.patch.object(tiles, "LEAST_TOGETHER", 1))
        # A program for every tile, or some that take tile after tile.
        count = (1, 3, 1000)[seed // 3 % 3]
        stack.enter_context(mock.patch.object(hopper, "processors", lambda device: count))
        if small_tiles:
            stack.enter_context(mock.patch.object(layout, "TILE_ROWS", 64))
            ring = {WIDTH: hopper.Ring(step=32, stages=2)}
            stack.enter_context(mock.patch.object(hopper, "FORWARD", ring))
            stack.enter_context(mock.patch.object(hopper, "BACKWARD", ring))
        yield


def forward_errors(mask: IntervalMask, group: int, seed: int = 0) -> dict[str, float]:
    """Run the forward, within `simulated`, on strided inputs; its errors against the reference in float64."""
    q, k, v, grad_out = _inputs(mask, group, seed)
    with poisoned_memory():
        out, lse = hopper.attention_forward(q, k, v, mask.first_key, mask.end_key, mask.query_order, SCALE)
    exact_out, exact_lse, _ = exact_attention(q, k, v, mask, grad_out, scale=SCALE)
    return {"out": relative_error(out, exact_out), "lse": relative_error(lse.exp(), exact_lse.exp())}


def backward_errors(mask: IntervalMask, group: int, seed: int = 0) -> dict[str, float]:
    """The same of the backward, given the exact output and log-sum-exp."""
    q, k, v, grad_out = _inputs(mask, group, seed)
    exact_out, exact_lse, exact_gradients = exact_attention(q, k, v, mask, grad_out, scale=SCALE)
    out, lse, columns = (
        exact_out.float(),
        exact_lse.float(),
        (mask.first_query, mask.end_query, mask.key_order),
    )
    with poisoned_memory():
        gradients = hopper.attention_backward(grad_out, q, k, v, out, lse, *columns, SCALE)
    return {
        name: relative_error(ours, exact, floor=1.0)
        for name, ours, exact in zip(("dq", "dk", "dv"), gradients, exact_gradients, strict=True)
    }


def _inputs(mask: IntervalMask, group: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    heads = max(2, group)
    q = torch.randn(2, mask.num_queries, heads, WIDTH, generator=generator).transpose(1, 2)
    k = torch.randn(2, heads // group, mask.num_keys, WIDTH, generator=generator)
    v = torch.randn(2, mask.num_keys, 2, heads // group, WIDTH, generator=generator)[:, :, 1].transpose(1, 2)
    return q, k, v, torch.randn(q.shape, generator=generator)


def random_mask(seed: int, size: int) -> IntervalMask:
    """One row that a batch shares, or two rows, of documents and images of random lengths, and perhaps padding."""
    draw = random.Random(seed)
    rows = [_random_row(draw, size) for _ in range(1 + seed % 2)]
    return IntervalMask(
        *(torch.cat([getattr(row, name) for row in rows]) for name in ("first_key", "end_key"))
    )


def _random_row(draw: random.Random, size: int) -> IntervalMask:
    length = draw.randint(0, size) if draw.random() < 0.3 else size
    documents, images, start = [], [], 0
    while start < length:
        end = min(length, start + draw.randint(1, size))
        documents.append((start, end))
        image = start + draw.randint(0, end - start)
        while image < end and draw.random() < 0.7:
            image_end = draw.randint(image + 1, end)
            images.append((image, image_end))
            image = image_end + draw.randint(0, 5)
        start = end
    return mask_of(size, documents, images, length=length)


def low_score_gradients() -> tuple[Tensor, Tensor, Tensor]:
    """Of scores so low that keys past the last, whose scores are 0, would weigh infinitely much."""
    mask = mask_of(70, [(0, 70)], [(0, 70)])
    q, k = torch.full((1, 1, 70, WIDTH), 10.0), torch.full((1, 1, 70, WIDTH), -10.0)
    v, grad_out = torch.randn(2, 1, 1, 70, WIDTH).unbind()
    out, lse, _ = exact_attention(q, k, v, mask, grad_out, scale=SCALE)
    columns = (mask.first_query, mask.end_query, mask.key_order)
    return hopper.attention_backward(grad_out, q, k, v, out.float(), lse.float(), *columns, SCALE)


UNMASKED_END = ("gl.where(start + ROWS > keys, full_start, full_end)", "full_end")
# What is wrong with each, and how to make it so.
FORWARD_MUTANTS: dict[str, Change] = {
    "the producer does not wait for keys to be used": (
        "            mbarrier.wait(k_empty.index(slot), parity ^ 1)\n",
        "",
    ),
    "the producer does not wait for values to be used": (
        "            mbarrier.wait(v_empty.index(slot), parity ^ 1)\n",
        "",
    ),
    "the producer does not wait for queries to be used": (
        "            mbarrier.wait(q_empty.index(member), (turn & 1) ^ 1)\n",
        "",
    ),
    "the producer does not wait for what it told to be read": (
        "    mbarrier.wait(empty.index(0), (turn & 1) ^ 1)\n",
        "",
    ),
    "what is told is read before it is told": ("    mbarrier.wait(full.index(0), turn & 1)\n", ""),
    "an item is left out": ("gl.num_programs(0) + gl.atomic_add", "gl.num_programs(0) + 1 + gl.atomic_add"),
    "steps are not counted on from item to item": ("        done = end\n", "        done = 0\n"),
    "the parity of queries is frozen": (
        "mbarrier.wait(q_full.index(MEMBER), turn & 1)\n        mbarrier.wait(k_full",
        "mbarrier.wait(q_full.index(MEMBER), 0)\n        mbarrier.wait(k_full",
    ),
    "queries are given back before the last scores": (
        "        mbarrier.wait(turns.index(MEMBER), done & 1)\n",
        "        mbarrier.wait(turns.index(MEMBER), done & 1)\n"
        "        mbarrier.arrive(q_empty.index(MEMBER), count=1)\n",
    ),
    "the last values are not given back": (
        "        mbarrier.arrive(v_empty.index(slot), count=1)\n        b_out = b_out * gl.convert_layout(1.0",
        "        b_out = b_out * gl.convert_layout(1.0",
    ),
    "an output replaces one that is still being stored": (
        "        tma_store_wait(0)\n        s_out",
        "        s_out",
    ),
    "a consumer does not wait for keys": (
        "        mbarrier.wait(k_full.index(slot), parity)\n        mbarrier.wait(turns.index(MEMBER), i & 1)\n",
        "        mbarrier.wait(turns.index(MEMBER), i & 1)\n",
    ),
    "a consumer does not wait for the first keys": (
        "        mbarrier.wait(k_full.index(slot), parity)\n        mbarrier.wait(turns.index(MEMBER), done & 1)\n",
        "        mbarrier.wait(turns.index(MEMBER), done & 1)\n",
    ),
    "a consumer does not wait for values": (
        "        mbarrier.wait(v_full.index(last_slot), last_parity)\n",
        "",
    ),
    "a consumer does not wait for queries": (
        "        mbarrier.wait(q_full.index(MEMBER), turn & 1)\n        mbarrier.wait(k_full",
        "        mbarrier.wait(k_full",
    ),
    "values are given back before they are used": (
        "        b_out = warpgroup_mma_wait(0, deps=(t_out,))\n"
        "        mbarrier.arrive(v_empty.index(last_slot), count=1)\n",
        "        mbarrier.arrive(v_empty.index(last_slot), count=1)\n"
        "        b_out = warpgroup_mma_wait(0, deps=(t_out,))\n",
    ),
    "scores are used before they are done": (
        "warpgroup_mma_wait(1, deps=(t_score,))",
        "warpgroup_mma_wait(2, deps=(t_score,))",
    ),
    "nobody starts the turns": ("        mbarrier.arrive(turns.index(0), count=1)\n", "        pass\n"),
    "turns are not handed on": ("        mbarrier.arrive(turns.index(1 - MEMBER), count=1)\n", ""),
    "the phase is frozen": ("(step // STAGES) & 1", "0"),
    "one consumer gives a place back for both": (
        "        make_barriers(STAGES, 1),\n        make_barriers(STAGES, 2),\n    )\n    values",
        "        make_barriers(STAGES, 1),\n        make_barriers(STAGES, 1),\n    )\n    values",
    ),
    "too few bytes are expected": (
        "mbarrier.expect(v_full.index(slot), d_v.block_type.nbytes)",
        "mbarrier.expect(v_full.index(slot), d_v.block_type.nbytes // 2)",
    ),
    "the output is not fenced": ("    fence_async_shared()\n        tma_store", "    tma_store"),
    "the barriers are not fenced": ("    fence_async_shared()\n    bounds", "    bounds"),
    "the last output's store is not waited for": (
        "hear(told, turn)\n    tma_store_wait(0)\n",
        "hear(told, turn)\n",
    ),
    "the mask's end is off by one": ("o_n[None, :] < b_end[:, None]", "o_n[None, :] <= b_end[:, None]"),
    "the mask's start is off by one": ("o_n[None, :] >= b_first", "o_n[None, :] > b_first"),
    "the full range ends late": (
        "gl.maximum(low_end - low_first, 0) // STEP",
        "(gl.maximum(low_end - low_first, 0) + STEP - 1) // STEP",
    ),
    "the full range starts early": (
        "gl.minimum((high_first - low_first + STEP - 1) // STEP, steps)",
        "gl.minimum((high_first - low_first) // STEP, steps)",
    ),
    "the output is not shrunk": ("gl.convert_layout(b_decay,", "gl.convert_layout(1 + 0 * b_decay,"),
    "the second consumer's rows are the first's": ("start + MEMBER * HALF + gl.arange", "start + gl.arange"),
    "all heads read the first key head": ("key_head = head // group", "key_head = 0 * head"),
    "the next heads are the first again": ("item // wave * together + within", "within"),
    "heads share their tiles out": ("within // together", "within"),
    "all rows read the first row's mask": (
        "(row, head, mask_row, start,", "(row, head, 0 * mask_row, start,"),
}  # fmt: skip


BACKWARD_MUTANTS: dict[str, Change] = {
    "the producer does not wait for queries to be used": (
        "        mbarrier.wait(empty.index(slot), parity ^ 1)\n",
        "",
    ),
    "a consumer does not wait for keys": ("    mbarrier.wait(kv_full.index(0), 0)\n", ""),
    "a consumer does not wait for queries": ("        mbarrier.wait(full.index(slot), parity)\n", ""),
    "queries are given back before they are used": (
        "        b_dk = warpgroup_mma_wait(1, deps=(t_dk,))\n        mbarrier.arrive(empty.index(slot), count=1)\n",
        "        mbarrier.arrive(empty.index(slot), count=1)\n        b_dk = warpgroup_mma_wait(1, deps=(t_dk,))\n",
    ),
    "queries are not given back": ("        mbarrier.arrive(empty.index(slot), count=1)\n", ""),
    "a consumer does not wait for the other's gradients of scores": (
        "        mbarrier.wait(dscore_full.index(0), turn & 1)\n",
        "",
    ),
    "the other's gradients of scores are waited for once": (
        "dscore_full.index(0), turn & 1",
        "dscore_full.index(0), 0",
    ),
    "gradients of scores are replaced while the other uses them": (
        "        mbarrier.wait(dscore_empty.index(0), (turn & 1) ^ 1)\n",
        "",
    ),
    "gradients of scores are given back before they are used": (
        "        b_dq = warpgroup_mma_wait(0, deps=(t_dq,))\n"
        "        mbarrier.arrive(dscore_empty.index(0), count=1)\n",
        "        mbarrier.arrive(dscore_empty.index(0), count=1)\n"
        "        b_dq = warpgroup_mma_wait(0, deps=(t_dq,))\n",
    ),
    "one consumer tells of both's gradients of scores": (
        "(make_barriers(1, 2), make_barriers(1, 2))",
        "(make_barriers(1, 1), make_barriers(1, 2))",
    ),
    "keys are replaced by their gradient while the other uses them": (
        "    mbarrier.wait(dscore_empty.index(0), (group * steps & 1) ^ 1)\n",
        "",
    ),
    "both consumers make the same columns": ("s_keys.slice(MEMBER * PART,", "s_keys.slice(0,"),
    "both consumers add the same columns": ("query, MEMBER * PART], s_dq", "query, 0], s_dq"),
    "one consumer gives a place back for both": ("make_barriers(STAGES, 2)", "make_barriers(STAGES, 1)"),
    "the phase is frozen": ("(step // STAGES) & 1", "0"),
    "statistics are not expected": (
        "d_grad.block_type.nbytes + d_statistics.block_type.nbytes",
        "d_grad.block_type.nbytes",
    ),
    "values are not expected": ("d_k.block_type.nbytes + d_v.block_type.nbytes", "d_k.block_type.nbytes"),
    "the scores' gradient is not fenced": (
        "        fence_async_shared()\n        mbarrier.arrive(dscore_full",
        "        mbarrier.arrive(dscore_full",
    ),
    "the queries' gradient is not fenced": ("        fence_async_shared()\n        tma_add", "        tma_add"),
    "the keys' gradient is not fenced": ("    fence_async_shared()\n    tma_store", "    tma_store"),
    "what left for the queries' gradient is not waited for": (
        "        tma_store_wait(0)\n        b_dq",
        "        b_dq",
    ),
    "the last stores are not waited for": (
        "s_v.index(0).slice(MEMBER * HALF, HALF, 2))\n    tma_store_wait(0)\n",
        "s_v.index(0).slice(MEMBER * HALF, HALF, 2))\n",
    ),
    "the weights' gradient is used before it is done": (
        "warpgroup_mma_wait(1, deps=(t_dweight,))",
        "warpgroup_mma_wait(2, deps=(t_dweight,))",
    ),
    "the mask's end is off by one": ("o_m[None, :] < b_end[:, None]", "o_m[None, :] <= b_end[:, None]"),
    "the mask's start is off by one": ("o_m[None, :] >= b_first", "o_m[None, :] > b_first"),
    "the full range ends late": (
        "gl.maximum(gl.maximum(low_end - base, 0) // STEP, full_start)",
        "gl.maximum((gl.maximum(low_end - base, 0) + STEP - 1) // STEP, full_start)",
    ),
    "the full range starts early": (
        "gl.minimum((high_first - base + STEP - 1) // STEP, steps)",
        "gl.minimum((high_first - base) // STEP, steps)",
    ),
    "the last step is left out": (
        "steps = (gl.maximum(high_end - base, 0) + STEP - 1) // STEP",
        "steps = gl.maximum(high_end - base, 0) // STEP",
    ),
    "a group shares its first head's queries": (
        "tma_load(d_q, [row, head, query, 0]",
        "tma_load(d_q, [row, key_head * group, query, 0]",
    ),
    "the group's gradients go to its first head": (
        "tma_add(d_dq, [row, head,",
        "tma_add(d_dq, [row, key_head * group,",
    ),
    "one shift for all": ("- b_shift", "- b_shift[:, :1]"),
    "a head goes on where the last one ended": ("gl.where(last, base, query + STEP)", "query + STEP"),
    "no output's product with its gradient": ("gl.sum(b_out * b_grad, 1)", "0 * gl.sum(b_out * b_grad, 1)"),
    "the keys' gradient is not scaled": ("(b_dk * scale)", "b_dk"),
}  # fmt: skip


def caught(change: Change, run: Run, attempts: int = 20) -> str:
    """How the simulator notices a change to the source: the fault or the error it met first; nothing if it does not."""
    for seed in range(attempts):
        group, mask = 1 + seed % 2, random_mask(seed, size=170)
        try:
            with simulated(seed, [change]):
                errors = run(mask, group, seed)
        except Fault as fault:
            return str(fault)
        if not max(errors.values()) < BAR:
            return f"wrong values: {errors}"
    return ""
