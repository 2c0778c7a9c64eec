"""What Triton's compiler makes of the kernels that `auto` picks on a Hopper GPU. Needs no GPU.

campaigns/compile_kernels.py compiles every form for every target.
"""

from __future__ import annotations

import dataclasses

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import torch  # noqa: E402
import triton.language as tl  # noqa: E402

from transfusion_kernels.attention.decode import decode_forward  # noqa: E402
from transfusion_kernels.verification.machine_code import compile_launches, inspect, problems  # noqa: E402
from transfusion_kernels.verification.shipped import (  # noqa: E402
    PASSES,
    CacheForm,
    Form,
    compile_cache_form,
    compile_form,
    compile_helpers,
)


# The narrow forms that are added here are those with other tiles; grouped queries are the harder ones.
@pytest.mark.slow
@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize(
    ("head_dim", "narrow"),
    [(32, False), (64, False), (64, True), (96, False), (128, False), (128, True), (256, False)],
)
def test_hopper_kernels_keep_to_registers_and_tensor_cores(
    head_dim: int, narrow: bool, direction: str
) -> None:
    form = Form("sm_90", head_dim, direction, narrow, group=4)
    reports = compile_form(form)
    fused = direction == "backward" and head_dim < 96
    assert len(reports) == (1 if direction == "forward" or fused else 2)
    for report, wrong in reports:
        assert not wrong, report
        assert (report.instructions["UTMAREDG"] > 0) == fused, report


@pytest.mark.parametrize(
    ("head_dim", "direction"), [(64, "backward"), (128, "forward"), (128, "backward"), (256, "forward")]
)
def test_kernels_in_float32_keep_to_registers(head_dim: int, direction: str) -> None:
    ((report, wrong),) = compile_form(Form("sm_90", head_dim, direction, narrow=False, group=4, exact=True))
    assert not wrong, report


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "group", "queries"),
    [(64, 4, 1), (96, 4, 8), (128, 4, 1), (128, 1, 32), (64, 4, 256), (128, 4, 256)],
)
def test_the_kernel_for_a_cache_keeps_to_registers(
    head_dim: int, group: int, queries: int, paged: bool
) -> None:
    ((report, wrong),) = compile_cache_form(CacheForm("sm_90", head_dim, group, queries, paged))
    assert not wrong, report
    assert report.instructions["HGMMA" if group * queries >= 64 else "HMMA"] > 0


@pytest.mark.parametrize("paged", [False, True])
def test_a_growing_cache_compiles_nothing_anew(paged: bool) -> None:
    """One form of the kernel for all lengths of a cache, batches and numbers of parts, and one that merges for each
    power of two of these."""
    keys = 1000
    q, cache = torch.empty(2, 8, 1, 64, dtype=torch.bfloat16, device="meta"), (2, 2, keys, 64)
    if paged:
        cache = (64, 2, 16, 64)
    cache_k = q.new_empty(cache)
    bound = q.new_empty(2, 1, dtype=torch.int32)
    forms: dict[str, set[int]] = {}

    def launch(num_keys: int, parts: int) -> None:
        table = q.new_empty(2, -(-num_keys // 16) + 1, dtype=torch.int32) if paged else None
        decode_forward(q, cache_k, cache_k, bound, bound, table, num_keys, 0.125, num_splits=parts)

    for num_keys, parts in ((17, 2), (32, 2), (480, 2), (900, 2), (901, 15), (902, 16)):
        for name, kernel in compile_launches("sm_90", lambda: launch(num_keys, parts)).items():  # noqa: B023
            forms.setdefault(name, set()).add(id(kernel))
    assert {name: len(found) for name, found in forms.items()} == {"_decode_kernel": 1, "_merge_kernel": 2}


@pytest.mark.slow
def test_the_kernels_that_multiply_nothing_keep_to_registers() -> None:
    """Among them those that make masks."""
    reports = compile_helpers("sm_90")
    assert len(reports) == 3 + 2 * 5
    for report, wrong in reports:
        assert not wrong, report


@triton.jit
def _too_large(x, y, out, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    product = tl.dot(tl.load(x + o), tl.load(y + o))
    tl.store(out + o, tl.dot(product.to(tl.bfloat16), tl.load(y + o), product))


@pytest.mark.slow
def test_the_gate_finds_spills_of_amd() -> None:
    def launch() -> None:
        x = torch.empty(256, 256, dtype=torch.bfloat16, device="meta")
        _too_large[(1,)](x, x, x, BLOCK=256, num_warps=4)

    (kernel,) = compile_launches("gfx942", launch).values()
    report = inspect("too large", kernel, "gfx942")
    assert report.spill_stores and report.spill_loads
    assert problems(report) == [
        f"spills: {report.spill_stores} stores, {report.spill_loads} loads",
        "131072 bytes of shared memory, there are 65536",
    ]


@pytest.mark.slow
def test_the_gate_finds_spills_and_what_else_is_wrong() -> None:
    def launch() -> None:
        x = torch.empty(256, 256, dtype=torch.bfloat16, device="meta")
        _too_large[(1,)](x, x, x, BLOCK=256, num_warps=4)

    (kernel,) = compile_launches("sm_90", launch).values()
    report = inspect("too large", kernel, "sm_90")
    assert any("spills" in problem for problem in problems(report))
    assert any("descriptors" in problem for problem in problems(report, tma=True))
    clean = dataclasses.replace(
        report,
        spill_stores=0,
        spill_loads=0,
        shared_bytes=0,
        instructions={**report.instructions, "DEPBAR": 1},
    )
    assert not problems(clean)
    serialised = {**report.instructions, "DEPBAR": report.instructions["HGMMA"]}
    for change, word in (
        ({"spill_loads": 1}, "spills"),
        ({"shared_bytes": 1 << 20}, "shared memory"),
        ({"instructions": serialised}, "serialised"),
        ({"instructions": {**clean.instructions, "HMMA": 8}}, "HMMA"),
        ({"instructions": {**clean.instructions, "HGMMA": 0}}, "no HGMMA"),
        ({"hazards": ("MOV R1, R2",)}, "registers of products in flight: MOV R1, R2"),
        ({"unsynchronised": 1}, "may still read"),
        ({"idle": ("64x64 by 8x1 warps",)}, "idle warpgroups: 64x64"),
    ):
        found = problems(dataclasses.replace(clean, **change))  # type: ignore[arg-type]
        assert len(found) == 1 and word in found[0], (found, word)
    assert problems(dataclasses.replace(clean, exponentials=66, exposed=7), overlaps=True) == [
        "7 of 66 exponentials overlap none of its products"
    ]
    assert problems(clean, overlaps=True) == ["no exponentials in its loops"]
    assert not problems(dataclasses.replace(clean, exponentials=66), overlaps=True)
