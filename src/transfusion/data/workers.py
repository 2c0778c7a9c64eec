"""Where rows are built: in this process, or in stateless worker processes that give the same rows."""

from __future__ import annotations

import collections
import contextlib
import multiprocessing
import queue
import signal
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from typing import Protocol

from transfusion.data.planner import RowPlan
from transfusion.data.rows import Row, RowBuilder
from transfusion.errors import UserError

# A row that ends this many workers is itself the reason.
_ATTEMPTS = 3


class Workshop(Protocol):
    """Takes row plans ahead of time and hands the rows back in the same order."""

    def order(self, plans: Sequence[RowPlan]) -> None:
        """Plans whose rows are wanted after those ordered before."""

    def collect(self) -> list[Row]:
        """Rows of the oldest order."""

    def close(self) -> None:
        """End what was started."""


class LocalWorkshop:
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


class ProcessWorkshop:
    """Builds rows in worker processes, one row at a time each; a row whose worker died is built by another.

    One thread a worker hands plans over and takes rows back. Each worker has a pipe of its own, so that none can
    hold a lock that the others need when it is killed.
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


class _Worker:
    """One process and our end of its pipe."""

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
        self._process = context.Process(target=_work, args=(theirs, self._builder), daemon=True)
        self._process.start()
        # With our copy of its end closed, its death reads as the end of the pipe.
        theirs.close()

    def build(self, plan: RowPlan) -> Row:
        """Raises EOFError or OSError when the process is gone."""
        self._connection.send(plan)
        answer: Row | Exception = self._connection.recv()
        if isinstance(answer, Exception):
            raise RuntimeError("a loader process failed") from answer
        return answer

    def restart(self) -> None:
        self.stop()
        self._start()

    def stop(self) -> None:
        self._connection.close()
        self._process.terminate()
        self._process.join()


def _work(connection: Connection, builder: RowBuilder) -> None:
    """The life of a worker: rows for plans until the trainer closes the pipe, or is gone."""
    # An interrupt is the trainer's to handle; it ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(EOFError, OSError):
        while True:
            connection.send(_attempt(builder, connection.recv()))


def _attempt(builder: RowBuilder, plan: RowPlan) -> Row | Exception:
    try:
        return builder.build(plan)
    except Exception as error:
        return error
