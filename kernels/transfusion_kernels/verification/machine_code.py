"""What a compiler makes of a kernel, read from its machine code: registers, spills, instructions. Needs no GPU.

`compile_launches` runs code that launches kernels, on tensors of the meta device, and compiles what it launches as
the launcher would on a GPU of the given target: the same types, alignments and constants. `compile_function` compiles
a kernel from its signature, as is needed for Gluon. `inspect` reads the result, `problems` judges it.

Triton brings the tools for NVIDIA; for AMD the assembly tells.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

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
    """A compiled kernel. registers: of one thread, on AMD with those for accumulation; spills: instructions that store
    and load them in memory; shared_bytes: of one program; instructions: how many stand in the code, by kind.
    """

    name: str
    target: str
    registers: int
    spill_stores: int
    spill_loads: int
    shared_bytes: int
    instructions: dict[str, int]

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
    if target.startswith("gfx"):
        code, kinds = kernel.asm["amdgcn"], _AMD
        registers = re.findall(r"\.vgpr_count:\s+(\d+)", code)
        # Not `.vgpr_spill_count`, which counts what moves to accumulation registers and back, too.
        spilling = {"stores": r"\bscratch_store", "loads": r"\bscratch_load"}
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(kernel.asm["cubin"])
            cubin.flush()
            registers = re.findall(r"\bREG:(\d+)", _run("cuobjdump", "-res-usage", cubin.name))
            code, kinds = _run("nvdisasm", "-c", cubin.name), _NVIDIA
        spilling = {"stores": r"\bSTL\b", "loads": r"\bLDL\b"}
    spills = _count(spilling, code)
    return Report(
        name,
        target,
        int(registers[0]),
        spills["stores"],
        spills["loads"],
        kernel.metadata.shared,
        _count(kinds, code),
    )


def problems(report: Report, tma: bool = False, small: bool = False, exact: bool = False) -> list[str]:
    """What is wrong with a kernel that multiplies tiles, in words; nothing if it may be shipped.

    tma: whether it is to load by descriptors. small: whether its tiles may have fewer than 64 rows, for which the
    larger products of newer GPUs are not made. exact: whether it multiplies in IEEE float32, for which there are no
    tensor cores; otherwise in 16 bits.
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
