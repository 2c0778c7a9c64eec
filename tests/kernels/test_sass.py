"""The reader of NVIDIA's machine code: what it finds in code that was made up, and in a kernel whose waits are gone."""

from __future__ import annotations

import re

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from transfusion_kernels.attention import hopper  # noqa: E402
from transfusion_kernels.verification.machine_code import (  # noqa: E402
    compile_function,
    disassemble,
    idle_products,
)
from transfusion_kernels.verification.sass import Product, read_code  # noqa: E402

SCORES = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT, gsb0"
VALUES = "HGMMA.64x128x16.F32.BF16 R88, R152, gdesc[UR8].tnspB, R88, gsb0"
WAIT_ALL = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
WAIT_FOR_SCORES = "WARPGROUP.DEPBAR.LE gsb0, 0x1"
EXPONENTIAL = "MUFU.EX2 R10, R24"


def code(*lines: str) -> str:
    """Instructions and labels as nvdisasm prints them."""
    return "\n".join(
        line if line.startswith(".L") else f"        /*{16 * number:04x}*/    {line} ;"
        for number, line in enumerate(lines)
    )


def loop(*body: str) -> str:
    return code("MOV R1, R2", ".L_x_1:", *body, "@P0 BRA `(.L_x_1)", "EXIT")


def test_exponentials_beside_a_product_and_after_all() -> None:
    beside = read_code(loop(SCORES, VALUES, WAIT_FOR_SCORES, EXPONENTIAL, WAIT_ALL))
    after = read_code(loop(SCORES, VALUES, WAIT_FOR_SCORES, WAIT_ALL, EXPONENTIAL))
    assert [(one.exponentials, one.exposed) for one in beside.loops + after.loops] == [(1, 0), (1, 1)]
    assert beside.loops[0].products == (Product(64, False), Product(128, True))
    assert beside.loops[0].size == 6
    assert not beside.hazards + after.hazards


def test_one_way_without_a_product_is_enough_to_be_exposed() -> None:
    found = read_code(
        loop(
            "@P1 BRA `(.L_x_2)",
            VALUES,
            ".L_x_2:",
            EXPONENTIAL.replace("R24", "R20"),
            WAIT_ALL,
            SCORES,
            WAIT_ALL,
        )
    )
    assert [one.exposed for one in found.loops] == [1]


def test_the_innermost_loop_counts_and_blocks_out_of_line_belong_to_it() -> None:
    """A wait's retry stands after the kernel, and jumps back: no loop of its own around all that lies between."""
    text = code(
        "MOV R1, R2",
        ".L_x_0:",
        "MOV R2, R3",
        ".L_x_1:",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2",
        "@!P0 BRA `(.L_x_3)",
        ".L_x_2:",
        SCORES,
        WAIT_ALL,
        "@P1 BRA `(.L_x_1)",
        "@P2 BRA `(.L_x_0)",
        "EXIT",
        ".L_x_3:",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2",
        "@!P0 BRA `(.L_x_3)",
        "BRA `(.L_x_2)",
    )
    (found,) = read_code(text).loops
    assert found.size == 8
    assert found.instructions["SYNCS"] == 2


@pytest.mark.parametrize(
    ("instruction", "hazard"),
    [
        ("MOV R153, R2", True),  # an operand is replaced
        ("FADD R2, R153, R3", False),  # and may be read
        ("FADD R2, R100, R3", True),  # a sum is read
        ("MOV R151, R2", True),
        ("MOV R87, R2", False),
        ("MOV R152, R2", True),
        ("MOV R155, R2", True),
        ("MOV R156, R2", False),
        ("LDS.128 R85, [R2]", True),
        ("LDS.64 R86, [R2]", False),
        ("STS.128 [R2], R86", True),
        ("STS.64 [R87], R2", False),
        ("STSM.16.M88.4 [R87], R152", False),
        ("ISETP.GE.AND P1, PT, R100, R2, PT", True),
        ("HGMMA.64x128x16.F32.BF16 R88, R152, gdesc[UR8].tnspB, R88, gsb0", False),  # the sum goes on
        ("HGMMA.64x64x16.F32.BF16 R20, R100, gdesc[UR8].tnspB, R20, gsb0", True),  # an operand is still a sum
    ],
)
def test_registers_of_a_product_in_flight(instruction: str, hazard: bool) -> None:
    during = read_code(loop(VALUES, instruction, WAIT_ALL))
    assert bool(during.hazards) == hazard, during.hazards
    assert not read_code(loop(VALUES, WAIT_ALL, instruction, WAIT_ALL)).hazards


def test_a_copy_into_memory_that_another_warpgroup_may_read() -> None:
    assert read_code(loop(SCORES, WAIT_ALL, "UTMALDG.4D [UR8], [UR4]")).unsynchronised
    assert not read_code(loop(SCORES, WAIT_ALL, "BAR.SYNC 0x0", "UTMALDG.4D [UR8], [UR4]")).unsynchronised


@pytest.mark.slow
def test_a_kernel_that_does_not_wait_is_full_of_hazards() -> None:
    case = next(case for case in hopper.compile_cases() if "backward, head_dim 128" in case.name)
    from triton.experimental.gluon._runtime import GluonASTSource

    text = disassemble(
        compile_function(case.function, case.signature, case.constants, case.options, "sm_90", GluonASTSource)
    )
    assert not read_code(text).hazards
    without = re.sub(r"(WARPGROUP\.DEPBAR\.LE gsb0, )0x\d", r"\g<1>0xf", text)
    assert len(read_code(without).hazards) > 100


@pytest.mark.parametrize(
    ("shape", "warps", "idle"), [("64x64", "8, 1", True), ("128x64", "8, 1", False), ("64x64", "4, 1", False)]
)
def test_idle_products(shape: str, warps: str, idle: bool) -> None:
    text = (
        f"#mma = #ttg.nvidia_mma<{{versionMajor = 3, versionMinor = 0, warpsPerCTA = [{warps}], "
        "instrShape = [16, 64, 16]}>\n"
        f"  %1 = ttng.warp_group_dot %a, %b, %c {{isAsync}} : x * y -> tensor<{shape}xf32, #mma>\n"
    )
    assert bool(idle_products(text)) == idle
