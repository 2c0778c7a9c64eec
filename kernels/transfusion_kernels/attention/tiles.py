"""Tile sizes of the Triton kernels: a table, looked up; nothing is tuned while a program runs.

A row stands for what `machine_code` found to keep its values in registers, on every Triton it is shipped for.
`campaigns/compile_kernels.py` compiles all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
import triton

from transfusion_kernels.attention.layout import TILE_ROWS

PROCESSORS_OF_THE_INTERPRETER = 16
TRITON_VERSION = tuple(int(number) for number in triton.__version__.split(".")[:2])


@dataclass(frozen=True)
class Tile:
    """The rows that one program owns, the rows of the other side that it takes at a time, and how it is compiled.

    `rows` divides `layout.TILE_ROWS`; both are powers of two, 16 or more.
    """

    rows: int
    step: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        if TILE_ROWS % self.rows:
            raise ValueError(f"rows: got {self.rows}, takes a divisor of {TILE_ROWS}")


@dataclass(frozen=True)
class Tiles:
    """The tiles of the forward (queries x keys), the fused and the split backward for keys and values
    (keys x queries), and the split backward for queries (queries x keys).

    fused: None where no tile of it fits the registers, so that the split backward stands in for it.
    """

    forward: Tile
    fused: Tile | None
    keys: Tile
    queries: Tile


# Half of the second-level cache of an H100 and an H200, and about what other GPUs have. The rest holds what is written.
CACHE_BYTES = 25 << 20
LEAST_TOGETHER = 4

# What the interpreter runs, and CDNA for small heads in float32.
_SMALL = Tiles(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1))
# What runs 16-bit heads of 256 where nothing else is listed.
_BROAD = Tiles(Tile(64, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1))

# By head width, for float32, which IEEE arithmetic multiplies without tensor cores, from registers.
_EXACT_64 = Tiles(Tile(32, 32, 8, 1), Tile(16, 32, 8, 1), Tile(16, 32, 8, 1), Tile(16, 32, 8, 1))
_EXACT_128 = replace(_EXACT_64, fused=Tile(16, 16, 16, 1))
_EXACT_256 = replace(_EXACT_64, forward=Tile(16, 32, 8, 1), fused=Tile(16, 16, 8, 1))
_EXACT = {32: _EXACT_64, 64: _EXACT_64, 96: _EXACT_128, 128: _EXACT_128, 256: _EXACT_256}
# The same for CDNA, where a program has 64 KiB.
_EXACT_CDNA_128 = replace(_SMALL, fused=Tile(32, 16, 4, 1))
_EXACT_CDNA_256 = Tiles(Tile(32, 16, 4, 1), Tile(32, 16, 4, 1), Tile(32, 16, 4, 1), Tile(32, 16, 4, 1))
_EXACT_CDNA = {32: _SMALL, 64: _SMALL, 96: _EXACT_CDNA_128, 128: _EXACT_CDNA_128, 256: _EXACT_CDNA_256}

# By head width, for 16-bit inputs: what runs where nothing else is listed, and for narrow intervals.
_COMMON_64 = Tiles(Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(64, 32, 8, 2), Tile(64, 32, 4, 2))
_COMMON_96 = Tiles(Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 2))
_COMMON_128 = Tiles(Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2))
_COMMON = {32: _COMMON_64, 64: _COMMON_64, 96: _COMMON_96, 128: _COMMON_128, 256: _BROAD}

_SMALL_MEMORY_64 = replace(_COMMON_64, forward=Tile(64, 64, 4, 3), queries=Tile(64, 32, 8, 2))
_AMPERE_64 = Tiles(Tile(128, 64, 8, 3), Tile(64, 32, 4, 2), Tile(64, 32, 8, 2), Tile(64, 64, 4, 2))
_AMPERE_128 = Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2))
_HOPPER_64 = Tiles(Tile(128, 64, 4, 3), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2))
_HOPPER_64_NARROW = Tiles(Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2))
# From Triton 3.8 on the compiler would spill the wider step.
_STEP_128 = 64 if TRITON_VERSION < (3, 8) else 32
# A fused tile of 64 keys would have its two warpgroups compute all scores twice, and other fused tiles spill.
_HOPPER_128 = Tiles(Tile(128, 128, 8, 2), None, Tile(128, _STEP_128, 8, 2), Tile(128, 64, 8, 2))
_HOPPER_128_NARROW = Tiles(Tile(64, 64, 4, 3), None, Tile(64, _STEP_128, 4, 2), Tile(64, 64, 4, 2))
# Backward its warpgroups do repeat each other: with more rows the gradients of keys and values fit no registers.
# On Triton 3.9 this spills 3 registers with grouped queries, and 30 with twice the step.
_KEYS_256 = Tile(64, 32, 8, 2) if TRITON_VERSION < (3, 9) else Tile(64, 16, 8, 2)
_HOPPER_256 = Tiles(Tile(128, 64, 8, 2), None, _KEYS_256, Tile(64, 32, 8, 2))
_HOPPER_256_NARROW = replace(_HOPPER_256, forward=Tile(64, 64, 4, 2))
_BLACKWELL_64 = replace(_COMMON_64, fused=Tile(64, 64, 8, 1), keys=Tile(64, 64, 8, 1))
_BLACKWELL_128 = Tiles(Tile(128, 128, 8, 2), Tile(64, 64, 8, 1), Tile(128, 64, 8, 1), Tile(128, 64, 8, 2))
_BLACKWELL_128_NARROW = replace(_COMMON_128, fused=Tile(64, 64, 8, 1), keys=Tile(64, 64, 4, 1))
_BLACKWELL_256 = Tiles(Tile(64, 64, 8, 2), None, Tile(64, 64, 8, 1), Tile(64, 64, 8, 1))
_CDNA_64 = Tiles(Tile(64, 64, 4, 2), Tile(64, 32, 4, 1), Tile(64, 32, 4, 1), Tile(64, 32, 4, 1))
_CDNA_128 = Tiles(Tile(64, 64, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(64, 32, 4, 1))
_CDNA_256 = Tiles(Tile(64, 32, 8, 1), None, Tile(32, 16, 4, 1), Tile(32, 16, 4, 1))

# Architectures that take the tiles of another: those with 99 KiB for a program, Blackwell's and CDNA's.
_AS = {
    **dict.fromkeys(("sm_86", "sm_120", "sm_121"), "sm_89"),
    **dict.fromkeys(("sm_101", "sm_103", "sm_110"), "sm_100"),
    **dict.fromkeys(("gfx940", "gfx941", "gfx950"), "gfx942"),
}
# By architecture and head width: the tiles for wide intervals, then those for narrow ones.
_TABLE = {
    ("sm_80", 64): (_AMPERE_64, replace(_COMMON_64, forward=Tile(64, 64, 4, 3))),
    ("sm_80", 128): (_AMPERE_128, _COMMON_128),
    ("sm_89", 32): (_SMALL_MEMORY_64, _SMALL_MEMORY_64),
    ("sm_89", 64): (_SMALL_MEMORY_64, _SMALL_MEMORY_64),
    ("sm_90", 32): (_HOPPER_64, _HOPPER_64_NARROW),
    ("sm_90", 64): (_HOPPER_64, _HOPPER_64_NARROW),
    ("sm_90", 96): (_HOPPER_128, _HOPPER_128_NARROW),
    ("sm_90", 128): (_HOPPER_128, _HOPPER_128_NARROW),
    ("sm_90", 256): (_HOPPER_256, _HOPPER_256_NARROW),
    ("sm_100", 32): (_BLACKWELL_64, _BLACKWELL_64),
    ("sm_100", 64): (_BLACKWELL_64, _BLACKWELL_64),
    ("sm_100", 96): (_BLACKWELL_128, _BLACKWELL_128_NARROW),
    ("sm_100", 128): (_BLACKWELL_128, _BLACKWELL_128_NARROW),
    ("sm_100", 256): (_BLACKWELL_256, _BLACKWELL_256),
    ("gfx942", 32): (_CDNA_64, _CDNA_64),
    ("gfx942", 64): (_CDNA_64, _CDNA_64),
    ("gfx942", 96): (_CDNA_128, _CDNA_128),
    ("gfx942", 128): (_CDNA_128, _CDNA_128),
    ("gfx942", 256): (_CDNA_256, _CDNA_256),
}

# Where the compiler of Triton 3.6 cannot keep a fused backward to registers, so that the split one stands in.
_SPLIT_ON_TRITON_3_6 = {("sm_80", 64), ("sm_80", 128), ("sm_120", 128), ("sm_121", 128)}


def tiles_for(width: int, dtype: torch.dtype, narrow: bool) -> Tiles:
    """The tiles for heads of `width` on the current device. In the interpreter, the smallest.

    narrow: whether queries see few keys, so that large tiles would mostly be masked.
    """
    if interprets():
        return _SMALL
    architecture = _architecture()
    if dtype == torch.float32:
        return (_EXACT_CDNA if architecture.startswith("gfx") else _EXACT)[width]
    common = _COMMON[width]
    tiles = _TABLE.get((_AS.get(architecture, architecture), width), (common, common))[narrow]
    splits = (architecture, width) in _SPLIT_ON_TRITON_3_6 and TRITON_VERSION == (3, 6)
    return replace(tiles, fused=None) if splits else tiles


def heads_together(heads: int, bytes_of_head: int) -> int:
    """How many heads to take side by side: the largest divisor of `heads` whose heads fit the second-level cache.

    With fewer than `LEAST_TOGETHER` the long tiles of the last heads would start late, with nothing left beside them.

    bytes_of_head: what the programs of one head walk, over all batch rows.
    """
    most = max(CACHE_BYTES // max(bytes_of_head, 1), LEAST_TOGETHER)
    return max(count for count in range(1, min(heads, most) + 1) if heads % count == 0)


@cache
def processors(device: torch.device) -> int:
    """How many multiprocessors a GPU has."""
    if device.type == "cpu":
        return PROCESSORS_OF_THE_INTERPRETER
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def has_tma(dtype: torch.dtype) -> bool:
    """Whether kernels for `dtype` take rows by descriptors on the current device. The interpreter plays the engine.

    In float32 they do not: operands are multiplied from registers, and out of the order in which the copy engine
    leaves a tile each comes by an address of its own, which spills hundreds of registers. Nor do those for consumer
    Blackwell (sm_120), whose tensor cores take operands from registers: the same.
    """
    if interprets():
        return True
    multiplies_from_memory = targets_nvidia() and 90 <= int(_architecture().removeprefix("sm_")) < 120
    return multiplies_from_memory and dtype != torch.float32


def needs_descriptors(dtype: torch.dtype) -> bool:
    """Whether `has_tma` and the kernels are shipped in no other form for it.

    The interpreter runs both forms, so that both are tested; it cannot add by descriptors.
    """
    return has_tma(dtype) and not interprets()


def all_registers(warps: int) -> dict[str, int]:
    """The option of a launch that lets a thread have all the registers that `warps` leave it.

    Given no limit NVIDIA's assembler sets one itself, so that more programs fit on a processor, and spills a register
    or two for it, now in one form, now in another. A compiler for AMD does not know the option.
    """
    return {"maxnreg": min(65536 // (32 * warps), 255)} if targets_nvidia() else {}


def interprets() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return bool(triton.knobs.runtime.interpret)


def targets_nvidia() -> bool:
    """Whether kernels are compiled for an NVIDIA GPU."""
    return _architecture().startswith("sm_")


def multiplies_by_warpgroups() -> bool:
    """Whether four warps multiply 64 rows together, as on Hopper alone."""
    return _architecture() == "sm_90"


def _architecture() -> str:
    if interprets():
        return ""
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)
