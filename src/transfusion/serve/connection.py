"""Listening at an address, and connections: how many there may be, and how long they may say nothing."""

from __future__ import annotations

import asyncio
import resource
import socket
from types import FrameType
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from transfusion.errors import UserError

# Until the head of a request is there, from its first byte or from the beginning of the connection.
HEAD_SECONDS = 10.0
# How often it is seen whether a client has read something of what waits for it.
SWEEP_SECONDS = 30.0
# Connections at a time, as far as the system allows so many files. Some are kept for everything else.
_MOST_CONNECTIONS, _OTHER_FILES = 2048, 64
# That wait to be accepted, and that are accepted before one more than may be is closed.
_BACKLOG, _ACCEPTED_AT_ONCE = 1024, 16


class Connection(H11Protocol):
    """uvicorn's, which by itself waits for ever for a head that does not come."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._head_timer: asyncio.TimerHandle | None = None
        self._sweeper: asyncio.TimerHandle | None = None
        self._opened, self._unsent, self._is_aborted = self.loop.time(), 0, False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection. Where there are as many as may be, the one that has said nothing for longest ends."""
        super().connection_made(transport)
        self._watch_head()
        self._sweeper = self.loop.call_later(SWEEP_SECONDS, self._sweep)
        # Those that are aborted are still among them until the loop turns.
        there = [each for each in self.connections if isinstance(each, Connection) and not each._is_aborted]
        if len(there) > most_connections():
            min(there, key=lambda each: (each._is_busy, each._opened))._abort()

    def data_received(self, data: bytes) -> None:
        """Take some bytes."""
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_watching()
        if self._sweeper is not None:
            self._sweeper.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, if nothing was answered yet. uvicorn would fail at that."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()

    def _abort(self) -> None:
        self._is_aborted = True
        self.transport.abort()

    def _sweep(self) -> None:
        """End a connection whose client reads nothing of what waits for it, be it closed or not."""
        unsent = self.transport.get_write_buffer_size()
        if unsent and unsent == self._unsent:
            self._abort()
        else:
            self._unsent = unsent
            self._sweeper = self.loop.call_later(SWEEP_SECONDS, self._sweep)

    @property
    def _is_busy(self) -> bool:
        return not (self._awaits_head or self.transport.is_closing())

    @property
    def _awaits_head(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _watch_head(self) -> None:
        if not self._awaits_head:
            self._stop_watching()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self._close_if_still_waiting)

    def _stop_watching(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _close_if_still_waiting(self) -> None:
        self._head_timer = None
        if self._awaits_head:
            self.transport.close()


def most_connections() -> int:
    """How many connections there may be at a time."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(1, min(_MOST_CONNECTIONS, files - _OTHER_FILES))


def bind(host: str, port: int) -> socket.socket:
    """A socket at this address that does not listen yet."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"cannot listen on {host} port {port}: {reason}; choose another --port") from None
    return listener


def address(listener: socket.socket) -> str:
    """The URL of what listens there."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class PlainServer(uvicorn.Server):
    """Serves an application, and leaves with 0 when it is told to stop.

    Args:
        app: What it serves.
        seconds: That answers under way have to end when it is told to stop.
    """

    def __init__(self, app: ASGIApp, seconds: int) -> None:
        config = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            backlog=_ACCEPTED_AT_ONCE,
            timeout_graceful_shutdown=seconds,
        )
        super().__init__(config)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop as told, at once when told again, and leave with 0. uvicorn would raise the signal once more."""
        self.force_exit = self.should_exit
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer."""
        await super().startup(sockets)
        for listener in sockets or []:
            # asyncio has set it to the few that it accepts at once.
            listener.listen(_BACKLOG)
