"""Every form in which the Triton kernels are shipped, for `machine_code` to compile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from transfusion_kernels.attention.backward import attention_backward
from transfusion_kernels.attention.decode import decode_forward
from transfusion_kernels.attention.derived import bounds_from_spans, columns, longest_first
from transfusion_kernels.attention.forward import attention_forward
from transfusion_kernels.attention.hopper import CompileCase
from transfusion_kernels.attention.layout import TILE_ROWS
from transfusion_kernels.dispatch import TRITON_HEAD_DIMS
from transfusion_kernels.verification.machine_code import (
    TARGETS,
    Report,
    compile_function,
    compile_launches,
    inspect,
    problems,
)

PASSES = ("forward", "backward", "deterministic backward")
_HEADS, _LENGTH = 8, 4096


@dataclass(frozen=True)
class Form:
    """The kernels of a pass in bfloat16, or in float32 where `exact`. group: query heads a key head."""

    target: str
    head_dim: int
    direction: str
    narrow: bool
    group: int
    exact: bool = False

    @property
    def tma(self) -> bool:
        return self.target in ("sm_90", "sm_100") and not self.exact

    def __str__(self) -> str:
        interval = "float32" if self.exact else "narrow" if self.narrow else "wide"
        return f"{self.target} {self.head_dim} {self.direction}, {interval}, group {self.group}"


def shipped_forms(target: str) -> Iterator[Form]:
    """All that is compiled differently for one target."""
    for head_dim in TRITON_HEAD_DIMS:
        for direction in PASSES:
            for narrow in (False, True):
                for group in (1, 4):
                    yield Form(target, head_dim, direction, narrow, group)
            for group in (1, 4):  # in float32 all intervals have the same tiles
                yield Form(target, head_dim, direction, False, group, exact=True)


def compile_form(form: Form) -> list[tuple[Report, list[str]]]:
    """The reports on the kernels of a form that multiply matrices, each with what is wrong with it."""
    launched = compile_launches(form.target, lambda: _launch(form))
    reports = [
        inspect(f"{form}: {name.strip('_')}", kernel, form.target)
        for name, kernel in launched.items()
        if name != "_statistics_kernel"
    ]
    idle = form.head_dim == 256 and form.direction != "forward"
    return [(report, problems(report, form.tma, exact=form.exact, idle=idle)) for report in reports]


@dataclass(frozen=True)
class CacheForm:
    """The kernel for a cache in bfloat16. group: query heads a key head; queries: new positions of a row."""

    target: str
    head_dim: int
    group: int
    queries: int
    paged: bool

    def __str__(self) -> str:
        kind = "paged" if self.paged else "static"
        return f"{self.target} {self.head_dim} against a {kind} cache, {self.queries} queries, group {self.group}"


def shipped_cache_forms(target: str) -> Iterator[CacheForm]:
    """A word, a few words, and an image, which make tiles of 16, 32 and 64 rows, each by every head width."""
    for head_dim in TRITON_HEAD_DIMS:
        for group, queries in ((1, 1), (1, 32), (1, 256), (4, 1), (4, 8), (4, 256)):
            for paged in (False, True):
                yield CacheForm(target, head_dim, group, queries, paged)


def compile_cache_form(form: CacheForm) -> list[tuple[Report, list[str]]]:
    """The report on a form's kernel that multiplies matrices, with what is wrong with it."""
    launched = compile_launches(form.target, lambda: _launch_with_cache(form))
    report = inspect(str(form), launched["_decode_kernel"], form.target)
    small = form.queries * form.group < 64
    return [(report, problems(report, small=small, idle=form.head_dim == 256))]


def _launch_with_cache(form: CacheForm) -> None:
    slots = 16 if form.paged else _LENGTH
    q = torch.empty(2, _HEADS, form.queries, form.head_dim, dtype=torch.bfloat16, device="meta")
    cache = q.new_empty(_LENGTH // 16 if form.paged else 2, _HEADS // form.group, slots, form.head_dim)
    bound = q.new_empty(2, form.queries, dtype=torch.int32)
    table = q.new_empty(2, _LENGTH // 16, dtype=torch.int32) if form.paged else None
    decode_forward(q, cache, cache, bound, bound, table, _LENGTH, form.head_dim**-0.5, num_splits=4)


def compile_helpers(target: str) -> list[tuple[Report, list[str]]]:
    """The reports on the kernels that multiply no matrices: of masks, of statistics, and that merge parts."""
    launched = {f"{target} {name.strip('_')}": kernel for name, kernel in _launched_for_masks(target).items()}
    for head_dim in TRITON_HEAD_DIMS:
        form, cache_form = (
            Form(target, head_dim, "backward", False, 4),
            CacheForm(target, head_dim, 4, 1, False),
        )
        for launch, name in (
            (lambda: _launch(form), "_statistics_kernel"),  # noqa: B023  (called in this turn)
            (lambda: _launch_with_cache(cache_form), "_merge_kernel"),  # noqa: B023
        ):
            launched[f"{target} {head_dim} {name.strip('_')}"] = compile_launches(target, launch)[name]
    reports = [inspect(name, kernel, target) for name, kernel in launched.items()]
    return [(report, problems(report, exact=True)) for report in reports]


def _launched_for_masks(target: str) -> dict[str, Any]:
    spans, length = (
        torch.empty(2, 2, _LENGTH, dtype=torch.int64, device="meta"),
        torch.empty(2, device="meta"),
    )

    def launch() -> None:
        bounds = bounds_from_spans(spans[0], spans[1], length.long())
        longest_first(*columns(*bounds, _LENGTH), TILE_ROWS)

    return compile_launches(target, launch)


def compile_case(case: CompileCase) -> tuple[Report, list[str]]:
    """The report on one of the Hopper kernels, and what is wrong with it."""
    from triton.experimental.gluon._runtime import GluonASTSource

    kernel = compile_function(
        case.function, case.signature, case.constants, case.options, "sm_90", GluonASTSource
    )
    report = inspect(case.name, kernel, "sm_90")
    return report, problems(report, tma=True, overlaps=True)


def _launch(form: Form) -> None:
    def heads(count: int) -> Tensor:
        dtype = torch.float32 if form.exact else torch.bfloat16
        rows = torch.empty(2, _LENGTH, count, form.head_dim, dtype=dtype, device="meta")
        return rows.transpose(1, 2)

    q, k, v = heads(_HEADS), heads(_HEADS // form.group), heads(_HEADS // form.group)
    bound = torch.empty(2, _LENGTH, dtype=torch.int32, device="meta")
    order = torch.empty(2 * _LENGTH // TILE_ROWS, dtype=torch.int32, device="meta")
    scale = form.head_dim**-0.5
    if form.direction == "forward":
        attention_forward(q, k, v, bound, bound, order, scale, form.narrow)
        return
    lse = torch.empty(2, _HEADS, _LENGTH, device="meta")
    bounds, orders = (bound, bound, bound, bound), (order, order)
    deterministic = form.direction == "deterministic backward"
    attention_backward(q, q, k, v, q, lse, bounds, orders, scale, deterministic, form.narrow)


def triton_version() -> str:
    return str(triton.__version__)


__all__ = [
    "PASSES",
    "TARGETS",
    "CacheForm",
    "Form",
    "compile_cache_form",
    "compile_case",
    "compile_form",
    "compile_helpers",
    "shipped_cache_forms",
    "shipped_forms",
    "triton_version",
]
