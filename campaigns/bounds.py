"""How fast the attention kernels for Hopper should be: bounds from their machine code, and a model. Not a measurement.

    .venv/bin/python campaigns/bounds.py [--against CHECKOUT] [--out FILE]

Needs no GPU; takes a minute. Compiles the kernels for sm_90 as they are launched, follows their steps through the
machine code, and counts the cycles that each unit of a processor (SM) is busy in a step: tensor cores, exponentials,
arithmetic at half rate, instruction slots, shared memory. Two warpgroups share the units. One of them alone, from step
to step, counts as a unit too: its own chain of products, waits and arithmetic. The greatest is the bound.

Units that are nearly as busy get in each other's way. So a step is expected to take the sum of the units' cycles, each
to a power, to one over that power. The power is fitted to one published measurement of FlashAttention-3, and held
against others. Every tile of a mask is then given its steps, and the tiles go to the processors in the order of the
launch. A second estimate, beside it in the record, lets the two warpgroups run against each other in a simulation of
one scheduler, and takes one factor from the same measurement.

Prints tables and writes benchmarks/results/bounds.json, one entry by version of Triton. Those of other versions stay.
--against compiles the Hopper kernels of another checkout too. Exits with 1 if the loop of a kernel cannot be read.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import triton

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

from attention_table.cases import FAMILIES  # noqa: E402
from transfusion_kernels import IntervalMask  # noqa: E402
from transfusion_kernels.attention.layout import TILE_ROWS  # noqa: E402
from transfusion_kernels.attention.tiles import heads_together  # noqa: E402
from transfusion_kernels.verification.sass import Instruction, Way, read_ways  # noqa: E402

# What the model takes for granted, each with where it comes from.
GEMM_TFLOPS = 790.0
PROCESSORS = 132
MACS = 2048
EXPONENTIALS = 16
SLOTS = 4
SHARED_BYTES = 128
PROGRAM_CYCLES = 3500
ITEM_CYCLES = 1500
HBM_BYTES = 4.8e12
HBM_SHARE = 0.85
HELPER_BYTES = 14
POWER = 4.45
SIMULATED_SHARE = 0.845
CYCLE_SECONDS = PROCESSORS * 2 * MACS / (GEMM_TFLOPS * 1e12)
LATENCY = {"LDS": 30, "LDSM": 33, "SHFL": 24, "MUFU": 22, "LDG": 270, "LDC": 30, "ULDC": 30}
OTHER_LATENCY = 20
# Comparisons, selections, logic, shifts, additions of integers and conversions: 64 a cycle and SM in place of 128.
HALF_RATE = {
    "F2FP", "FMNMX", "FSEL", "FSETP", "I2FP", "IADD3", "ISETP", "LEA", "LOP3", "MOV", "PLOP3", "PRMT", "SEL", "SHF",
    "VIADD", "VIADDMNMX", "VIMNMX",
}  # fmt: skip
INPUTS = {
    "gemm_tflops": (GEMM_TFLOPS, "best dense bf16 product measured on H100 and H200, 769 to 798 in the references"),
    "processors": (PROCESSORS, "SMs of an H100 or H200 SXM"),
    "multiply_adds": (MACS, "bf16 by the tensor cores, a cycle and SM: 989.4e12 / (2 x 132 x 1.83e9)"),
    "cycle_seconds": (
        CYCLE_SECONDS,
        "as if the best product kept the tensor cores busy (1.461 GHz), so that its throttling is in it",
    ),
    "exponentials": (EXPONENTIALS, "MUFU results a cycle and SM, CUDA programming guide"),
    "slots": (SLOTS, "instructions that warps issue a cycle and SM, CUDA programming guide"),
    "half_rate": (sorted(HALF_RATE), "instructions of which an SM finishes 64 a cycle, CUDA programming guide"),
    "shared_bytes": (SHARED_BYTES, "that shared memory moves a cycle and SM, CUDA programming guide"),
    "latency": (LATENCY | {"other": OTHER_LATENCY}, "cycles, assumed near published microbenchmarks of Hopper"),
    "stalls": ("control words", "cycles between a warp's instructions, as the assembler wrote them into the code"),
    "program_cycles": (PROGRAM_CYCLES, "before and after the steps of a program: an estimate of 3,000 to 4,000"),
    "item_cycles": (
        ITEM_CYCLES,
        "the same of a tile whose queries and keys came while the program worked on the last one: an estimate",
    ),
    "hbm_bytes": (HBM_BYTES, "a second, data sheet of the H200"),
    "hbm_share": (HBM_SHARE, "of it that kernels reach which copy, assumed"),
    "helper_bytes": (
        HELPER_BYTES,
        "of HBM an element of q, by what runs beside a backward that adds up dq: statistics 4, zeros 4, conversion 6",
    ),
    "power": (POWER, "fitted: gives the first published speed for our forward of the same build, by Triton 3.7.1"),
    "simulated_share": (SIMULATED_SHARE, "fitted in the same way: the factor of the second estimate"),
}  # fmt: skip


@dataclass(frozen=True)
class Published:
    """A speed that somebody measured of a kernel built like one of ours: TFLOP/s, lowest and highest."""

    kernel: str
    head_dim: int
    direction: str
    mask: str
    length: int
    head_rows: int
    tflops: tuple[float, float]
    source: str


_TWICE = "FlashAttention-3, as MagiAttention and as TLX measured it"
# The first one sets the power and the factor. The others only say how good the model is.
PUBLISHED = (
    Published("hopper", 128, "forward", "full", 8448, 64, (661, 661), "FlashAttention-3, its ablation, by a summary"),
    Published(
        "before", 128, "forward", "full", 8448, 64, (582, 582), "the same without softmax beside its own products"
    ),
    Published("hopper", 128, "forward", "causal", 8192, 64, (657, 685), _TWICE),
    Published("hopper", 64, "forward", "causal", 8192, 64, (460, 460), "FlashAttention-3, its figure"),
    Published("hopper", 128, "backward", "causal", 8192, 64, (517, 539), _TWICE),
    Published("portable", 128, "forward", "full", 8192, 128, (464, 464), "Triton's tutorial, TLX #205"),
    Published("portable", 128, "forward", "causal", 8192, 32, (369, 369), "Triton, the figure of FlashAttention-3"),
    Published("portable", 64, "forward", "causal", 8192, 64, (376, 376), "Triton, the figure of FlashAttention-3"),
)  # fmt: skip
BARS = {("hopper", 128, "forward"): 620, ("hopper", 128, "backward"): 500}
LENGTH, TOKENS, WIDTH = 8192, 16384, 2048
MASKS = ("causal", "transfusion")


@dataclass(frozen=True)
class Signal:
    """One consumer waits, at a place of its step, until the other has been at a place of its own.

    late: for each of the two, how many steps behind the other one may be.
    """

    arrives: int
    waits: int
    late: tuple[int, int]


@dataclass(frozen=True)
class Step:
    """A step of the two warpgroups that share a processor.

    Attributes:
        ways: What each of them executes.
        signals: What they wait for each other for.
        moved: Bytes that TMA brings into shared memory for it, and reads from there.
        units: Cycles of each unit.
        simulated: Cycles from step to step where nothing else disturbs the two.
    """

    ways: tuple[Way, Way]
    signals: tuple[Signal, ...]
    moved: int
    units: dict[str, float]
    simulated: float

    @staticmethod
    def of(ways: tuple[Way, Way], signals: tuple[Signal, ...], moved: int) -> Step:
        return Step(ways, signals, moved, units(ways, signals, moved), simulate(ways, signals, moved))

    @property
    def expected(self) -> float:
        return combined(self.units.values(), POWER)


@dataclass(frozen=True)
class Launch:
    """A kernel that walks tiles, as compiled.

    Attributes:
        name: Of the function.
        rows: Of the other side that a step takes.
        over: What its tiles are of, "queries" or "keys".
        steps: Without a mask, with one on both sides, with one at the end.
        programs: That share a processor.
        walked: Bytes that the programs of a head walk for each position, if the launch takes as many heads at a time as
            fit the cache. 0 if it takes all.
        outside: Cycles of a tile before and after its steps.
    """

    name: str
    rows: int
    over: str
    steps: tuple[Step, Step, Step]
    programs: int
    walked: int = 0
    outside: int = PROGRAM_CYCLES

    def in_order(self, costs: Sequence[float], heads: int, positions: int) -> list[float]:
        """What the programs cost, in the order in which they start, from the costs of the tiles of each head."""
        together = heads_together(heads, positions * self.walked) if self.walked else heads
        return [cost for _ in range(heads // together) for cost in costs for _ in range(together)]


@dataclass(frozen=True)
class Kernel:
    """A pass, by one launch or two."""

    family: str
    head_dim: int
    direction: str
    launches: tuple[Launch, ...]
    adds: bool

    @property
    def name(self) -> str:
        return f"{self.family} {self.direction}, head_dim {self.head_dim}"


def product_cycles(columns: int) -> float:
    """Of the tensor cores for 64 x columns x 16: 32 cycles for 64 columns."""
    return 64 * columns * 16 / MACS


def product_bytes(columns: int, registers_a: bool) -> int:
    """That a product reads from shared memory: 16 of depth, by the columns, and by 64 rows unless from registers."""
    return 16 * 2 * (columns + (0 if registers_a else 64))


def shared_bytes(ways: Sequence[Way], moved: int = 0) -> int:
    """Of shared memory for a step of the warpgroups whose ways these are, beside the `moved` bytes of TMA."""
    read = sum(product_bytes(one.columns, one.registers_a) for way in ways for one in way.loop.products)
    return read + 4 * sum(way.loop.shared_bytes for way in ways) + moved


def units(ways: Sequence[Way], signals: Sequence[Signal] = (), moved: int = 0) -> dict[str, float]:
    """Cycles of each unit of a processor for one step of the warpgroups whose ways these are.

    moved: bytes of shared memory that TMA writes and reads for it.
    """
    counts = [way.loop.instructions for way in ways]
    warps = 4  # of a warpgroup
    # Warpgroups that meet at every barrier of a program have one chain, in which each waits for the other's products.
    meet = any(signal.arrives == signal.waits for signal in signals)
    return {
        "tensor": sum(product_cycles(one.columns) for way in ways for one in way.loop.products),
        "exponential": sum(32 * warps * count.get("MUFU", 0) for count in counts) / EXPONENTIALS,
        "half rate": sum(2 * count.get(name, 0) for count in counts for name in HALF_RATE),
        "issue": sum(warps * way.loop.size for way in ways) / SLOTS,
        "shared": shared_bytes(ways, moved) / SHARED_BYTES,
        "chain": simulate(ways, signals, moved) if meet else max(simulate([way]) for way in ways),
    }


def combined(cycles: Iterable[float], power: float) -> float:
    """Of a step in which units get in each other's way: more than the greatest, less than their sum."""
    return float(sum(one**power for one in cycles) ** (1 / power))


def simulate(ways: Sequence[Way], signals: Sequence[Signal] = (), moved: int = 0, steps: int = 24) -> float:
    """Cycles from step to step where warpgroups run these ways against each other, with nothing else on the processor.

    One scheduler is followed, with a warp of each warpgroup and a quarter of every unit: the four are alike. Products
    are served in the order of their issue, and so is shared memory. What TMA moves is spread over the products by their
    cycles.

    Raises:
        ValueError: If the warpgroups wait for each other for ever.
    """
    scheduler = _Scheduler(ways, signals, moved)
    starts: list[float] = []
    while len(starts) < steps:
        if scheduler.issue():
            starts.append(scheduler.warps[0].ready)
    return (starts[-1] - starts[steps // 2 - 1]) / (steps - steps // 2)


@dataclass
class _Warp:
    """Where a warp is, when it may go on, and when what it has begun is done."""

    way: Way
    index: int = 0
    step: int = 0
    ready: float = 0.0
    issued: float = -1.0
    boards: list[float] = field(default_factory=lambda: [0.0] * 6)
    groups: list[float] = field(default_factory=list)
    open: float = 0.0
    arrivals: dict[Signal, list[float]] = field(default_factory=dict)
    products: int = 0


class _Scheduler:
    """One of the four of a processor."""

    def __init__(self, ways: Sequence[Way], signals: Sequence[Signal], moved: int) -> None:
        self.warps = [_Warp(way) for way in ways]
        self._signals = signals
        cycles = sum(product_cycles(one.columns) for way in ways for one in way.loop.products)
        self._moved = moved / max(cycles, 1)
        self._free = dict.fromkeys(("issue", "tensor", "exponential", "half rate", "shared"), 0.0)
        for warp in self.warps:
            self._arrive(warp)

    def issue(self) -> bool:
        """Issue the next instruction of the warp that can go on first. Returns whether the first now begins a step."""
        known = ((self._time(place, warp), place) for place, warp in enumerate(self.warps))
        # Of two that could go on at once, the one that has waited longer.
        times = [(time, self.warps[place].issued, place) for time, place in known if time is not None]
        if not times:
            raise ValueError("the warpgroups wait for each other")
        time, _, place = min(times)
        warp = self.warps[place]
        self._run(warp, time)
        warp.issued = time
        warp.ready = time + max(warp.way.orders[warp.index].stall, 1)
        self._free["issue"] = time + 1
        warp.index += 1
        if warp.index == len(warp.way.instructions):
            warp.index, warp.products = 0, 0
            warp.step += 1
        self._arrive(warp)
        return place == 0 and warp.index == 0

    def _arrive(self, warp: _Warp) -> None:
        for signal in self._signals:
            if signal.arrives == warp.index:
                warp.arrivals.setdefault(signal, []).append(warp.ready + OTHER_LATENCY)

    def _time(self, place: int, warp: _Warp) -> float | None:
        """When the next instruction of a warp may be issued, as far as is known; None if the other must come first."""
        instruction, order = warp.way.instructions[warp.index], warp.way.orders[warp.index]
        time = max([warp.ready, self._free["issue"], *(warp.boards[board] for board in order.waits)])
        if instruction.name == "MUFU":
            time = max(time, self._free["exponential"])
        if instruction.name in HALF_RATE:
            time = max(time, self._free["half rate"])
        if instruction.opcode.startswith("WARPGROUP.DEPBAR"):
            found = re.search(r"gsb0,\s*0x([0-9a-f]+)", instruction.operands)
            left = int(found.group(1), 16) if found else 0
            time = max([time, *warp.groups[: max(0, len(warp.groups) - left)]])
        for signal in self._signals:
            if signal.waits == warp.index:
                needed = warp.step + 1 - signal.late[place]
                arrivals = self.warps[1 - place].arrivals.get(signal, [])
                if len(arrivals) < needed:
                    return None
                time = max([time, *arrivals[:needed][-1:]])
        return time

    def _run(self, warp: _Warp, time: float) -> None:
        instruction = warp.way.instructions[warp.index]
        done = time + LATENCY.get(instruction.name, OTHER_LATENCY)
        if instruction.name == "MUFU":
            self._free["exponential"] = time + 32 * SLOTS / EXPONENTIALS
        elif instruction.name in HALF_RATE:
            self._free["half rate"] = time + 2
        elif instruction.name == "HGMMA":
            self._multiply(warp, instruction, time)
        elif taken := instruction.shared_bytes:
            self._free["shared"] = max(self._free["shared"], time) + 4 * taken / SHARED_BYTES
            done += self._free["shared"] - time
        elif instruction.opcode.startswith("WARPGROUP.DEPBAR"):
            warp.groups = [end for end in warp.groups if end > time]
        for board in warp.way.orders[warp.index].signs:
            warp.boards[board] = max(warp.boards[board], done)

    def _multiply(self, warp: _Warp, instruction: Instruction, time: float) -> None:
        product = warp.way.loop.products[warp.products]
        warp.products += 1
        start = max(self._free["tensor"], time)
        taken = product_cycles(product.columns)
        read = product_bytes(product.columns, product.registers_a) + self._moved * taken
        self._free["shared"] = max(self._free["shared"], start) + read / SHARED_BYTES
        self._free["tensor"] = max(start + taken, self._free["shared"])
        warp.open = self._free["tensor"] + OTHER_LATENCY
        if "gsb0" in instruction.operands:
            warp.groups.append(warp.open)


# What is compiled.

# Runs on older kernels too, and so asks for no more than they have.
_COMPILE = """
import json, sys
from triton.experimental.gluon._runtime import GluonASTSource
from transfusion_kernels.attention import hopper
from transfusion_kernels.verification.machine_code import compile_function
rings = {"forward": hopper.FORWARD, "backward": hopper.BACKWARD}
found = []
for case in hopper.compile_cases():
    if case.name.endswith("bf16"):
        direction = "backward" if "backward" in case.name else "forward"
        width = int(case.name.split("head_dim ")[1].split(",")[0])
        code = compile_function(case.function, case.signature, case.constants, case.options, "sm_90", GluonASTSource)
        grouped, persistent = "together" in case.signature, "taken" in case.signature
        found.append((direction, width, rings[direction][width].step, grouped, persistent, code.asm["cubin"].hex()))
json.dump(found, open(sys.argv[1], "w"))
"""
# By direction and waits for barriers in a step. Forward the consumers take turns to issue. Backward each waits until
# the other has stored its gradients of scores, and until it has multiplied those of the step before.
_HOPPER_SIGNALS = {
    ("forward", 3): ((0, 1, (1, 0)),),
    ("forward", 4): ((0, 1, (1, 0)),),
    ("backward", 2): (),
    ("backward", 4): ((0, 3, (0, 0)), (2, 2, (1, 1))),
}


def listing(cubin: bytes) -> str:
    """The machine code of a compiled kernel as text, with the bits of every instruction."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-c", "-hex", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def hopper_kernels(checkout: Path, family: str) -> Iterator[Kernel]:
    """The Hopper kernels of a checkout in bfloat16."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "listings.json"
        path = os.pathsep.join([str(checkout / "kernels"), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-c", _COMPILE, str(out)]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": path}, cwd=folder)
        found = json.loads(out.read_text(encoding="utf-8"))
    for direction, width, step, grouped, persistent, cubin in found:
        launch = _hopper_launch(direction, width, step, grouped, persistent, listing(bytes.fromhex(cubin)))
        yield Kernel(family, width, direction, (launch,), True)


def _hopper_launch(
    direction: str, width: int, rows: int, grouped: bool, persistent: bool, text: str
) -> Launch:
    ways = read_ways(text)
    if len(ways) != (6 if direction == "forward" else 2):
        raise ValueError(f"hopper {direction}, head_dim {width}: {len(ways)} loops with products")
    copied, reduced = 2 * 2 * rows * width, 0
    if direction == "forward":
        # Of each consumer: with a mask on both sides, without one, with one at the end.
        pairs = [(ways[place][0], ways[place + 3][0]) for place in (1, 0, 2)]
    else:
        pairs = [(ways[0][masked], ways[1][masked]) for masked in (0, 1, 1)]
        copied += 2 * 4 * rows
        # What a step adds to dq: once for both consumers if these wait for each other, else once for each.
        reduced = 4 * rows * width * (1 if _hopper_signals(direction, pairs[0][0]) else 2)
    full, masked, ending = (
        Step.of(pair, _hopper_signals(direction, pair[0]), copied + reduced) for pair in pairs
    )
    over = "queries" if direction == "forward" else "keys"
    walked = (4 if direction == "forward" else 8) * width * grouped
    # Programs that take tile after tile have fetched the next one's rows by the end of the last one.
    outside = ITEM_CYCLES if persistent else PROGRAM_CYCLES
    return Launch("_consume", rows, over, (full, masked, ending), 1, walked, outside)


def _hopper_signals(direction: str, way: Way) -> tuple[Signal, ...]:
    arrivals, waits = (
        [place for place, one in enumerate(way.instructions) if one.opcode.startswith(f"SYNCS.{kind}")]
        for kind in ("ARRIVE", "PHASECHK")
    )
    if (direction, len(waits)) not in _HOPPER_SIGNALS:
        raise ValueError(f"hopper {direction}: {len(waits)} waits for barriers in a step")
    return tuple(
        Signal(arrivals[arrival], waits[wait], late)
        for arrival, wait, late in _HOPPER_SIGNALS[direction, len(waits)]
    )


def portable_kernels() -> Iterator[Kernel]:
    """The Triton kernels as `auto` would launch them on a Hopper GPU, in bfloat16."""
    for width in (64, 128):
        for direction in ("forward", "backward"):
            yield _portable(direction, width)


def _portable(direction: str, width: int) -> Kernel:
    from transfusion_kernels.attention.backward import attention_backward
    from transfusion_kernels.attention.forward import attention_forward
    from transfusion_kernels.attention.tiles import Tiles, tiles_for
    from transfusion_kernels.verification.machine_code import compile_launches

    found: list[Tiles] = []
    q = torch.empty(2, 4096, 8, width, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    bound = torch.empty(2, 4096, dtype=torch.int32, device="meta")
    order = torch.empty(2 * 4096 // TILE_ROWS, dtype=torch.int32, device="meta")

    def launch() -> None:
        found.append(tiles_for(width, q.dtype, False))
        if direction == "forward":
            attention_forward(q, q, q, bound, bound, order, width**-0.5, False)
            return
        lse = torch.empty(2, 8, 4096, device="meta")
        bounds, orders = (bound, bound, bound, bound), (order, order)
        attention_backward(q, q, q, q, q, lse, bounds, orders, width**-0.5, False, False)

    compiled = compile_launches("sm_90", launch)
    tiles = found[0]
    tile_of = {
        "_forward_kernel": tiles.forward,
        "_keys_kernel": tiles.fused or tiles.keys,
        "_queries_kernel": tiles.queries,
    }
    launches = []
    for name, tile in tile_of.items():
        if name not in compiled:
            continue
        if tile.rows != TILE_ROWS:
            raise ValueError(f"{name}, head_dim {width}: tiles of {tile.rows} rows")
        ways = [pair[0] for pair in read_ways(listing(compiled[name].asm["cubin"]))]
        if len(ways) != (3 if name == "_forward_kernel" else 2):
            raise ValueError(f"{name}, head_dim {width}: {len(ways)} loops with products")
        programs = 2 if tile.warps == 4 else 1
        adds = name == "_keys_kernel" and tiles.fused is not None
        moved = 2 * 2 * tile.step * width * programs + 4 * tile.step * width * adds
        # All warps of a program meet at its barriers. Two programs share a processor without knowing of each other.
        full, masked, ending = (
            Step.of((way, way), _meetings(way) if programs == 1 else (), moved)
            for way in (ways[1], ways[0], ways[-1] if len(ways) == 3 else ways[0])
        )
        over = "keys" if name == "_keys_kernel" else "queries"
        # Keys and values in 16 bits, or queries, their gradients and where it adds that in float32 those of the output.
        grouped = "together" in compiled[name].src.fn.arg_names
        walked = (8 if adds else 4) * width * grouped
        launches.append(Launch(name.strip("_"), tile.step, over, (full, masked, ending), programs, walked))
    adds = direction == "backward" and tiles.fused is not None
    return Kernel("portable", width, direction, tuple(launches), adds)


def _meetings(way: Way) -> tuple[Signal, ...]:
    places = [place for place, one in enumerate(way.instructions) if one.name == "BAR"]
    return tuple(Signal(place, place, (0, 0)) for place in places)


# What a mask makes of it.


def mask_of(family: str, length: int, rows: int) -> IntervalMask:
    """As benchmarks/attention.py makes it; "full" is one document that sees all of itself."""
    start_BS, end_BS = torch.zeros(2, rows, length, dtype=torch.int64)
    for row in range(rows):
        documents, images = [(0, length)], [(0, length)]
        if family != "full":
            documents, images = FAMILIES[family](length, random.Random(row))
        for first, end in documents:
            start_BS[row, first:end] = first
        for first, end in images:
            end_BS[row, first:end] = end
    return IntervalMask.from_spans(start_BS, end_BS)


def tile_steps(mask: IntervalMask, over: str, step: int) -> list[tuple[int, int, int]]:
    """The steps of each tile in the order of the launch: without a mask, before these, after these."""
    first, end, order = (
        (mask.first_key, mask.end_key, mask.query_order)
        if over == "queries"
        else (mask.first_query, mask.end_query, mask.key_order)
    )
    tiles = -(-first.shape[1] // TILE_ROWS)
    found = []
    for number in order.tolist():
        row, start = number // tiles, number % tiles * TILE_ROWS
        last = min(start + TILE_ROWS, first.shape[1]) - 1
        low_first, high_first = int(first[row, start]), int(first[row, last])
        low_end, high_end = int(end[row, start]), int(end[row, last])
        steps = max(-(-(high_end - low_first) // step), 0)
        full_start = min(-(-(high_first - low_first) // step), steps)
        full_end = max(max(low_end - low_first, 0) // step, full_start)
        found.append((full_end - full_start, full_start, steps - full_end))
    return found


def finish(costs: Sequence[float], places: int) -> float:
    """When the last of the programs ends, if each in turn goes to the place that is free first."""
    free = [0.0] * places
    for cost in costs:
        heapq.heapreplace(free, free[0] + cost)
    return max(free)


Cost = Callable[[Step], float]


def _expected(step: Step) -> float:
    return step.expected


def _simulated(step: Step) -> float:
    return step.simulated / SIMULATED_SHARE


def launch_cycles(launch: Launch, mask: IntervalMask, heads: int, cost: Cost) -> dict[str, float]:
    """From the first to the last program of a launch, and what shares of that go where."""
    cycles = [cost(step) for step in launch.steps]
    tiles = tile_steps(mask, launch.over, launch.rows)
    of_head = [
        launch.outside + sum(count * each for count, each in zip(counts, cycles, strict=True))
        for counts in tiles
    ]
    costs = launch.in_order(of_head, heads, mask.first_key.numel())
    places = PROCESSORS * launch.programs
    last = finish(costs, places)
    return {
        "cycles": last,
        "balance": sum(costs) / places / last,
        "masked": sum(sum(counts[1:]) for counts in tiles) / sum(sum(counts) for counts in tiles),
        "outside_steps": launch.outside * len(costs) / sum(costs),
    }


def speed(
    kernel: Kernel, family: str, length: int, head_rows: int, cost: Cost = _expected
) -> dict[str, float]:
    """TFLOP/s of visible pairs that the model gives for a pass over a mask, and where the time goes.

    cost: cycles of a step.
    """
    rows = max(TOKENS // length, 1)
    heads = max(head_rows // rows, 1)
    mask = mask_of(family, length, rows)
    parts = [launch_cycles(launch, mask, heads, cost) for launch in kernel.launches]
    seconds = sum(part["cycles"] for part in parts) * CYCLE_SECONDS
    elements = rows * heads * length * kernel.head_dim
    moved = elements * ((HELPER_BYTES if kernel.adds else 4) if kernel.direction == "backward" else 0)
    helpers = moved / (HBM_BYTES * HBM_SHARE)
    flops = mask.flops(heads, kernel.head_dim, kernel.direction == "backward")
    return {
        "tflops": flops / (seconds + helpers) / 1e12,
        "helpers": helpers / (seconds + helpers),
        **{name: parts[0][name] for name in ("balance", "masked", "outside_steps")},
    }


# The record.


def describe(kernel: Kernel) -> list[dict[str, Any]]:
    """The counts of each launch's step without a mask, the cycles of each unit, and the bound."""
    found = []
    for launch in kernel.launches:
        step = launch.steps[0]
        loops = [way.loop for way in step.ways]
        limit = max(step.units, key=lambda unit: step.units[unit])
        found.append(
            {
                "kernel": kernel.name if len(kernel.launches) == 1 else f"{kernel.name}: {launch.name}",
                "rows": launch.rows,
                "programs": launch.programs,
                "instructions": [loop.size for loop in loops],
                "stalls": [sum(order.stall for order in way.orders) for way in step.ways],
                "products": [len(loop.products) for loop in loops],
                "exponentials": [loop.exponentials for loop in loops],
                "exposed": [loop.exposed for loop in loops],
                "shared_bytes": shared_bytes(step.ways, step.moved),
                "cycles": {unit: round(value) for unit, value in step.units.items()},
                "limit": limit,
                "bound": round(step.units["tensor"] / step.units[limit], 3),
                "expected_cycles": [round(one.expected) for one in launch.steps],
                "simulated_cycles": [round(one.simulated) for one in launch.steps],
            }
        )
    return found


def compare(kernels: Sequence[Kernel]) -> list[dict[str, Any]]:
    """What the model gives for our kernels in place of those that others measured."""
    by_key = {(kernel.family, kernel.head_dim, kernel.direction): kernel for kernel in kernels}
    lines = []
    for one in PUBLISHED:
        kernel = by_key.get((one.kernel, one.head_dim, one.direction))
        if kernel is not None:
            case = (kernel, one.mask, one.length, one.head_rows)
            found = {"expected": speed(*case), "simulated": speed(*case, cost=_simulated)}
            lines.append(asdict(one) | {name: round(value["tflops"]) for name, value in found.items()})
    return lines


def expectations(kernels: Sequence[Kernel]) -> list[dict[str, Any]]:
    """For each kernel and mask, TFLOP/s of visible pairs."""
    lines = []
    for kernel in kernels:
        for family in MASKS:
            case = (kernel, family, LENGTH, TOKENS // LENGTH * WIDTH // kernel.head_dim)
            found = speed(*case)
            bar = BARS.get((kernel.family, kernel.head_dim, kernel.direction)) if family == "causal" else None
            lines.append(
                {"kernel": kernel.name, "mask": family, "expected": round(found.pop("tflops"))}
                | {"simulated": round(speed(*case, cost=_simulated)["tflops"])}
                | {name: round(value, 3) for name, value in found.items()}
                | ({"at_least": bar} if bar else {})
            )
    return lines


def gather(sources: Sequence[Callable[[], Iterator[Kernel]]]) -> tuple[list[Kernel], list[str]]:
    """All kernels whose loops can be read, and what is wrong with the others."""
    kernels, wrong = [], []
    for source in sources:
        try:
            kernels += list(source())
        except (ValueError, subprocess.CalledProcessError) as error:
            wrong.append(str(error))
    return kernels, wrong


def report(entry: dict[str, Any]) -> None:
    columns = ("tensor", "exponential", "half rate", "issue", "shared", "chain")
    head = "".join(f"{name:>12}" for name in (*columns, "bound", "expected", "simulated"))
    print(f"{'cycles of a step of both warpgroups':48}{head}  limit")
    for line in entry["kernels"]:
        cells = "".join(f"{line['cycles'][name]:12}" for name in columns)
        later = f"{line['bound']:12.2f}{line['expected_cycles'][0]:12}{line['simulated_cycles'][0]:12}"
        print(f"{line['kernel']:48}{cells}{later}  {line['limit']}")
    print(
        "\nTFLOP/s that others measured of kernels built like ours, and what the model gives for ours in their place"
    )
    print(f"{'':48}{'measured':>12}{'expected':>12}{'simulated':>12}")
    for line in entry["published"]:
        low, high = (f"{value:.0f}" for value in line["tflops"])
        name = f"{line['kernel']} {line['direction']}, head_dim {line['head_dim']}, {line['mask']}"
        measured = low if low == high else f"{low}-{high}"
        print(f"{name:48}{measured:>12}{line['expected']:12}{line['simulated']:12}  {line['source']}")
    print(f"\nTFLOP/s of visible pairs in rows of {LENGTH}: a model and no measurement")
    for line in entry["expected"]:
        bar = f"  at least {line['at_least']}" if "at_least" in line else ""
        name = f"{line['kernel']}, {line['mask']}"
        print(f"{name:48}{'':12}{line['expected']:12}{line['simulated']:12}{bar}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", type=Path, help="a checkout, whose Hopper kernels are called 'before'")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "bounds.json")
    arguments = parser.parse_args()
    sources: list[Callable[[], Iterator[Kernel]]] = [
        lambda: hopper_kernels(ROOT, "hopper"),
        portable_kernels,
    ]
    if arguments.against:
        sources.append(lambda: hopper_kernels(arguments.against.resolve(), "before"))
    kernels, wrong = gather(sources)
    today = datetime.now(UTC).date().isoformat()
    versions = {
        "triton": str(triton.__version__),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
    entry = {
        "date": today,
        "versions": versions,
        "problems": wrong,
        "kernels": [line for kernel in kernels for line in describe(kernel)],
        "published": compare(kernels),
        "expected": expectations(kernels),
    }
    report(entry)
    for problem in wrong:
        print(problem)
    earlier = (
        json.loads(arguments.out.read_text(encoding="utf-8"))["triton"] if arguments.out.exists() else {}
    )
    record = {
        "command": "python campaigns/bounds.py",
        "what": "A model of speed from machine code. No GPU has run these kernels.",
        "inputs": {name: {"value": value, "source": source} for name, (value, source) in INPUTS.items()},
        "triton": dict(sorted((earlier | {versions["triton"]: entry}).items())),
    }
    arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
