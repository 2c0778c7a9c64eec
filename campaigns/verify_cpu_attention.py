"""Holds the CPU attention against float64 over the full product of what it takes.

    .venv/bin/python campaigns/verify_cpu_attention.py [--out benchmarks/results/verify_cpu_attention.json]

Every mask of `mask_families`, 1, 2 and 8 query heads a key head, every head width of the Triton kernels, three memory
layouts, odd lengths, with uninitialised memory filled with NaN: the output and each gradient. fp32 within 5e-6, norm
of the difference over norm; bf16 at most 1.5 times the error of PyTorch's dense attention on the same inputs. Exits
with 3 when a case misses its bar. The tests take a sample of the same cases.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from transfusion.observe.environment import describe_environment
from transfusion_kernels import IntervalMask, interval_attention
from transfusion_kernels.verification.testing import (
    exact_attention,
    mask_families,
    poisoned_memory,
    relative_error,
)

RESULT = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "verify_cpu_attention.json"
LENGTHS = (67, 131)
GROUPS = (1, 2, 8)
WIDTHS = (32, 64, 96, 128, 256)
LAYOUTS = ("heads first", "positions first", "fused")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HEADS = 8
MAX_ERROR = 5e-6
MAX_RATIO = 1.5
# The gradients of q and k are 0 where every query has one key, a difference of numbers as large as q and k: an error
# there is held against those.
VANISHES = 1e-9
RESULT_NAMES = ("out", "dq", "dk", "dv")
KEPT = ("time", "python", "platform", "cpu", "cpu_count", "packages", "git", "transfusion")

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """layout: of q, k and v in memory: [B, H, S, D], [B, S, H, D], or slices of one projection [B, S, all heads * D],
    where there are as many queries as keys."""

    family: str
    length: int
    group: int
    width: int
    dtype: str
    layout: str

    @property
    def mask(self) -> IntervalMask:
        return families(self.length)[self.family]


def cases() -> Iterator[Case]:
    """The full product; cases that differ in their layout alone follow each other."""
    for length in LENGTHS:
        for case in itertools.product(families(length), GROUPS, WIDTHS, DTYPES):
            family, group, width, dtype = case
            for layout in LAYOUTS:
                yield Case(family, length, group, width, dtype, layout)


def errors(case: Case) -> tuple[dict[str, float], dict[str, float]]:
    """The errors of the output and each gradient, and for bf16 those of dense attention, else nothing."""
    *inputs, grad_out = laid_out(case)
    ours = attend(*inputs, case.mask, grad_out)
    exact, dense = expectations(case.family, case.length, case.group, case.width, case.dtype)
    floors = [0.0] + [float(x.detach().double().norm()) for x in inputs]
    return differences(ours, exact, floors), differences(dense, exact, floors) if dense else {}


def misses(found: dict[str, float], dense: dict[str, float]) -> list[str]:
    """Which tensors miss their bar. NaN misses every bar."""
    bars = {name: MAX_RATIO * dense[name] if dense else MAX_ERROR for name in RESULT_NAMES}
    return [name for name in RESULT_NAMES if not found[name] <= bars[name]]


def differences(
    actual: tuple[Tensor, ...], exact: tuple[Tensor, ...], floors: list[float]
) -> dict[str, float]:
    found = {}
    for name, ours, right, floor in zip(RESULT_NAMES, actual, exact, floors, strict=True):
        vanishes = float(right.norm()) <= VANISHES * floor
        found[name] = relative_error(ours, right, floor=floor if vanishes else 0.0)
    return found


@cache
def families(length: int) -> dict[str, IntervalMask]:
    return mask_families(length)


def numbers(family: str, length: int, group: int, width: int, dtype: str) -> Inputs:
    """q, k, v and the gradient of the output, contiguous; the last is 0 where a query sees nothing."""
    mask = families(length)[family]
    generator = torch.Generator().manual_seed(group * width)

    def normal(heads: int, positions: int) -> Tensor:
        return torch.randn(2, heads, positions, width, generator=generator).to(DTYPES[dtype])

    keys = HEADS // group, mask.num_keys
    q, k, v, grad_out = (
        normal(*shape) for shape in ((HEADS, mask.num_queries), keys, keys, (HEADS, mask.num_queries))
    )
    return q, k, v, grad_out * mask.dense().any(-1)[:, None, :, None]


def laid_out(case: Case) -> Inputs:
    """The same numbers in the memory layout of the case, leaves that want gradients."""
    q, k, v, grad_out = numbers(case.family, case.length, case.group, case.width, case.dtype)
    if case.layout == "positions first" or (case.layout == "fused" and q.shape[2] != k.shape[2]):
        q, k, v, grad_out = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, grad_out))
    elif case.layout == "fused":
        heads = [x.shape[1] for x in (q, k, v)]
        q, k, v = torch.cat([q, k, v], dim=1).transpose(1, 2).contiguous().transpose(1, 2).split(heads, dim=1)
    return (*(x.detach().requires_grad_() for x in (q, k, v)), grad_out)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, grad_out: Tensor) -> tuple[Tensor, ...]:
    with poisoned_memory():
        out = interval_attention(q, k, v, mask, backend="cpu")
        assert isinstance(out, Tensor)
        return out, *torch.autograd.grad(out, (q, k, v), grad_out)


@lru_cache(maxsize=1)
def expectations(
    family: str, length: int, group: int, width: int, dtype: str
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None]:
    """Output and gradients in float64, and for bf16 those of dense attention in bf16, which do not differ by layout."""
    mask = families(length)[family]
    q, k, v, grad_out = numbers(family, length, group, width, dtype)
    out, _, gradients = exact_attention(q, k, v, mask, grad_out)
    dense = dense_attention(q, k, v, mask, grad_out, group) if dtype == "bf16" else None
    return (out, *gradients), dense


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, grad_out: Tensor, group: int
) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    visible = mask.dense()[:, None]
    sees = visible.any(-1, keepdim=True)
    repeated = (x.repeat_interleave(group, dim=1) for x in leaves[1:])
    out = F.scaled_dot_product_attention(leaves[0], *repeated, attn_mask=visible | ~sees) * sees
    return out, *torch.autograd.grad(out, leaves, grad_out)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULT)
    out: Path = parser.parse_args().out
    torch.set_num_threads(1)
    begin = time.perf_counter()
    worst: dict[str, tuple[float, Case]] = {}
    missed, count = [], 0
    for case in cases():
        found, dense = errors(case)
        count += 1
        wrong = misses(found, dense)
        if wrong:
            missed.append(asdict(case) | {"missed": wrong, "errors": found, "errors_of_dense": dense})
        for name in RESULT_NAMES:
            value = found[name] / max(dense[name], 1e-12) if dense else found[name]
            key = f"{case.dtype} {name}" + (", over dense attention's" if dense else "")
            if key not in worst or not value <= worst[key][0]:
                worst[key] = (value, case)
    environment = describe_environment()
    record = {
        "command": "python campaigns/verify_cpu_attention.py",
        "environment": {name: environment[name] for name in KEPT},
        "seconds": round(time.perf_counter() - begin),
        "bars": {"fp32": MAX_ERROR, "bf16, over dense attention's": MAX_RATIO},
        "product": {
            "families": list(families(LENGTHS[0])),
            "lengths": LENGTHS,
            "groups": GROUPS,
            "widths": WIDTHS,
            "layouts": LAYOUTS,
            "dtypes": list(DTYPES),
        },
        "cases": count,
        "worst": {name: {"error": value} | asdict(case) for name, (value, case) in sorted(worst.items())},
        "missed": missed,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for name, (value, case) in sorted(worst.items()):
        print(f"{name}: at most {value:.3g} ({case})")
    print(f"{len(missed)} of {count} cases missed a bar" if missed else f"all {count} cases reach their bars")
    return 3 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
