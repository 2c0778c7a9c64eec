"""Streamed answers as server-sent events, and clients that go away."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from transfusion.errors import UserError
from transfusion.serve.errors import ApiError, EngineFailedError, error_body
from transfusion.serve.metrics import Metrics
from transfusion.serve.worker import Answers

# Seconds between comments that keep a connection alive while nothing else is told.
_HEARTBEAT = 10.0


def sse(data: Any, event: str = "") -> bytes:
    """One server-sent event. data: anything for JSON, or a text as it is."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    name = f"event: {event}\n" if event else ""
    return f"{name}data: {text}\n\n".encode("utf-8", "replace")


@contextlib.asynccontextmanager
async def watched(answers: Answers, receive: Receive) -> AsyncIterator[None]:
    """Ends the answers as soon as their client goes away, and whatever happens inside."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        answers.is_left = True
        answers.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        answers.cancel()


class EventStream(Response):
    """Sends pieces of an answer as they come.

    Args:
        answers: What the pieces are made of.
        pieces: Server-sent events.
        metrics: Of the server.
    """

    media_type = "text/event-stream"

    def __init__(self, answers: Answers, pieces: AsyncIterator[bytes], metrics: Metrics) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        # Of an empty body.
        del self.headers["content-length"]
        self._answers, self._pieces, self._metrics = answers, pieces, metrics
        self._begun = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with watched(self._answers, receive):
            await send(
                {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            )
            first = True
            async for piece in _with_heartbeat(_with_errors(self._pieces)):
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                if first:
                    self._metrics.first_byte.observe(time.monotonic() - self._begun)
                first = False
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _with_errors(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """What goes wrong after the first byte, as a last event."""
    try:
        async for piece in pieces:
            yield piece
    except ApiError as error:
        yield sse(error.body(), "error")
    except UserError as error:
        yield sse(error_body(str(error), "invalid_request_error"), "error")
    except Exception:
        yield sse(EngineFailedError().body(), "error")
        raise


async def _with_heartbeat(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The pieces, and comments while there is none."""
    iterator = aiter(pieces)
    following: asyncio.Future[bytes] | None = None
    try:
        while True:
            following = asyncio.ensure_future(anext(iterator))
            while not (await asyncio.wait({following}, timeout=_HEARTBEAT))[0]:
                yield b":\n\n"
            try:
                yield following.result()
            except StopAsyncIteration:
                return
    finally:
        if following is not None:
            following.cancel()
