"""The engine on a thread of its own: requests come from an event loop, and their events go back to it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from transfusion.errors import UserError
from transfusion.generate import Done, Engine, Event, ImagePreview, Request
from transfusion.serve.errors import EngineFailedError, OverloadedError, StoppingError
from transfusion.serve.limits import MAX_PARTIAL_IMAGES
from transfusion.serve.metrics import Metrics

logger = logging.getLogger(__name__)
# After so many failed ticks without a good one between them the server tells that it is broken.
_FAILURES_TOLERATED = 3
Result = TypeVar("Result")
# Of `Worker.call` at a time.
_MOST_CALLS = 8
# Until answers that were ended are handed back.
_LAST_SECONDS = 10.0
# The longest wait that a client is advised.
_MOST_RETRY_SECONDS = 60


@dataclass(slots=True, eq=False)
class _Place:
    """One answer of several that were asked for together.

    Attributes:
        number: What the engine knows it by, once it has the request.
    """

    answers: Answers
    index: int
    request: Request
    number: int | None = None
    begun: float = field(default_factory=time.monotonic)
    has_ended: bool = False


@dataclass(slots=True, eq=False)
class _Told:
    """An event of one of the answers to a client, or the error that ended it.

    previews: how many stood in a row when it came, itself with them.
    """

    index: int
    event: Event | Exception
    previews: int = 0


class Answers:
    """The answers to one client in the making, as the event loop sees them.

    `async for` gives their events with their numbers, from 0. The last event of each is `Done`. A reader that is slow
    misses previews beyond `MAX_PARTIAL_IMAGES` in a row, and nothing else.

    Attributes:
        places: One for each answer.
        is_left: Whether the client has gone.
    """

    def __init__(self, worker: Worker, requests: Sequence[Request]) -> None:
        self.places = [_Place(self, index, request) for index, request in enumerate(requests)]
        self.is_left = False
        self._worker, self._untaken = worker, len(self.places)
        self._events: deque[_Told] = deque()
        # Of each answer, the last event that is not read yet.
        self._latest: dict[int, _Told] = {}
        self._arrived = asyncio.Event()
        self._taken: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def taken(self) -> None:
        """Wait until the engine has all requests. Raises UserError for what it refuses."""
        await self._taken

    def cancel(self, index: int | None = None) -> None:
        """End one answer, or all. Their places are free with the next tick."""
        for place in self.places:
            if index in (None, place.index) and not place.has_ended:
                self._worker.cancel(place)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        left = len(self.places)
        while left:
            while not self._events:
                self._arrived.clear()
                await self._arrived.wait()
            told = self._events.popleft()
            if self._latest.get(told.index) is told:
                del self._latest[told.index]
            if isinstance(told.event, Exception):
                raise told.event
            yield told.index, told.event
            left -= isinstance(told.event, Done)

    def tell(self, place: _Place, event: Event | Exception | None) -> None:
        """Take an event of a place, the error that ended it, or None: the engine has its request."""
        if isinstance(event, Exception) and not self._taken.done():
            self._taken.set_exception(event)
        if event is None:
            self._untaken -= 1
            if self._untaken == 0 and not self._taken.done():
                self._taken.set_result(None)
            return
        unread = self._latest.get(place.index)
        previews = 0
        if isinstance(event, ImagePreview):
            previews = 1 + (unread.previews if unread is not None else 0)
            if unread is not None and previews > MAX_PARTIAL_IMAGES:
                unread.event = event
                return
        self._latest[place.index] = told = _Told(place.index, event, previews)
        self._events.append(told)
        self._arrived.set()


class Worker:
    """Runs an engine for a server. All methods but `start` are called on the event loop.

    Args:
        make_engine: Makes the engine, and makes it again should it fail.
        answers: How many there may be at a time, under way and waiting.
        metrics: Of the server.
    """

    def __init__(self, make_engine: Callable[[], Engine], answers: int, metrics: Metrics) -> None:
        self._make_engine, self._most_answers, self._metrics = make_engine, answers, metrics
        self._engine = make_engine()
        self._commands: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._asked: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        # Of the event loop: answers that have not ended, and calls that wait.
        self._places: set[_Place] = set()
        self._all_ended = asyncio.Event()
        self._stopping = asyncio.Event()
        self._futures: set[asyncio.Future[Any]] = set()
        self._mean_seconds = 1.0
        # Of the thread.
        self._by_number: dict[int, _Place] = {}
        self._failures = 0
        self._has_ended = self._crashed = False
        self.ticks = 0

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the thread. Events go to this loop."""
        self._loop = loop
        self._thread.start()

    @property
    def is_broken(self) -> bool:
        """Whether the engine fails again and again, or its thread has ended."""
        return self._failures >= _FAILURES_TOLERATED or self._crashed

    @property
    def is_stopping(self) -> bool:
        """Whether no more requests are taken."""
        return self._stopping.is_set()

    async def unless_stopping(self, awaitable: Awaitable[Result]) -> Result:
        """Wait for something, but not beyond the end of the server. Raises StoppingError at that."""
        waiting, stopping = asyncio.ensure_future(awaitable), asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait({waiting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if waiting.done():
                return waiting.result()
            raise StoppingError
        finally:
            waiting.cancel()
            stopping.cancel()

    @property
    def retry_after(self) -> int:
        """Seconds after which a place may be free, from how long answers have taken."""
        return max(1, min(_MOST_RETRY_SECONDS, round(self._mean_seconds)))

    def has_room(self, count: int = 1) -> bool:
        """Whether so many answers more can be taken."""
        return len(self._places) + count <= self._most_answers

    async def submit(self, requests: Sequence[Request]) -> Answers:
        """Take requests, all of them or none.

        Raises:
            OverloadedError: Where there is no room for them.
            StoppingError: Where the server is about to end.
            EngineFailedError: Where nothing can be answered any more.
            UserError: For what the engine refuses.
        """
        self._check()
        if not self.has_room(len(requests)):
            raise OverloadedError(self.retry_after)
        answers = Answers(self, requests)
        for place in answers.places:
            self._places.add(place)
            self._commands.put(partial(self._submit, place))
        self._metrics.answers.set(len(self._places))
        try:
            await answers.taken()
        except BaseException:
            answers.cancel()
            raise
        return answers

    def cancel(self, place: _Place) -> None:
        """End an answer before the next tick."""
        self._commands.put(partial(self._cancel, place))

    async def call(self, function: Callable[[], Result]) -> Result:
        """Let the thread do something else between two ticks, since a model on a GPU serves one thread.

        Raises:
            OverloadedError: Where many wait for that already.
            StoppingError: Where the server is about to end.
            Exception: What the function raises.
        """
        self._check()
        if len(self._futures) >= _MOST_CALLS:
            raise OverloadedError(self.retry_after)
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()

        def answer(result: Result | None, error: Exception | None) -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]

        def run() -> None:
            result, failure = None, None
            # Unless nobody waits any more.
            if not future.cancelled():
                try:
                    result = function()
                except Exception as error:
                    failure = error
            self._on_loop(partial(answer, result, failure))

        self._futures.add(future)
        self._asked.put(run)
        # Wakes the thread.
        self._commands.put(lambda: None)
        try:
            return await future
        finally:
            self._futures.discard(future)

    def _check(self) -> None:
        """Raise ApiError where nothing is taken any more."""
        if self.is_stopping:
            raise StoppingError
        if self.is_broken:
            raise EngineFailedError

    async def stop(self, grace: float) -> None:
        """Take no more requests, let those under way end within `grace` seconds, and hand back the rest as it is."""
        self._stopping.set()
        if not await self._ended_within(grace):
            for place in self._places:
                self.cancel(place)
            await self._ended_within(_LAST_SECONDS)
        self._commands.put(self._end)
        self._fail_calls(StoppingError())

    async def _ended_within(self, seconds: float) -> bool:
        """Wait until no answer is left. False: some are."""
        self._all_ended.clear()
        with contextlib.suppress(TimeoutError):
            if self._places:
                await asyncio.wait_for(self._all_ended.wait(), seconds)
        return not self._places

    # On the thread

    def _run(self) -> None:
        try:
            while self._step():
                pass
        except BaseException as error:
            logger.critical("the engine's thread has ended", exc_info=error)
            self._crashed = True
            self._on_loop(self._fail_everything)

    def _step(self) -> bool:
        """One tick. False: stop."""
        try:
            self._take_commands()
            if self._has_ended:
                return False
            begin = time.perf_counter()
            events = self._engine.tick()
            self._metrics.tick.observe(time.perf_counter() - begin)
            self._failures = 0
            self.ticks += 1
            self._tell([(self._by_number[number], event) for number, event in events])
            for number, event in events:
                if isinstance(event, Done):
                    del self._by_number[number]
        except Exception as error:
            self._fail(error)
        return True

    def _take_commands(self) -> None:
        """Do what was asked for since the last tick, and one call. Waits for more while there is nothing to do."""
        while not self._has_ended:
            try:
                self._commands.get(block=self._engine.is_idle and self._asked.empty())()
                continue
            except queue.Empty:
                pass
            # One before each tick, so that answers go on.
            with contextlib.suppress(queue.Empty):
                self._asked.get(block=False)()
            if not self._engine.is_idle:
                return

    def _end(self) -> None:
        self._has_ended = True

    def _submit(self, place: _Place) -> None:
        try:
            place.number = self._engine.submit(place.request)
        except UserError as error:
            self._tell([(place, error)])
        except Exception as error:
            logger.error("a request could not be taken", exc_info=error)
            self._tell([(place, EngineFailedError())])
        else:
            self._by_number[place.number] = place
            self._tell([(place, None)])

    def _cancel(self, place: _Place) -> None:
        # The numbers of an engine that failed are given out anew.
        if place.number is not None and self._by_number.get(place.number) is place:
            self._engine.cancel(place.number)

    def _fail(self, error: Exception) -> None:
        """End all answers with an error, and begin with an engine that knows none of them."""
        logger.error("the engine failed, and %d answers with it", len(self._by_number), exc_info=error)
        self._failures += 1
        self._tell([(place, EngineFailedError()) for place in self._by_number.values()])
        self._by_number.clear()
        # The former cache is let go first, since there may be no room for two.
        del self._engine
        self._engine = self._make_engine()

    def _tell(self, told: list[tuple[_Place, Any]]) -> None:
        if told:
            self._on_loop(partial(self._hand_over, told))

    def _on_loop(self, function: Callable[[], object]) -> None:
        if self._loop is not None:
            # The loop is closed where the server was ended by force.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(function)

    # On the event loop

    def _hand_over(self, told: list[tuple[_Place, Any]]) -> None:
        for place, event in told:
            place.answers.tell(place, event)
            if isinstance(event, Done | Exception):
                place.has_ended = True
                self._places.discard(place)
                self._observe(place, event)
        self._metrics.answers.set(len(self._places))
        if not self._places:
            self._all_ended.set()

    def _fail_everything(self) -> None:
        """Tell all who wait that nothing comes any more."""
        self._hand_over([(place, EngineFailedError()) for place in self._places])
        self._fail_calls(EngineFailedError())

    def _fail_calls(self, error: Exception) -> None:
        for future in self._futures:
            if not future.done():
                future.set_exception(error)

    def _observe(self, place: _Place, event: Done | Exception) -> None:
        seconds = time.monotonic() - place.begun
        self._mean_seconds += (seconds - self._mean_seconds) / 8
        if isinstance(event, Done):
            self._metrics.answered(event)
        elif isinstance(event, EngineFailedError):
            self._metrics.ended.labels("failed").inc()
