"""NVIDIA's machine code as `nvdisasm -c` prints it: its loops, what overlaps in them, and what races.

Hopper's products (HGMMA) run beside the instructions that follow them, until `WARPGROUP.DEPBAR` waits for all but the
newest so many groups of them. Until then their registers belong to them: those of the first operand may be read, those
of the sum may not. The compilers order all of this, and have been wrong about it before (triton #9433, #9514, #11047).
`read_code` follows every path through a kernel and says which groups may be in flight at each instruction.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)(.*)")
_LABEL = re.compile(r"^\s*(\.L\w+):")
_TARGET = re.compile(r"`\((\.L\w+)\)")
_REGISTER = re.compile(r"\bR(\d+)\b")
_PRODUCT = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)")
# The upper half of an instruction's bits, which `nvdisasm -c -hex` prints on a line of its own.
_UPPER_HALF = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")
_ENDS = {"EXIT", "RET", "BRX"}
# Instructions that write no register, or whose first operand is not what they write.
_WRITE_NOTHING = {
    "BAR", "BRA", "BRX", "BSSY", "BSYNC", "CCTL", "DEPBAR", "ELECT", "ERRBAR", "EXIT", "FENCE", "FSETP", "HGMMA",
    "ISETP", "MEMBAR", "NANOSLEEP", "NOP", "PLOP3", "R2UR", "RED", "RET", "ST", "STG", "STL", "STS", "STSM", "SYNCS",
    "UCGABAR_ARV", "UCGABAR_WAIT", "UTMACCTL", "UTMACMDFLUSH", "UTMALDG", "UTMAREDG", "UTMASTG", "VOTE", "WARPGROUP",
    "WARPSYNC", "YIELD",
}  # fmt: skip
# More ways than this to come to one place are not followed.
_MOST_STATES = 64

Groups = tuple["Group", ...]


@dataclass(frozen=True)
class Instruction:
    """One line. name: what stands before the first dot of the opcode."""

    opcode: str
    operands: str
    predicate: str

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def is_exponential(self) -> bool:
        return self.opcode.startswith("MUFU.EX2")

    @property
    def shared_bytes(self) -> int:
        """That it moves to or from shared memory for a warp of 32 threads."""
        return _shared_bytes(self)


@dataclass(frozen=True)
class Product:
    """An HGMMA. registers_a: whether its first operand comes from registers; columns: N of 64 x N x 16."""

    columns: int
    registers_a: bool


@dataclass(frozen=True)
class Group:
    """The registers of products that are waited for together: first operands, and sums."""

    operands: frozenset[int] = frozenset()
    sums: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Loop:
    """An innermost loop that multiplies matrices.

    Attributes:
        instructions: How many, by name.
        products: In order.
        exponentials: How many.
        exposed: Those of them that run while none of the warpgroup's own products may be in flight.
        shared_bytes: That a warp reads and writes by instructions of its own.
    """

    instructions: dict[str, int]
    products: tuple[Product, ...]
    exponentials: int
    exposed: int
    shared_bytes: int

    @property
    def size(self) -> int:
        """The number of instructions."""
        return sum(self.instructions.values())


@dataclass(frozen=True)
class Code:
    """A kernel.

    Attributes:
        loops: Those that multiply matrices.
        hazards: Instructions that touch registers which a product in flight may still use, as text.
        unsynchronised: Copies into shared memory after which no barrier of the program has followed a wait for
            products, so that another warpgroup may still read what they overwrite.
    """

    loops: tuple[Loop, ...]
    hazards: tuple[str, ...]
    unsynchronised: tuple[str, ...]


def read_code(text: str) -> Code:
    """What stands in the code of a kernel, as `nvdisasm -c` prints it."""
    program = _Program(text)
    states = program.states()
    hazards: dict[int, str] = {}
    unsynchronised: dict[int, str] = {}
    exposed: set[int] = set()
    for block, entries in states.items():
        for entry in entries:
            for index, flight in program.walk(block, entry):
                instruction = program.instructions[index]
                shown = f"{instruction.opcode} {instruction.operands.strip()}"
                if flight.touches(instruction):
                    hazards[index] = shown
                if instruction.name == "UTMALDG" and flight.waited:
                    unsynchronised[index] = shown
                if instruction.is_exponential and not flight.groups:
                    exposed.add(index)
    loops = tuple(_loop(program, body, exposed) for body in program.product_loops())
    return Code(loops, tuple(hazards.values()), tuple(unsynchronised.values()))


@dataclass(frozen=True)
class Order:
    """What the assembler orders for an instruction, in the bits that nvdisasm prints by `-hex` alone.

    Attributes:
        stall: Cycles until the same warp may issue its next instruction.
        signs: The scoreboards, 0 to 5, that the instruction holds until its result is there or its operands are read.
        waits: The scoreboards that must be free before it is issued.
    """

    stall: int
    signs: frozenset[int]
    waits: frozenset[int]


@dataclass(frozen=True)
class Way:
    """Once around a loop: what a warp executes from the head of the loop until it is there again.

    Attributes:
        loop: The counts of this way alone.
        instructions: In the order in which they run.
        orders: One for each of them, or nothing where the text has no bits.
    """

    loop: Loop
    instructions: tuple[Instruction, ...]
    orders: tuple[Order, ...]


def read_ways(text: str) -> tuple[tuple[Way, Way], ...]:
    """For each innermost loop with products the shortest way around it and the longest that repeats nothing.

    Waits that fail and try again stand on neither. So where a mask hides behind a branch, the shortest way is a step
    without one, and the longest a step with it.

    Args:
        text: A kernel as `nvdisasm -c` prints it, with `-hex` if orders are wanted.

    Raises:
        ValueError: If the shortest way leaves out a product, so that it is no step of the loop.
    """
    program = _Program(text)
    exposed = _exposed(program)
    orders = _orders(text)
    if orders and len(orders) != len(program.instructions):
        raise ValueError(f"bits of {len(orders)} instructions, got {len(program.instructions)}")
    ways = []
    for body, shortest, longest in program.ways_around_product_loops():
        pair = []
        for indices in (shortest, longest):
            pair.append(
                Way(
                    _loop(program, indices, exposed),
                    tuple(program.instructions[index] for index in indices),
                    tuple(orders[index] for index in indices) if orders else (),
                )
            )
        if pair[0].loop.products != _loop(program, body, exposed).products:
            raise ValueError("products on a branch of a loop")
        ways.append((pair[0], pair[1]))
    return tuple(ways)


def _exposed(program: _Program) -> set[int]:
    """The exponentials that may run while no product of their warpgroup is in flight."""
    return {
        index
        for block, entries in program.states().items()
        for entry in entries
        for index, flight in program.walk(block, entry)
        if program.instructions[index].is_exponential and not flight.groups
    }


def _orders(text: str) -> list[Order]:
    halves = [int(found.group(1), 16) for line in text.splitlines() if (found := _UPPER_HALF.match(line))]
    return [
        Order(
            bits >> 41 & 15,
            frozenset({bits >> 46 & 7, bits >> 49 & 7} - {6, 7}),
            frozenset(board for board in range(6) if bits >> 52 + board & 1),
        )
        for bits in halves
    ]


def _loop(program: _Program, body: Sequence[int], exposed: set[int]) -> Loop:
    inside = [program.instructions[index] for index in body]
    products = [
        Product(int(found.group(2)), bool(re.match(r"\s*R\d+,\s*R\d+,", instruction.operands)))
        for instruction in inside
        if (found := _PRODUCT.match(instruction.opcode))
    ]
    exponentials = [index for index in body if program.instructions[index].is_exponential]
    return Loop(
        dict(Counter(instruction.name for instruction in inside)),
        tuple(products),
        len(exponentials),
        sum(index in exposed for index in exponentials),
        sum(_shared_bytes(instruction) for instruction in inside),
    )


def _shared_bytes(instruction: Instruction) -> int:
    """That a warp of 32 threads moves."""
    if instruction.name in ("LDSM", "STSM"):
        return 128 * int(instruction.opcode.rsplit(".", 1)[-1])
    return 32 * 4 * _width(instruction.opcode) if instruction.name in ("LDS", "STS") else 0


def _width(opcode: str) -> int:
    """How many registers a value of an instruction takes."""
    parts = opcode.split(".")
    if "128" in parts:
        return 4
    if parts[0] in ("LDSM", "STSM"):
        return int(parts[-1])
    return 2 if "64" in parts or "WIDE" in parts or parts[0] in ("DADD", "DFMA", "DMUL") else 1


@dataclass(frozen=True)
class _Flight:
    """What may be in flight: closed groups, oldest first, and the open one; and whether a wait for products has been
    followed by no barrier yet."""

    groups: Groups = ()
    open: Group = Group()
    waited: bool = False

    def after(self, instruction: Instruction) -> _Flight:
        if instruction.name == "HGMMA":
            operands, sums = _registers_of_product(instruction)
            group = Group(self.open.operands | operands, self.open.sums | sums)
            if "gsb0" in instruction.operands:
                return _Flight((*self.groups, group), Group(), self.waited)
            return _Flight(self.groups, group, self.waited)
        if instruction.opcode.startswith("WARPGROUP.DEPBAR"):
            found = re.search(r"gsb0,\s*0x([0-9a-f]+)", instruction.operands)
            left = int(found.group(1), 16) if found else 0
            return _Flight(self.groups[max(0, len(self.groups) - left) :], self.open, True)
        if instruction.name == "BAR":
            return _Flight(self.groups, self.open, False)
        return self

    def touches(self, instruction: Instruction) -> bool:
        """Whether it writes a register that a product may read, or uses one that a product may write."""
        if not self.groups and self.open == Group():
            return False
        flying = (*self.groups, self.open)
        if instruction.name == "HGMMA":
            # A sum may be gone on with, and an operand read again. What is being summed up is no operand.
            operands, sums = _registers_of_product(instruction)
            return any(operands & group.sums or sums & group.operands for group in flying)
        written = _written(instruction)
        read = _read(instruction)
        return any(written & group.operands or (written | read) & group.sums for group in flying)


def _registers_of_product(instruction: Instruction) -> tuple[frozenset[int], frozenset[int]]:
    found = _PRODUCT.match(instruction.opcode)
    first = re.match(r"\s*R(\d+)(?:,\s*R(\d+))?", instruction.operands)
    if not found or not first:
        return frozenset(), frozenset()
    # A warpgroup holds 64 x N sums in 128 threads, and 64 x 16 operands of 16 bits.
    sums = frozenset(range(int(first.group(1)), int(first.group(1)) + int(found.group(2)) // 2))
    operands = range(int(first.group(2)), int(first.group(2)) + 4) if first.group(2) else ()
    return frozenset(operands), sums


def _written(instruction: Instruction) -> frozenset[int]:
    if instruction.name in _WRITE_NOTHING or instruction.name.startswith("U"):
        return frozenset()
    found = re.match(r"\s*(?:!?U?P\w+,\s*)*R(\d+)\b", instruction.operands)
    if not found:
        return frozenset()
    return frozenset(range(int(found.group(1)), int(found.group(1)) + _width(instruction.opcode)))


def _read(instruction: Instruction) -> frozenset[int]:
    registers = [int(number) for number in _REGISTER.findall(instruction.operands)]
    if instruction.name not in _WRITE_NOTHING and not instruction.name.startswith("U"):
        registers = registers[1:]
    if registers and instruction.name in ("ST", "STG", "STL", "STS", "STSM"):  # what is stored stands last
        registers += range(registers[-1], registers[-1] + _width(instruction.opcode))
    return frozenset(registers)


class _Program:
    """Instructions, the blocks that they form, and which follows which."""

    def __init__(self, text: str) -> None:
        self.instructions: list[Instruction] = []
        labels: dict[str, int] = {}
        targets: dict[int, list[str]] = {}
        for line in text.splitlines():
            if found := _LABEL.match(line):
                labels[found.group(1)] = len(self.instructions)
            elif found := _LINE.search(line):
                predicate, opcode, operands = found.groups()
                instruction = Instruction(opcode, operands.rstrip(" ;"), predicate or "")
                if instruction.name == "BRA":
                    targets[len(self.instructions)] = _TARGET.findall(operands)
                elif instruction.name == "BRX":
                    targets[len(self.instructions)] = re.findall(r"\.L\w+", operands)
                self.instructions.append(instruction)
        count = len(self.instructions)
        leaders = {0, *(index + 1 for index in targets), *labels.values()}
        leaders |= {index + 1 for index, one in enumerate(self.instructions) if one.name in _ENDS}
        starts = sorted(index for index in leaders if index < count)
        self._ends = dict(zip(starts, [*starts[1:], count], strict=True))
        self.following: dict[int, tuple[int, ...]] = {}
        for start, end in self._ends.items():
            last = self.instructions[end - 1]
            after = [labels[name] for name in targets.get(end - 1, ()) if labels.get(name, count) < count]
            # A branch is conditional by its predicate, or by one among its operands.
            conditional = bool(last.predicate) or bool(re.match(r"\s*!?U?P\w+,", last.operands))
            goes_on = last.name not in (*_ENDS, "BRA") or (last.name != "BRX" and conditional)
            if goes_on and end < count:
                after.append(end)
            self.following[start] = tuple(dict.fromkeys(after))

    def walk(self, block: int, flight: _Flight) -> Iterator[tuple[int, _Flight]]:
        """Each instruction of a block with what may be in flight before it."""
        for index in range(block, self._ends[block]):
            yield index, flight
            flight = flight.after(self.instructions[index])

    def states(self) -> dict[int, set[_Flight]]:
        """What may be in flight where each block that can be reached begins."""
        states: dict[int, set[_Flight]] = defaultdict(set)
        states[0].add(_Flight())
        waiting = [(0, _Flight())]
        while waiting:
            block, flight = waiting.pop()
            for index in range(block, self._ends[block]):
                flight = flight.after(self.instructions[index])
            for follower in self.following[block]:
                if flight not in states[follower] and len(states[follower]) < _MOST_STATES:
                    states[follower].add(flight)
                    waiting.append((follower, flight))
        return dict(states)

    def product_loops(self) -> list[list[int]]:
        """The instructions of each innermost loop that has products, in the order of the code."""
        loops = [blocks for blocks in self._natural_loops() if self._has_products(blocks)]
        inner = [one for one in loops if not any(other < one for other in loops)]
        return [[i for block in sorted(one) for i in range(block, self._ends[block])] for one in inner]

    def ways_around_product_loops(self) -> Iterator[tuple[list[int], list[int], list[int]]]:
        """For each of `product_loops` its instructions, those of the shortest way around it, and of the longest."""
        dominators = self._dominators()
        for body in self.product_loops():
            blocks = set(body) & self._ends.keys()
            (head,) = (one for one in blocks if not (dominators[one] & blocks) - {one})
            shortest = min(self._ways((head,), blocks), key=self._size, default=())
            if not shortest:
                raise ValueError("no way around a loop")
            # What comes to itself again without the head, and can be passed by, is the retry of a wait.
            others = blocks - {head}
            straight = {one for one in blocks if one in shortest or one not in self._reached(one, others)}
            longest = max(self._ways((head,), straight), key=self._size)
            yield body, self._inside(shortest), self._inside(longest)

    def _inside(self, blocks: Sequence[int]) -> list[int]:
        return [index for block in blocks for index in range(block, self._ends[block])]

    def _size(self, blocks: Sequence[int]) -> int:
        return sum(self._ends[block] - block for block in blocks)

    def _reached(self, block: int, within: set[int]) -> set[int]:
        """The blocks that one comes to from `block`, without leaving `within`."""
        reached: set[int] = set()
        waiting = [block]
        while waiting:
            for follower in self.following[waiting.pop()]:
                if follower in within and follower not in reached:
                    reached.add(follower)
                    waiting.append(follower)
        return reached

    def _ways(self, way: tuple[int, ...], within: set[int]) -> Iterator[tuple[int, ...]]:
        """All ways that begin so, come back to where they began, and pass each block of `within` once at most."""
        for follower in self.following[way[-1]]:
            if follower == way[0]:
                yield way
            elif follower in within and follower not in way:
                yield from self._ways((*way, follower), within)

    def _has_products(self, blocks: frozenset[int]) -> bool:
        return any(
            self.instructions[i].name == "HGMMA" for block in blocks for i in range(block, self._ends[block])
        )

    def _natural_loops(self) -> list[frozenset[int]]:
        """A loop for every block that a later one, which is only reached through it, goes back to."""
        dominators = self._dominators()
        before: dict[int, list[int]] = defaultdict(list)
        for block in dominators:
            for follower in self.following[block]:
                before[follower].append(block)
        loops: dict[int, set[int]] = {}
        for block in dominators:
            for head in self.following[block]:
                if head not in dominators[block]:
                    continue
                body = loops.setdefault(head, {head})
                waiting = [block]
                while waiting:
                    one = waiting.pop()
                    if one not in body:
                        body.add(one)
                        waiting.extend(before[one])
        return [frozenset(body) for body in loops.values()]

    def _dominators(self) -> dict[int, frozenset[int]]:
        """For each block that can be reached, those that every way to it passes."""
        order: list[int] = []
        seen, waiting = {0}, [0]
        while waiting:
            block = waiting.pop()
            order.append(block)
            for follower in self.following[block]:
                if follower not in seen:
                    seen.add(follower)
                    waiting.append(follower)
        before: dict[int, list[int]] = defaultdict(list)
        for block in order:
            for follower in self.following[block]:
                before[follower].append(block)
        every = frozenset(order)
        dominators = {block: every for block in order} | {0: frozenset({0})}
        changed = True
        while changed:
            changed = False
            for block in order[1:]:
                common = frozenset.intersection(*(dominators[one] for one in before[block])) | {block}
                if common != dominators[block]:
                    dominators[block] = common
                    changed = True
        return dominators
