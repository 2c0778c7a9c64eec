"""Compiles kernels into Triton's cache before they are launched, on many cores and without touching a GPU.

    python -m gpu_check.compile_ahead SET --processes N --out FILE

A kernel's place in the cache depends on its source, its arguments and the GPU's architecture, so launching it later
finds it. The sets: `first` holds what the probes, the headline of the attention table and the two steps launch. `tests`
holds what the tests of the kernels launch, `sweep` the variants of `gpu_check.sweep`, and `rehearsal` a few kernels.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from gpu_check.record import write_json
from gpu_check.variants import VARIANTS, Variant, applied
from transfusion_kernels.attention import decode, hopper
from transfusion_kernels.attention.backward import attention_backward
from transfusion_kernels.attention.decode import decode_forward
from transfusion_kernels.attention.derived import bounds_from_spans, columns, longest_first
from transfusion_kernels.attention.forward import attention_forward
from transfusion_kernels.attention.layout import NARROW_WIDTH, TILE_ROWS
from transfusion_kernels.dispatch import HOPPER_DTYPES, HOPPER_HEAD_DIMS, TRITON_DTYPES
from transfusion_kernels.probe.child import CACHES, CASES
from transfusion_kernels.verification.machine_code import compile_launches
from transfusion_kernels.verification.testing import mask_families

# Of an H100 and an H200: by them an attention to a cache is split into parts.
PROCESSORS = 132
# Pools in which a compiler crashed that are made anew.
MAX_CRASHES = 3
HALF = torch.bfloat16


@dataclass(frozen=True)
class Shape:
    """Attention as it is launched. key_heads: 0 for as many as heads. masks: rows of the mask, 0 for one each."""

    rows: int
    queries: int
    heads: int
    head_dim: int
    dtype: torch.dtype = HALF
    key_heads: int = 0
    keys: int = 0
    masks: int = 0
    narrow: bool = False

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        keys = f" against {self.keys}" if self.keys else ""
        shared = f", {self.masks} masks" if self.masks else ""
        narrow = ", narrow" if self.narrow else ""
        return (
            f"{self.rows}x{self.queries}{keys}{shared}{narrow}, {self.heads} heads of {self.head_dim}, {kind}"
        )


Job = tuple[str, Callable[[], object]]


def launch_triton(shape: Shape, deterministic: bool) -> None:
    """What Triton's portable kernels launch, forward and backward."""
    q, k, v, grad_out, bounds, orders = _arguments(shape)
    scale = shape.head_dim**-0.5
    out, lse = attention_forward(q, k, v, bounds[0], bounds[1], orders[0], scale, shape.narrow)
    attention_backward(grad_out, q, k, v, out, lse, bounds, orders, scale, deterministic, shape.narrow)


def launch_hopper(shape: Shape) -> None:
    """What the Hopper kernels launch, forward and backward."""
    q, k, v, grad_out, bounds, orders = _arguments(shape)
    scale = shape.head_dim**-0.5
    with mock.patch.object(hopper, "processors", lambda device: PROCESSORS):
        out, lse = hopper.attention_forward(q, k, v, bounds[0], bounds[1], orders[0], scale)
    if shape.head_dim in hopper.BACKWARD:
        hopper.attention_backward(grad_out, q, k, v, out, lse, bounds[2], bounds[3], orders[1], scale)


def launch_mask(rows: int, positions: int, *, with_length: bool) -> None:
    """What a mask of spans is made with, and what is derived from it."""
    spans = torch.empty(2, rows, positions, dtype=torch.int64, device="meta")
    length = torch.empty(rows, dtype=torch.int64, device="meta") if with_length else None
    bounds = bounds_from_spans(spans[0], spans[1], length)
    longest_first(*columns(*bounds, positions), TILE_ROWS)


def launch_cache(rows: int, queries: int, heads: int, key_heads: int, keys: int, head_dim: int, slots: int,
                 dtype: torch.dtype, parts: int) -> None:  # fmt: skip
    """What attention to a cache launches. slots: of a page, 0 for a static cache. parts: 0 to have them chosen."""
    q = _empty(rows, queries, heads, head_dim, dtype).transpose(1, 2)
    bound = torch.empty(rows, queries, dtype=torch.int32, device="meta")
    table = None
    if slots:
        pages = -(-keys // slots)
        cache = torch.empty(rows * pages + 1, key_heads, slots, head_dim, dtype=dtype, device="meta")
        table = torch.empty(rows, pages, dtype=torch.int32, device="meta")
    else:
        cache = _empty(rows, keys, key_heads, head_dim, dtype).transpose(1, 2)
    with mock.patch.object(decode, "processors", lambda device: PROCESSORS):
        decode_forward(q, cache, cache, bound, bound, table, keys, head_dim**-0.5, parts)


def _arguments(shape: Shape) -> tuple[Any, ...]:
    """q, k, v, the gradient of the output, the four bounds, the two orders."""
    key_heads, keys = shape.key_heads or shape.heads, shape.keys or shape.queries
    q, grad_out = (
        _empty(shape.rows, shape.queries, shape.heads, shape.head_dim, shape.dtype).transpose(1, 2)
        for _ in range(2)
    )
    k, v = (
        _empty(shape.rows, keys, key_heads, shape.head_dim, shape.dtype).transpose(1, 2) for _ in range(2)
    )
    masks = shape.masks or shape.rows
    sizes = (shape.queries, shape.queries, keys, keys)
    bounds = tuple(torch.empty(masks, size, dtype=torch.int32, device="meta") for size in sizes)
    orders = tuple(
        torch.empty(masks * -(-size // TILE_ROWS), dtype=torch.int32, device="meta") for size in sizes[1:3]
    )
    return q, k, v, grad_out, bounds, orders


def _empty(rows: int, positions: int, heads: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(rows, positions, heads, head_dim, dtype=dtype, device="meta")


def launch_variant(variant: Variant) -> None:
    """What a variant of the sweep launches."""
    shape = Shape(2, 8192, 2048 // variant.head_dim, variant.head_dim)
    with applied(variant):
        if variant.implementation == "hopper":
            launch_hopper(shape)
        else:
            launch_triton(shape, variant.deterministic)


def first_jobs() -> Iterator[Job]:
    """The probes' kernels, then those of the table and of the steps."""
    for head_dim in (128, 64):
        for case in CASES:
            narrow = case.positions < NARROW_WIDTH
            shape = Shape(
                case.batch, case.positions, case.heads, head_dim, HALF, case.key_heads, masks=1, narrow=narrow
            )
            yield from _attention_jobs(shape)
        for keys, queries in CACHES:
            for slots in (0, 16):
                name = f"cache of {slots or keys}, {queries} queries, heads of {head_dim}"
                yield name, partial(launch_cache, 2, queries, 4, 2, keys, head_dim, slots, HALF, 0)
    for case in CASES:
        yield f"mask of {case.positions}", partial(launch_mask, 1, case.positions, with_length=True)
    # The table at 8,192, then the steps of 0.76B and 1.4B, whose queries see few keys on average.
    table = (Shape(2, 8192, 16, 128), Shape(2, 8192, 32, 64))
    steps = (Shape(8, 4096, 24, 64, narrow=True), Shape(8, 4096, 16, 128, narrow=True))
    for shape in (*table, *steps):
        yield from _attention_jobs(shape)
        yield f"mask of {shape}", partial(launch_mask, shape.rows, shape.queries, with_length=False)


def _attention_jobs(shape: Shape) -> Iterator[Job]:
    """Each pass of each implementation, the slowest to compile first."""
    if shape.head_dim in HOPPER_HEAD_DIMS and shape.dtype in HOPPER_DTYPES:
        yield f"hopper {shape}", partial(launch_hopper, shape)
    for deterministic in (False, True):
        kind = "split" if deterministic else "fused"
        yield f"triton {kind} {shape}", partial(launch_triton, shape, deterministic)


def tests_jobs() -> Iterator[Job]:
    """What test_gpu.py, test_hopper_gpu.py and test_public_bugs_gpu.py launch, in the order in which they are run."""
    families = [mask for name, mask in mask_families(700).items() if name != "size_one"]
    sizes = {(2, each.num_queries, each.num_keys, each.first_key.shape[0]): True for each in families}
    sizes |= {(2, size, size, 1): False for size in (2700, 5000, 2000)}

    def shapes(width: int, dtype: torch.dtype, group: int) -> Iterator[Shape]:
        for (rows, queries, keys, masks), narrow in sizes.items():
            yield Shape(rows, queries, 4, width, dtype, 4 // group, keys, masks, narrow)

    def portable(
        widths: Iterable[int], dtypes: Iterable[torch.dtype], groups: Iterable[int]
    ) -> Iterator[Job]:
        for width, dtype, group, deterministic in itertools.product(widths, dtypes, groups, (False, True)):
            for shape in shapes(width, dtype, group):
                name = f"triton {'split' if deterministic else 'fused'} {shape}, group {group}"
                yield name, partial(launch_triton, shape, deterministic)

    for dtype, width, group in itertools.product(HOPPER_DTYPES, HOPPER_HEAD_DIMS, (1, 2, 4)):
        for shape in shapes(width, dtype, group):
            yield f"hopper {shape}, group {group}", partial(launch_hopper, shape)
    yield from portable((128, 64, 256, 96), HOPPER_DTYPES, (2,))
    blocks = ((1, 700), (21, 700), (700, 700), (256, 3000))
    for width, dtype, slots in itertools.product((128, 64, 256, 96, 32), TRITON_DTYPES, (0, 16, 7)):
        for (queries, keys), parts in itertools.product(blocks, (0, 1, 5)):
            name = f"cache of {slots or keys} in {parts} parts, {queries} queries, heads of {width}, {dtype}"
            yield name, partial(launch_cache, 2, queries, 8, 2, keys, width, slots, dtype, parts)
    yield from portable((128, 64, 256, 96), (torch.float32,), (1, 2))
    yield from portable((32,), TRITON_DTYPES, (1, 2))


def sweep_jobs() -> Iterator[Job]:
    """What the training of the second call launches, then the variants of the sweep."""
    for narrow in (False, True):
        shape = Shape(64, 1024, 6, 128, narrow=narrow)
        yield from _attention_jobs(shape)
    for variant in VARIANTS:
        yield variant.name, partial(launch_variant, variant)


def rehearsal_jobs() -> Iterator[Job]:
    """A mask, a small forward and backward, and one that fails."""
    yield "mask of 300", partial(launch_mask, 1, 300, with_length=False)
    yield "triton", partial(launch_triton, Shape(1, 256, 1, 64, narrow=True), deterministic=True)
    yield "a head width that is not shipped", partial(launch_triton, Shape(1, 256, 1, 20), deterministic=True)


SETS: dict[str, Callable[[], Iterator[Job]]] = {
    "first": first_jobs,
    "tests": tests_jobs,
    "sweep": sweep_jobs,
    "rehearsal": rehearsal_jobs,
}


def compile_all(name: str, processes: int, out: Path, target: str = "sm_90") -> dict[str, Any]:
    """Compile a set for a target, and keep `out` up to date. Returns what is written there."""
    begin = time.monotonic()
    left = dict(SETS[name]())
    found: dict[str, Any] = {"set": name, "of": len(left), "done": 0, "failed": {}, "seconds": 0.0}
    for _ in range(MAX_CRASHES):
        if not left:
            break
        with ProcessPoolExecutor(processes, multiprocessing.get_context("fork")) as pool:
            futures = {pool.submit(compile_one, job, target): each for each, job in left.items()}
            for future in as_completed(futures):
                try:
                    problem = future.result()
                except BrokenProcessPool:
                    continue
                del left[futures[future]]
                found["done"] += 1
                if problem:
                    found["failed"][futures[future]] = problem
                found["seconds"] = round(time.monotonic() - begin, 1)
                write_json(found, out)
    found["failed"] |= dict.fromkeys(left, "its compiler crashed, or another beside it")
    write_json(found, out)
    return found


def compile_one(job: Callable[[], object], target: str) -> str:
    """Compile what a job launches. Returns what went wrong, if anything did."""
    try:
        compile_launches(target, job)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("set", choices=list(SETS))
    parser.add_argument("--processes", type=int, default=max(1, len(os.sched_getaffinity(0)) - 4))
    parser.add_argument("--target", default="sm_90", help="the architecture (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    # Imported before the fork, so that every process has it.
    import triton.compiler  # noqa: F401

    found = compile_all(given.set, given.processes, given.out, given.target)
    print(
        f"compiled {given.set}: {found['done']} of {found['of']} in {found['seconds']} s, failed: {found['failed']}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
