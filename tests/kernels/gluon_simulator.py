"""Runs the source of Gluon kernels for Hopper on the CPU, to find what is wrong with how their partitions meet.

The file of a kernel is parsed, its decorators, annotations and imports dropped, and the rest executed over torch
tensors. Then, for one program at a time:

- partitions are threads of which one runs at a time; at every meeting point a seeded scheduler picks who goes on
- barriers count arrivals and bytes and have phases with a parity, as the hardware's
- copies by the tensor memory accelerator (TMA) are in flight until the scheduler finishes them, products until they
  are waited for; each piece of shared memory knows what is reading or writing it
- what is written to shared memory from registers is invisible to copies and products until it is fenced

A `Fault` is raised for a race, a missing fence, a deadlock, a load outside a tensor, a copy that outlives its program,
and a division that Triton would round otherwise than Python. What this cannot see: layouts and registers (the compiler
checks those), and the hardware's memory model beyond fences.
"""

from __future__ import annotations

import ast
import builtins
import math
import random
import threading
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Fault(Exception):  # noqa: N818
    """What a kernel must never do."""


class Stopped(BaseException):
    """Ends the other partitions after a fault in one."""


@dataclass(eq=False)
class Partition:
    """A thread that runs only while the machine lets it, and the order of its products and stores."""

    speed: float
    ready: Callable[[], bool] = lambda: True
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    ended: bool = False
    products: list[Product] = field(default_factory=list)
    stores: list[Copy] = field(default_factory=list)


@dataclass(eq=False)
class Copy:
    """A copy in flight."""

    finish: Callable[[], None]
    speed: float


class Machine:
    """One program: its partitions, what is in flight, and the scheduler."""

    def __init__(self, seed: float) -> None:
        self.random = random.Random(seed)
        self.copies: list[Copy] = []
        self.back = threading.Semaphore(0)
        self.host = self.current = Partition(1.0)  # what runs before the partitions
        self.fault: BaseException | None = None
        self.unfenced: list[tuple[Partition, Piece | Barrier]] = []

    def some_speed(self) -> float:
        """Spread widely, so that in some programs a partition or a copy lags far behind."""
        return 10.0 ** self.random.uniform(-2, 1)

    def pause(self, ready: Callable[[], bool] = lambda: True) -> None:
        """Called by a partition: let others run, and go on some time after `ready()` holds."""
        me = self.current
        if me is self.host:
            return
        me.ready = ready
        self.back.release()
        me.turn.acquire()
        if self.fault:
            raise Stopped

    def start_copy(self, finish: Callable[[], None]) -> Copy:
        copy = Copy(finish, self.some_speed())
        self.copies.append(copy)
        return copy

    def run(self, work: Iterable[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
        partitions = []
        for function, arguments in work:
            partition = Partition(self.some_speed())
            partitions.append(partition)
            threading.Thread(target=self._live, args=(partition, function, arguments), daemon=True).start()
        try:
            self._schedule(partitions)
        except BaseException as error:
            self.fault = self.fault or error
        for partition in partitions:  # those that a fault left waiting
            while not partition.ended:
                self._resume(partition)
        self.current = self.host
        if self.fault:
            raise self.fault

    def _live(self, me: Partition, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        me.turn.acquire()
        try:
            if not self.fault:
                function(*arguments)
                if me.products or any(store in self.copies for store in me.stores):
                    raise Fault("a partition ends with products or stores in flight")
        except Stopped:
            pass
        except BaseException as error:
            self.fault = self.fault or error
        me.ended = True
        self.back.release()

    def _schedule(self, partitions: Sequence[Partition]) -> None:
        while self.fault is None and not all(partition.ended for partition in partitions):
            ready = [partition for partition in partitions if not partition.ended and partition.ready()]
            choices = [*ready, *self.copies]
            if not choices:
                raise Fault("deadlock: every partition waits for a barrier")
            (chosen,) = self.random.choices(choices, [choice.speed for choice in choices])
            if isinstance(chosen, Partition):
                self._resume(chosen)
            else:
                self.copies.remove(chosen)
                chosen.finish()
        if self.fault is None and self.copies:
            raise Fault("the program ends with a copy in flight")

    def _resume(self, partition: Partition) -> None:
        self.current = partition
        partition.turn.release()
        self.back.acquire()

    def is_unfenced(self, thing: Piece | Barrier) -> bool:
        return any(other is thing for _, other in self.unfenced)


class Piece:
    """Shared memory that is used as a whole: one half of the rows of one place of a ring."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.writer: Copy | None = None
        self.readers: list[Product | Copy] = []

    def check_write(self, what: str) -> None:
        if self.writer:
            raise Fault(f"race: {what} writes what a load is writing")
        if self.readers:
            raise Fault(f"race: {what} writes what a {type(self.readers[0]).__name__.lower()} is reading")

    def check_read(self, what: str) -> None:
        if self.writer:
            raise Fault(f"race: {what} reads what a load is writing")
        if self.machine.is_unfenced(self):
            raise Fault(f"missing fence: {what} reads what registers were stored to")


class Shared:
    """A view of shared memory. pieces: of the places, a pair of halves each; rows: the dimension that they halve."""

    def __init__(self, machine: Machine, pieces: Sequence[Piece], values: Tensor, rows: int = -2) -> None:
        self.machine, self.pieces, self.values, self.rows = machine, pieces, values, rows
        self.shape, self.dtype = tuple(values.shape), values.dtype

    def index(self, i: int) -> Shared:
        i = int(i)
        return Shared(self.machine, self.pieces[2 * i : 2 * i + 2], self.values[i], self.rows)

    def reshape(self, shape: Sequence[int]) -> Shared:
        return Shared(self.machine, self.pieces, self.values.view(*shape), self.rows)

    def permute(self, order: Sequence[int]) -> Shared:
        rows = list(order).index(len(order) + self.rows) - len(order)
        return Shared(self.machine, self.pieces, self.values.permute(*order), rows)

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        pieces, half = self.pieces, self.shape[dim] // 2
        if (
            len(pieces) == 2
            and dim - len(self.shape) == self.rows
            and (start, length) in ((0, half), (half, half))
        ):
            pieces = [pieces[start // half]]
        return Shared(self.machine, pieces, self.values.narrow(dim, start, length), self.rows)

    def store(self, values: Tensor) -> None:
        for piece in self.pieces:
            piece.check_write("a store of registers")
            self.machine.unfenced.append((self.machine.current, piece))
        self.values.copy_(values)
        self.machine.pause()

    def load(self, layout: object) -> Tensor:
        if any(piece.writer for piece in self.pieces):
            raise Fault("race: a load of registers reads what a load is writing")
        return self.values.clone()


class Barrier:
    """An mbarrier: a phase ends when its arrivals have come and its bytes are written."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.count = self.pending = 0
        self.bytes = self.phase = 0

    def initialise(self, count: int) -> None:
        self.count = self.pending = count
        self.machine.unfenced.append((self.machine.current, self))

    def arrive(self, count: int = 1, expected_bytes: int = 0, written_bytes: int = 0) -> None:
        self.check()
        self.pending -= count
        self.bytes += expected_bytes - written_bytes
        if self.pending < 0:
            raise Fault("a barrier gets more arrivals than its phase has")
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.count

    def has_passed(self, parity: int) -> bool:
        return self.phase % 2 != parity

    def check(self) -> None:
        if not self.count:
            raise Fault("a barrier is used that was not initialised")
        if self.machine.is_unfenced(self):
            raise Fault("missing fence: a barrier is used after its initialisation")


class Barriers:
    def __init__(self, machine: Machine, count: int) -> None:
        self.barriers = [Barrier(machine) for _ in range(count)]

    def index(self, i: int) -> Barrier:
        return self.barriers[i]


class Product:
    """A matrix product in flight: its accumulator may be used only when it has been waited for."""

    def __init__(self, a: Tensor | Shared, b: Shared, accumulator: Tensor) -> None:
        self.a, self.b, self.accumulator = a, b, accumulator
        self.pieces = [*(a.pieces if isinstance(a, Shared) else ()), *b.pieces]
        for piece in self.pieces:
            piece.check_read("a product")
            piece.readers.append(self)
        self.result: Tensor | None = None

    def finish(self) -> None:
        a = self.a.values if isinstance(self.a, Shared) else self.a
        self.result = self.accumulator + a.float() @ self.b.values.float()
        for piece in self.pieces:
            piece.readers.remove(self)


class Pointer:
    """Into a tensor, by elements."""

    def __init__(self, tensor: Tensor, offset: Any = 0) -> None:
        self.tensor, self.offset = tensor, offset

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.tensor, self.offset + offset)

    def places(self, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        places = torch.as_tensor(self.offset).long()
        mask = torch.ones_like(places, dtype=torch.bool) if mask is None else mask.expand_as(places)
        used = places[mask]
        if used.numel() and (used.min() < 0 or used.max() >= self.tensor.numel()):
            raise Fault("an access outside a tensor")
        return places, mask


class Descriptor:
    """A tensor that TMA copies blocks of: 0 past its end, nothing written there."""

    def __init__(self, tensor: Tensor, block_shape: Sequence[int]) -> None:
        self.tensor, self.dtype, self.layout = tensor, tensor.dtype, None
        self.block_shape = list(block_shape)
        self.block_type = types.SimpleNamespace(nbytes=math.prod(block_shape) * tensor.element_size())

    def window(self, coordinates: Sequence[int]) -> tuple[Tensor, tuple[slice, ...]]:
        """The part of the tensor that a block at `coordinates` covers, and which part of the block it is."""
        of_tensor, of_block = [], []
        for start, extent, size in zip(coordinates, self.block_shape, self.tensor.shape, strict=True):
            low, high = int(start), min(int(start) + extent, size)
            if low < 0 or (extent == 1 and low >= size):
                raise Fault(f"a copy at {coordinates} of a tensor {tuple(self.tensor.shape)}")
            of_tensor.append(slice(low, max(low, high)))
            of_block.append(slice(0, max(0, high - low)))
        return self.tensor[tuple(of_tensor)], tuple(of_block)


def _unlike_triton(left: Any, right: Any) -> None:
    if not (isinstance(left, float) or isinstance(right, float)) and (left < 0 or right < 0):
        raise Fault("a negative integer is divided: Triton rounds towards 0, Python down")


class _Plain(ast.NodeTransformer):
    """Device code as plain Python: nothing but its functions and constants; divisions checked; nothing in place."""

    DIVISIONS = (ast.FloorDiv, ast.Mod)

    def visit_Module(self, node: ast.Module) -> ast.Module:
        kept = (ast.FunctionDef, ast.Assign, ast.AnnAssign)
        node.body = [statement for statement in node.body if isinstance(statement, kept)]
        return self.generic_visit(node)  # type: ignore[return-value]

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.decorator_list = []
        return self.generic_visit(node)  # type: ignore[return-value]

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> Any:
        return self.generic_visit(ast.Assign([node.target], node.value))  # type: ignore[list-item]

    def visit_AugAssign(self, node: ast.AugAssign) -> Any:
        assert isinstance(node.target, ast.Name)
        left = ast.Name(node.target.id, ast.Load())
        return self.visit(ast.Assign([node.target], ast.BinOp(left, node.op, node.value)))

    def visit_BinOp(self, node: ast.BinOp) -> Any:
        self.generic_visit(node)
        if not isinstance(node.op, self.DIVISIONS):
            return node
        name = "_floor_divide" if isinstance(node.op, ast.FloorDiv) else "_modulo"
        return ast.Call(ast.Name(name, ast.Load()), [node.left, node.right], [])


class Simulator:
    """The kernels of files of Gluon source; later files see the names of earlier ones.

    changes: pairs of text to replace and its replacement, each of which must occur once or more: for mutants.
    """

    def __init__(self, *paths: Path, changes: Sequence[tuple[str, str]] = (), seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.names = self._language()
        sources = [path.read_text(encoding="utf-8") for path in paths]
        for old, new in changes:
            if not any(old in source for source in sources):
                raise ValueError(f"changes: got {old!r}, which the source does not have")
            sources = [source.replace(old, new) for source in sources]
        for path, source in zip(paths, sources, strict=True):
            tree = ast.fix_missing_locations(_Plain().visit(ast.parse(source)))
            exec(compile(tree, str(path), "exec"), self.names)

    def launch(self, kernel: str, grid: int, *arguments: Any) -> None:
        """Run the programs of a grid one after another, in a random order."""
        self.grid = grid
        programs = list(range(grid))
        self.random.shuffle(programs)
        for program in programs:
            self.machine, self.program = Machine(self.random.random()), program
            self.names[kernel](*arguments)

    def _language(self) -> dict[str, Any]:
        language = types.SimpleNamespace(
            constexpr=lambda value: value,
            int64=torch.int64,
            int32=torch.int32,
            float32=torch.float32,
            program_id=lambda axis: torch.tensor(self.program),
            num_programs=lambda axis: self.grid,
            static_range=range,
            load=self._load,
            store=self._store,
            atomic_add=self._atomic_add,
            minimum=lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)),
            maximum=lambda a, b: torch.maximum(torch.as_tensor(a), torch.as_tensor(b)),
            max=lambda x, axis: x.max(axis).values,
            sum=lambda x, axis: x.sum(axis),
            exp2=torch.exp2,
            log2=torch.log2,
            where=torch.where,
            arange=lambda start, end, layout: torch.arange(start, end, dtype=torch.int32),
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
            full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
            convert_layout=lambda x, layout: x,
            SliceLayout=lambda *_: None,
            DotOperandLayout=lambda *_: None,
            NVMMADistributedLayout=lambda *_: None,
            NVMMASharedLayout=types.SimpleNamespace(get_default_for=lambda *_: None),
            BlockedLayout=lambda *_: None,
            SwizzledSharedLayout=lambda *_: None,
            allocate_shared_memory=self._allocate,
            warp_specialize=lambda work, warps, registers: self.machine.run(work),
        )
        barriers = types.SimpleNamespace(
            MBarrierLayout=lambda: "barrier",
            init=lambda barrier, count: barrier.initialise(count),
            arrive=self._arrive,
            expect=lambda barrier, size: barrier.arrive(1, expected_bytes=size),
            wait=self._wait,
        )
        return {
            "gl": language,
            "mbarrier": barriers,
            "fence_async_shared": self._fence,
            "warpgroup_mma": self._product,
            "warpgroup_mma_wait": self._wait_for_products,
            "tma_load": self._tma_load,
            "tma_store": lambda *arguments: self._tma_store(*arguments, add=False),
            "tma_add": lambda *arguments: self._tma_store(*arguments, add=True),
            "tma_store_wait": self._tma_store_wait,
            "_floor_divide": lambda a, b: _unlike_triton(a, b) or a // b,
            "_modulo": lambda a, b: _unlike_triton(a, b) or a % b,
            "range": lambda *bounds: builtins.range(*(int(bound) for bound in bounds)),
        }

    def _allocate(
        self, dtype: torch.dtype, shape: Sequence[int], layout: object, value: Tensor | None = None
    ) -> Any:
        if layout == "barrier":
            return Barriers(self.machine, shape[0])
        pieces = [Piece(self.machine) for _ in range(2 * shape[0])]
        filled = torch.zeros(list(shape), dtype=dtype)
        filled = filled.fill_(float("nan")) if value is None and dtype.is_floating_point else filled
        return Shared(self.machine, pieces, filled if value is None else value.to(dtype))

    def _load(self, pointer: Pointer, mask: Tensor | None = None, other: float = 0.0) -> Tensor:
        places, mask = pointer.places(mask)
        values = pointer.tensor.flatten()[torch.where(mask, places, 0)]
        return torch.where(mask, values, torch.full_like(values, other))

    def _store(self, pointer: Pointer, values: Tensor, mask: Tensor | None = None) -> None:
        places, mask = pointer.places(mask)
        pointer.tensor.view(-1)[places[mask]] = values[mask].to(pointer.tensor.dtype)

    def _atomic_add(self, pointer: Pointer, value: int, sem: str) -> Tensor:
        before = self._load(pointer)
        self._store(pointer, before + value)
        return before

    def _fence(self) -> None:
        machine = self.machine
        machine.unfenced = [(by, thing) for by, thing in machine.unfenced if by is not machine.current]

    def _arrive(self, barrier: Barrier, count: int = 1) -> None:
        barrier.arrive(count)
        self.machine.pause()

    def _wait(self, barrier: Barrier, parity: int) -> None:
        barrier.check()
        self.machine.pause(lambda: barrier.has_passed(int(parity)))

    def _product(
        self, a: Tensor | Shared, b: Shared, accumulator: Tensor, use_acc: bool = True, is_async: bool = False
    ) -> Product | Tensor:
        product = Product(a, b, accumulator if use_acc else torch.zeros_like(accumulator))
        self.machine.current.products.append(product)
        self.machine.pause()
        return product if is_async else self._wait_for_products(0, (product,))

    def _wait_for_products(self, outstanding: int, deps: Sequence[Product]) -> Any:
        self.machine.pause()
        queue = self.machine.current.products
        while len(queue) > outstanding:
            queue.pop(0).finish()
        if any(product.result is None for product in deps):
            raise Fault("race: a product is used while it may still be in flight")
        results = tuple(product.result for product in deps)
        return results[0] if len(results) == 1 else results

    def _tma_load(
        self, descriptor: Descriptor, coordinates: Sequence[int], barrier: Barrier, shared: Shared
    ) -> None:
        for piece in shared.pieces:
            piece.check_write("a TMA load")
        barrier.check()
        shared.values.fill_(float("nan"))
        window, part = descriptor.window(coordinates)

        def finish() -> None:
            block = shared.values.view(descriptor.block_shape)
            block.zero_()
            block[part] = window
            for piece in shared.pieces:
                piece.writer = None
            barrier.arrive(0, written_bytes=descriptor.block_type.nbytes)

        copy = self.machine.start_copy(finish)
        for piece in shared.pieces:
            piece.writer = copy
        self.machine.pause()

    def _tma_store(
        self, descriptor: Descriptor, coordinates: Sequence[int], shared: Shared, add: bool
    ) -> None:
        for piece in shared.pieces:
            piece.check_read("a TMA store")
        window, part = descriptor.window(coordinates)

        def finish() -> None:
            block = shared.values.reshape(descriptor.block_shape)[part]
            window.copy_(window + block if add else block)
            for piece in shared.pieces:
                piece.readers.remove(copy)

        copy = self.machine.start_copy(finish)
        for piece in shared.pieces:
            piece.readers.append(copy)
        self.machine.current.stores.append(copy)
        self.machine.pause()

    def _tma_store_wait(self, outstanding: int) -> None:
        machine, stores = self.machine, self.machine.current.stores
        # Stores are in one group each, and groups are waited for in order.
        waited = stores[: len(stores) - outstanding]
        machine.pause(lambda: not any(store in machine.copies for store in waited))


class SimulatedKernel:
    """Stands for a compiled kernel where it is launched: host code runs as it is, the kernel in the simulator."""

    def __init__(self, simulator: Simulator, name: str, options: Iterable[str]) -> None:
        self.simulator, self.name, self.options = simulator, name, set(options)

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*arguments: Any, **named: Any) -> None:
            constants = [value for name, value in named.items() if name not in self.options]
            simulated = [self._simulated(argument) for argument in (*arguments, *constants)]
            self.simulator.launch(self.name, *grid, *simulated)

        return launch

    def _simulated(self, argument: Any) -> Any:
        if isinstance(argument, Tensor):
            axes = zip(argument.shape, argument.stride(), strict=True)
            extent = 1 + sum((size - 1) * stride for size, stride in axes)
            return Pointer(argument.as_strided((extent,), (1,)))
        if hasattr(argument, "block_shape"):
            base = argument.base
            tensor = torch.as_strided(base, argument.shape, argument.strides, base.storage_offset())
            return Descriptor(tensor, argument.block_shape)
        return argument
