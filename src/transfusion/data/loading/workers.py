"""Where rows are built: in this process, or in stateless worker processes that give the same rows."""

from __future__ import annotations

import collections
import contextlib
import itertools
import mmap
import multiprocessing
import os
import pickle
import queue
import signal
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.reduction import DupFd
from typing import Any, NamedTuple, Protocol

from transfusion.data.images.decode import use_one_thread
from transfusion.data.loading.rows import Row, RowBuilder
from transfusion.data.planning.packing import RowPlan
from transfusion.errors import UserError

# A row that ends this many workers is itself the reason.
_ATTEMPTS = 3


class RowWorkers(Protocol):
    """Takes row plans ahead of time and hands the rows back in the same order."""

    def order(self, plans: Sequence[RowPlan]) -> None:
        """Plans whose rows are wanted after those ordered before."""

    def collect(self) -> list[Row]:
        """Rows of the oldest order."""

    def close(self) -> None:
        """End what was started."""


class LocalWorkers:
    """Builds rows when they are collected, in this process."""

    def __init__(self, builder: RowBuilder) -> None:
        self._builder = builder
        self._orders: collections.deque[Sequence[RowPlan]] = collections.deque()

    def order(self, plans: Sequence[RowPlan]) -> None:
        self._orders.append(plans)

    def collect(self) -> list[Row]:
        return [self._builder.build(plan) for plan in self._orders.popleft()]

    def close(self) -> None:
        self._orders.clear()


class ProcessWorkers:
    """Builds rows in worker processes, one row at a time each; a row whose worker died is built by another.

    One thread a worker hands plans over and takes rows back. Each worker has a pipe and shared memory of its own, so
    that none can hold a lock that the others need when it is killed.
    """

    def __init__(self, builder: RowBuilder, workers: int) -> None:
        self._orders: collections.deque[list[Future[Row]]] = collections.deque()
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers = [_Worker(builder) for _ in range(workers)]
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="rows")

    def order(self, plans: Sequence[RowPlan]) -> None:
        self._orders.append([self._threads.submit(self._build, plan) for plan in plans])

    def collect(self) -> list[Row]:
        return [future.result() for future in self._orders.popleft()]

    def close(self) -> None:
        self._orders.clear()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.stop()

    def _build(self, plan: RowPlan) -> Row:
        worker = self._idle.get()
        try:
            for _ in range(_ATTEMPTS):
                try:
                    return worker.build(plan)
                except (EOFError, OSError):
                    worker.restart()
            raise UserError("loader processes keep dying (out of memory?); lower data.workers or set it to 0")
        finally:
            self._idle.put(worker)


class _SharedBuffer:
    """Memory shared with one worker, for the arrays of one row at a time.

    It has no name that could outlive its processes: with the last of them it is gone, however they end.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        """descriptor: of a buffer that another process made; None makes one."""
        self._descriptor = _anonymous_file() if descriptor is None else descriptor
        self._view: mmap.mmap | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """On the way into a process that is being started, which has another number for our descriptor."""
        return _received, (DupFd(self._descriptor),)

    def write(self, arrays: Sequence[memoryview]) -> list[int]:
        """Put arrays one after another; returns their borders."""
        borders = [0]
        for array in arrays:
            borders.append(borders[-1] + array.nbytes)
        view = self._at_least(borders[-1])
        for (start, end), array in zip(itertools.pairwise(borders), arrays, strict=True):
            view[start:end] = array
        return borders

    def read(self, borders: Sequence[int]) -> list[bytearray]:
        """Copies of what was written: the buffer is free for the next row."""
        view = memoryview(self._at_least(borders[-1]))
        return [bytearray(view[start:end]) for start, end in itertools.pairwise(borders)]

    def close(self) -> None:
        # A view that is still exported is closed with the last of its users.
        self._view = None
        os.close(self._descriptor)

    def _at_least(self, size: int) -> mmap.mmap:
        size = max(size, 1)
        if self._view is None or len(self._view) < size:
            if os.fstat(self._descriptor).st_size < size:
                # In steps, so that rows of about one size do not each grow it.
                os.ftruncate(self._descriptor, -(-size * 5 // 4 // mmap.PAGESIZE) * mmap.PAGESIZE)
            self._view = mmap.mmap(self._descriptor, os.fstat(self._descriptor).st_size)
        return self._view


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("rows")
    with tempfile.TemporaryFile() as stream:
        return os.dup(stream.fileno())


class _Packed(NamedTuple):
    """A row whose arrays stand in the buffer: everything else of it, pickled, and their borders."""

    rest: bytes
    borders: list[int]


class _Worker:
    """One process, our end of its pipe, and the memory that both see."""

    def __init__(self, builder: RowBuilder) -> None:
        self._builder = builder
        self._start()

    def _start(self) -> None:
        # Never fork: this process may hold a CUDA context and running threads.
        context: ForkServerContext | SpawnContext
        if "forkserver" in multiprocessing.get_all_start_methods():
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__])
        else:
            context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._buffer = _SharedBuffer()
        self._process = context.Process(target=_work, args=(theirs, self._buffer, self._builder), daemon=True)
        self._process.start()
        # With our copy of its end closed, its death reads as the end of the pipe.
        theirs.close()

    def build(self, plan: RowPlan) -> Row:
        """Raises EOFError or OSError when the process is gone."""
        self._connection.send(plan)
        answer: _Packed | Exception = self._connection.recv()
        if isinstance(answer, Exception):
            raise RuntimeError("a loader process failed") from answer
        return pickle.loads(answer.rest, buffers=self._buffer.read(answer.borders))

    def restart(self) -> None:
        self.stop()
        self._start()

    def stop(self) -> None:
        self._connection.close()
        self._process.terminate()
        self._process.join()
        self._buffer.close()


def _received(descriptor: Any) -> _SharedBuffer:
    return _SharedBuffer(descriptor.detach())


def _work(connection: Connection, buffer: _SharedBuffer, builder: RowBuilder) -> None:
    """The life of a worker: rows for plans until the trainer closes the pipe, or is gone."""
    # An interrupt is the trainer's to handle; it ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    use_one_thread()
    with contextlib.suppress(EOFError, OSError):
        while True:
            connection.send(_attempt(builder, connection.recv(), buffer))


def _attempt(builder: RowBuilder, plan: RowPlan, buffer: _SharedBuffer) -> _Packed | Exception:
    try:
        arrays: list[pickle.PickleBuffer] = []
        rest = pickle.dumps(builder.build(plan), protocol=5, buffer_callback=arrays.append)
        return _Packed(rest, buffer.write([array.raw() for array in arrays]))
    except Exception as error:
        return error
