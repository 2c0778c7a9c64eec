"""What a compiler makes of a kernel, read from its machine code: registers, spills, instructions. Needs no GPU.

`compile_launches` runs code that launches kernels, on tensors of the meta device, and compiles what it launches as
the launcher would on a GPU of the given target: the same types, alignments and constants. `compile_function` compiles
a kernel from its signature, as is needed for Gluon. `inspect` reads the result, `problems` judges it.

Triton brings the tools for NVIDIA; for AMD the assembly tells.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from transfusion_kernels.verification.sass import read_code

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
# Bytes that one program can have.
_SHARED_LIMIT = {
    "sm_80": 163 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
    "gfx942": 64 << 10,
    "gfx950": 160 << 10,
}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_NVIDIA = {
    "HGMMA": r"\bHGMMA\b",
    "HMMA": r"\bHMMA\b",
    "UTCMMA": r"\bUTC\w*MMA\b",
    "DEPBAR": r"\bWARPGROUP\.DEPBAR\b",
    "UTMALDG": r"\bUTMALDG\b",
    "UTMASTG": r"\bUTMASTG\b",
    "UTMAREDG": r"\bUTMAREDG\b",
}
_AMD = {"MFMA": r"\bv_mfma"}
_TENSOR_CORES = {
    **dict.fromkeys(("sm_80", "sm_89", "sm_120"), "HMMA"),
    "sm_90": "HGMMA",
    "sm_100": "UTCMMA",
    **dict.fromkeys(("gfx942", "gfx950"), "MFMA"),
}


@dataclass(frozen=True)
class Report:
    """A compiled kernel.

    Attributes:
        name: What it is called in tables.
        target: Of `TARGETS`.
        registers: Of one thread, on AMD with those for accumulation.
        spill_stores: Instructions that store registers to memory.
        spill_loads: Instructions that load them again.
        shared_bytes: Of one program.
        instructions: How many stand in the code, by kind.
        exponentials: In loops that multiply matrices on Hopper.
        exposed: Those of them that run while no product of their warpgroup may be in flight.
        hazards: Instructions that touch registers which a product in flight may use (`sass.Code`).
        unsynchronised: Copies into shared memory that another warpgroup may still read.
        idle: Hopper's products of which warpgroups compute the same part, as text.
    """

    name: str
    target: str
    registers: int
    spill_stores: int
    spill_loads: int
    shared_bytes: int
    instructions: dict[str, int]
    exponentials: int = 0
    exposed: int = 0
    hazards: tuple[str, ...] = ()
    unsynchronised: int = 0
    idle: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compile_launches(target: str, launch: Callable[[], object]) -> dict[str, Any]:
    """What `launch` launches, compiled for `target` (of `TARGETS`) and not run: compiled kernels by function name."""
    compiled = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled[self.__name__] = run(self, *args, grid=grid, warmup=True, **options)

    stand_in = _Driver(TARGETS[target])
    with (
        mock.patch.object(triton.runtime.driver, "_active", stand_in),
        mock.patch.object(JITFunction, "run", compile_only),
    ):
        launch()
    return compiled


def compile_function(
    function: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, object],
    options: Mapping[str, object],
    target: str,
    source: Callable[..., Any] = ASTSource,
) -> Any:
    """A kernel compiled for `target` from the types of its arguments; pointers are taken to be 16-byte aligned.

    signature: a type a name, as "*bf16", "i32", "tensordesc<...>"; names in `constexprs` may be left out.
    source: ASTSource, or for Gluon GluonASTSource.
    """
    types = {name: "constexpr" if name in constexprs else signature[name] for name in function.arg_names}
    aligned: dict[tuple[int, ...], list[list[object]]] = {
        (index,): [["tt.divisibility", 16]]
        for index, kind in enumerate(types.values())
        if kind.startswith("*")
    }
    program = source(function, types, constexprs=dict(constexprs), attrs=aligned)
    return triton.compile(program, target=TARGETS[target], options=dict(options))


def inspect(name: str, kernel: Any, target: str) -> Report:
    """Read a compiled kernel."""
    of_products: dict[str, Any] = {}
    if target.startswith("gfx"):
        code, kinds = kernel.asm["amdgcn"], _AMD
        registers = re.findall(r"\.vgpr_count:\s+(\d+)", code)
        # Not `.vgpr_spill_count`, which counts what moves to accumulation registers and back, too.
        spilling = {"stores": r"\bscratch_store", "loads": r"\bscratch_load"}
    else:
        with _cubin(kernel) as path:
            registers = re.findall(r"\bREG:(\d+)", _run("cuobjdump", "-res-usage", path))
        code, kinds = disassemble(kernel), _NVIDIA
        spilling = {"stores": r"\bSTL\b", "loads": r"\bLDL\b"}
        if target == "sm_90":
            of_products = _overlap(code) | {"idle": idle_products(kernel.asm["ttgir"])}
    spills = _count(spilling, code)
    return Report(
        name,
        target,
        int(registers[0]),
        spills["stores"],
        spills["loads"],
        kernel.metadata.shared,
        _count(kinds, code),
        **of_products,
    )


def disassemble(kernel: Any) -> str:
    """The machine code of a kernel compiled for NVIDIA, as text."""
    with _cubin(kernel) as path:
        return _run("nvdisasm", "-c", path)


@contextlib.contextmanager
def _cubin(kernel: Any) -> Iterator[str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        yield file.name


def _overlap(code: str) -> dict[str, Any]:
    read = read_code(code)
    return {
        "exponentials": sum(loop.exponentials for loop in read.loops),
        "exposed": sum(loop.exposed for loop in read.loops),
        "hazards": read.hazards,
        "unsynchronised": len(read.unsynchronised),
    }


def idle_products(ttgir: str) -> tuple[str, ...]:
    """The products whose tile has fewer rows or columns than its warpgroups stand along, as "64x64 by 8x1 warps".

    A product of a warpgroup has 64 rows, 16 to a warp. Warps beyond the rows of the tile compute again what others do.
    """
    layouts = {
        name: (int(rows), int(columns), int(width))
        for name, rows, columns, width in re.findall(
            r"^(#\w+) = #ttg\.nvidia_mma<\{versionMajor = 3.*?warpsPerCTA = \[(\d+), (\d+)\].*?"
            r"instrShape = \[16, (\d+), \d+\]",
            ttgir,
            re.MULTILINE,
        )
    }
    found = []
    for line in ttgir.splitlines():
        shape = re.search(r"warp_group_dot.*-> tensor<(\d+)x(\d+)xf32, (#\w+)>", line)
        if not shape or shape.group(3) not in layouts:
            continue
        rows, columns = int(shape.group(1)), int(shape.group(2))
        warp_rows, warp_columns, width = layouts[shape.group(3)]
        if rows < 16 * warp_rows or columns < width * warp_columns:
            found.append(f"{rows}x{columns} by {warp_rows}x{warp_columns} warps")
    return tuple(found)


def problems(
    report: Report,
    tma: bool = False,
    small: bool = False,
    exact: bool = False,
    overlaps: bool = False,
    idle: bool = False,
) -> list[str]:
    """What is wrong with a kernel that multiplies tiles, in words; nothing if it may be shipped.

    tma: whether it is to load by descriptors. small: whether its tiles may have fewer than 64 rows, for which the
    larger products of newer GPUs are not made. exact: whether it multiplies in IEEE float32, for which there are no
    tensor cores; otherwise in 16 bits. overlaps: whether its softmax is to run beside its own products. idle: whether
    warpgroups may repeat each other, as where no larger tile fits the registers.
    """
    found = []
    count = report.instructions
    if report.spill_stores or report.spill_loads:
        found.append(f"spills: {report.spill_stores} stores, {report.spill_loads} loads")
    products = _TENSOR_CORES[report.target]
    if not exact and not count[products] and not (small and count.get("HMMA")):
        found.append(f"no {products}")
    if report.target == "sm_90" and count["HMMA"] and not small:
        found.append(f"{count['HMMA']} products by HMMA, at a fraction of the speed of HGMMA")
    if count.get("HGMMA") and count["DEPBAR"] >= count["HGMMA"]:
        found.append("serialised: it waits for each HGMMA")
    if overlaps and not report.exponentials:
        found.append("no exponentials in its loops")
    if overlaps and report.exposed:
        found.append(f"{report.exposed} of {report.exponentials} exponentials overlap none of its products")
    if report.hazards:
        found.append(f"{len(report.hazards)} uses of registers of products in flight: {report.hazards[0]}")
    if report.unsynchronised:
        found.append(f"{report.unsynchronised} copies into memory that other warpgroups may still read")
    if report.idle and not idle:
        found.append(f"idle warpgroups: {', '.join(dict.fromkeys(report.idle))}")
    if tma and not count["UTMALDG"]:
        found.append("no loads by descriptors")
    if report.shared_bytes > _SHARED_LIMIT[report.target]:
        found.append(
            f"{report.shared_bytes} bytes of shared memory, there are {_SHARED_LIMIT[report.target]}"
        )
    return found


class _Driver:
    """What the launcher asks of a GPU's driver before it compiles. Kernels are kept by device: each target is one."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> GPUTarget:
        return self._target

    def get_current_stream(self, device: GPUTarget) -> int:
        return 0


def _count(patterns: Mapping[str, str], code: str) -> dict[str, int]:
    return {name: len(re.findall(pattern, code)) for name, pattern in patterns.items()}


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout
