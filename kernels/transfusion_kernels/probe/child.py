"""The probe itself, in a process of its own: run kernels on a few documents and compare with the reference.

It tells what it is about to do in lines on standard output, so that what hangs is known by name.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from transfusion_kernels.attention import interval_attention
from transfusion_kernels.attention.kvcache import interval_attention_with_kvcache
from transfusion_kernels.attention.layout import IntervalMask
from transfusion_kernels.attention.reference import reference_attention
from transfusion_kernels.probe.process import MARK

Result = TypeVar("Result")

# The most that a result may differ from the reference, norm over norm: far above rounding, far below wrong. A single
# row may differ by more, since one that is wrong among thousands hardly moves the norm of all.
THRESHOLDS = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
ROW_FACTOR = 5.0
REPETITIONS = 20


@dataclass(frozen=True)
class Case:
    """Rows of two packed documents, each with an image.

    Attributes:
        positions: Of a row.
        length: How many of them are real.
        batch: Rows, which share one mask.
        heads: Query heads.
        key_heads: Key heads.
        repetitions: How often it is run again, to compare bit for bit.
    """

    positions: int
    length: int
    batch: int = 1
    heads: int = 2
    key_heads: int = 1
    repetitions: int = 0


# Small tiles and a last one that is cut short, then large tiles, more than any GPU works on at a time.
CASES = (
    Case(300, length=293, batch=2, heads=4, key_heads=2),
    Case(2048, length=2048, heads=12, key_heads=6, repetitions=REPETITIONS),
)
# For Triton's interpreter, which is slow.
INTERPRETED_CASES = (Case(77, length=70, batch=2, heads=4, key_heads=2, repetitions=2),)
# Keys in a cache and new queries of a row: one word, a few, and an image.
CACHES = ((2048, 1), (2048, 5), (2048, 80))
INTERPRETED_CACHES = ((96, 1), (96, 20))


class Wrong(Exception):  # noqa: N818
    """A result that differs from the reference, or from run to run."""


def main(arguments: Sequence[str]) -> None:
    """Probe what the arguments name: implementation, head width, dtype, device. Tells the verdict, then ends."""
    implementation, head_dim, dtype, device = arguments
    outcome, detail = verdict(implementation, int(head_dim), getattr(torch, dtype), torch.device(device))
    tell(outcome=outcome, detail=detail)
    # A device that has faulted may fault again, or hang, where it is left in good order.
    os._exit(0)


def verdict(implementation: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> tuple[str, str]:
    """The outcome of a probe and its detail."""
    ready = False
    try:
        stage("starting")
        if device.index is not None and device.type == "cuda":
            torch.cuda.set_device(device)
        torch.ones(8, device=device).sum().item()
        ready = True
        interprets = device.type == "cpu"
        if implementation == "decode":
            for keys, queries in INTERPRETED_CACHES if interprets else CACHES:
                check_cache(keys, queries, head_dim, dtype, device)
        else:
            for case in INTERPRETED_CASES if interprets else CASES:
                check_case(implementation, head_dim, dtype, device, case)
    except Wrong as error:
        return "wrong", str(error)
    except Exception as error:
        first_line = next(iter(str(error).strip().splitlines()), "")
        own_fault = ready and not _is_of_the_machine(error)
        where = f", {_stage}" if own_fault else ""
        return "failed" if own_fault else "undecided", f"{type(error).__name__}: {first_line}{where}"
    return "right", ""


@dataclass(frozen=True)
class Inputs:
    """What the attention is given, and in float64 what it is to give."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    mask: IntervalMask
    exact: dict[str, Tensor]

    def forward(self, implementation: str, deterministic: bool) -> dict[str, Tensor]:
        """Output and log-sum-exp."""
        out, lse = interval_attention(
            self.q,
            self.k,
            self.v,
            self.mask,
            return_lse=True,
            backend=implementation,
            deterministic=deterministic,
        )
        return {"out": out, "lse": lse}

    def backward(self, out: Tensor) -> dict[str, Tensor]:
        """The gradients."""
        gradients = torch.autograd.grad(out, (self.q, self.k, self.v), self.grad_out)
        return dict(zip(("dq", "dk", "dv"), gradients, strict=True))


def check_case(
    implementation: str,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    case: Case,
    deterministic: Sequence[bool] = (False, True),
) -> None:
    """Compare output, log-sum-exp and gradients with the reference, and with those of further runs.

    Args:
        implementation: "hopper" or "triton".
        head_dim: Width of a head.
        dtype: Of the inputs.
        device: Where they are.
        case: What to run.
        deterministic: Which of the two kinds of gradients to compute.

    Raises:
        Wrong: If something differs.
    """
    mask = run(f"the mask of {case.positions} positions", device, lambda: make_mask(case, device))
    check_mask(mask, make_mask(case, torch.device("cpu")))
    inputs = make_inputs(case, head_dim, dtype, mask)
    for same_bits in deterministic:
        at = f"at {case.positions} positions, {'deterministic' if same_bits else 'fused'} backward"
        check_pass(implementation, inputs, same_bits, case.repetitions, at)


def check_pass(implementation: str, inputs: Inputs, same_bits: bool, repetitions: int, at: str) -> None:
    """Compare one kind of forward and backward with the reference, and with those of further runs.

    Raises:
        Wrong: If something differs.
    """
    device = inputs.q.device
    found = run(f"forward {at}", device, lambda: inputs.forward(implementation, same_bits))
    found |= run(f"backward {at}", device, lambda: inputs.backward(found["out"]))
    compare(found, inputs.exact, THRESHOLDS[inputs.q.dtype], at)
    # The fused backward adds to dq in an order that differs from run to run.
    names = [name for name in found if same_bits or name != "dq"]
    if repetitions:
        stage(f"waiting for {repetitions} repetitions {at}")
    for _ in range(repetitions):
        again = inputs.forward(implementation, same_bits)
        again |= inputs.backward(again["out"])
        unequal = [name for name in names if not torch.equal(again[name], found[name])]
        if unequal:
            raise Wrong(f"{', '.join(unequal)} from run to run {at}")


def check_cache(keys: int, queries: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """Compare attention to a static and to a paged cache with the reference.

    Args:
        keys: That a row of the cache has room for, a multiple of 16.
        queries: New positions of each row.
        head_dim: Width of a head.
        dtype: Of the inputs.
        device: Where they are.

    Raises:
        Wrong: If something differs.
    """
    slots, batch, heads, key_heads = 16, 2, 4, 2
    # Two rows that have come to different lengths.
    end_key = torch.arange(1, queries + 1, dtype=torch.int32).repeat(batch, 1)
    end_key += torch.tensor([[keys - queries], [keys // 5]], dtype=torch.int32)
    mask = IntervalMask(torch.zeros_like(end_key), end_key, num_keys=keys).to(device)
    shapes = [(batch, queries, heads, head_dim), *2 * [(batch, keys, key_heads, head_dim)]]
    q, k, v = (x.detach() for x in _normal(dtype, device, *shapes))
    out, lse = reference_attention(q.double(), k.double(), v.double(), mask, head_dim**-0.5)
    pages = torch.randperm(batch * keys // slots, generator=torch.Generator().manual_seed(0)).to(device)
    table = pages.view(batch, -1).to(torch.int32)

    def attend(k_cache: Tensor, v_cache: Tensor, block_table: Tensor | None) -> dict[str, Tensor]:
        out, lse = interval_attention_with_kvcache(
            q, k_cache, v_cache, mask, block_table=block_table, return_lse=True, backend="triton"
        )
        return {"out": out, "lse": lse}

    at = f"{queries} queries against a static cache"
    found = run(at, device, lambda: attend(k, v, None))
    compare(found, {"out": out, "lse": lse}, THRESHOLDS[dtype], f"with {at}")
    at = f"{queries} queries against a paged cache"
    paged = [_on_pages(x, pages, slots) for x in (k, v)]
    found = run(at, device, lambda: attend(paged[0], paged[1], table))
    compare(found, {"out": out, "lse": lse}, THRESHOLDS[dtype], f"with {at}")


def make_inputs(case: Case, head_dim: int, dtype: torch.dtype, mask: IntervalMask) -> Inputs:
    """Random inputs of a case, with the results of the reference in float64."""
    shape = (case.batch, case.positions, case.heads, head_dim)
    key_shape = (case.batch, case.positions, case.key_heads, head_dim)
    q, k, v, grad_out = _normal(dtype, mask.device, shape, key_shape, key_shape, shape)
    inputs = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out, lse = reference_attention(inputs[0], inputs[1], inputs[2], mask, head_dim**-0.5)
    gradients = torch.autograd.grad(out, inputs, grad_out.double())
    exact = {"out": out.detach(), "lse": lse} | dict(zip(("dq", "dk", "dv"), gradients, strict=True))
    return Inputs(q, k, v, grad_out.detach(), mask, exact)


def make_mask(case: Case, device: torch.device) -> IntervalMask:
    """The mask of a case, made on the device."""
    position = torch.arange(case.positions, device=device)[None]
    border = case.positions * 3 // 10
    first, second = (border // 4, border // 2), (border * 3 // 2, case.positions * 9 // 10)
    image_end = torch.zeros_like(position)
    for start, end in (first, second):
        image_end = torch.where((position >= start) & (position < end), end, image_end)
    document_start = torch.where(position < border, 0, border)
    length = torch.full((1,), case.length, device=device)
    mask = IntervalMask.from_spans(document_start, image_end, length=length)
    _ = mask.end_query, mask.query_order, mask.key_order
    return mask


def check_mask(mask: IntervalMask, expected: IntervalMask) -> None:
    """Compare a mask, and what is derived from it, with one that was made on the CPU.

    Raises:
        Wrong: If something differs.
    """
    names = ("first_key", "end_key", "first_query", "end_query", "query_order", "key_order")
    unequal = [name for name in names if not torch.equal(getattr(mask, name).cpu(), getattr(expected, name))]
    if unequal:
        raise Wrong(f"{', '.join(unequal)} of the mask at {mask.num_queries} positions")


def compare(found: Mapping[str, Tensor], exact: Mapping[str, Tensor], threshold: float, where: str) -> None:
    """Compare results with the reference.

    Raises:
        Wrong: With the names of those that differ, and by how much.
    """
    wrong = []
    for name, expected in exact.items():
        error = error_of(name, found[name], expected)
        if not error < threshold:  # NaN is not less
            wrong.append(f"{name} by {error:.2g}")
    if wrong:
        raise Wrong(f"{', '.join(wrong)} {where}")


def error_of(name: str, found: Tensor, exact: Tensor) -> float:
    """How far a result is from the reference. NaN anywhere gives NaN."""
    found = found.detach().double()
    if name == "lse":  # the error of its exponential, relative to that
        if not torch.equal(found.isinf(), exact.isinf()):
            return float("inf")
        return float((found - exact)[exact.isfinite()].abs().max())
    difference = (found - exact).norm(dim=-1)
    norm = exact.norm(dim=-1)
    typical = norm.square().mean().sqrt()
    overall = difference.norm() / norm.norm()
    worst_row = (difference / norm.clamp(min=typical)).max() / ROW_FACTOR
    return float(torch.maximum(overall, worst_row))


def run(name: str, device: torch.device, launch: Callable[[], Result]) -> Result:
    """Launch kernels and wait for them, telling both. What they fail to write is NaN."""
    # The interpreter runs what it launches.
    stage(f"{'waiting for' if device.type == 'cpu' else 'launching'} {name}")
    with poisoned_memory():
        result = launch()
    stage(f"waiting for {name}")
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill memory that is allocated but not initialised with NaN, in a process that is soon to end."""
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        settings.fill_uninitialized_memory = before[1]


def tell(**told: str) -> None:
    """Tell the other process something, in a line of its own."""
    print(f"\n{MARK}{json.dumps(told)}", flush=True, file=sys.stdout)


_stage = ""


def stage(name: str) -> None:
    """Tell what comes now."""
    global _stage
    _stage = name
    tell(stage=name)


def _normal(dtype: torch.dtype, device: torch.device, *shapes: Sequence[int]) -> list[Tensor]:
    """Random numbers [B, S, H, D] for each shape, laid out so and returned as [B, H, S, D]."""
    generator = torch.Generator(device).manual_seed(0)
    numbers = (torch.randn(*shape, generator=generator, device=device, dtype=dtype) for shape in shapes)
    return [x.transpose(1, 2).requires_grad_() for x in numbers]


def _on_pages(x: Tensor, pages: Tensor, slots: int) -> Tensor:
    """Keys or values [B, K, N, D] as pages [B * N / slots, K, slots, D], page n of a row at `pages[n]`."""
    paged = x.unflatten(2, (-1, slots)).transpose(1, 2).flatten(0, 1)
    return torch.empty_like(paged).index_copy_(0, pages.to(x.device), paged)


def _is_of_the_machine(error: Exception) -> bool:
    """Whether an error tells of missing memory, disk or compiler, rather than of the kernels."""
    kinds = (OSError, MemoryError, subprocess.SubprocessError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "C compiler" in str(error)
