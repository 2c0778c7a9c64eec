"""What stands before every endpoint: who may call, how much may be sent, and what is told to browsers and the log."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from transfusion.errors import UserError, shown
from transfusion.serve.errors import (
    ApiError,
    ForeignOriginError,
    NoSuchPathError,
    OverloadedError,
    SlowBodyError,
    TokenError,
    TooLargeError,
)

# What guards a page alone needs no torch.
if TYPE_CHECKING:
    from transfusion.serve.limits import Limits
    from transfusion.serve.metrics import Metrics
    from transfusion.serve.worker import Worker

logger = logging.getLogger(__name__)
# Everything else needs the token, where there is one.
_OPEN = ("/healthz", "/readyz", "/")
# Asked for again and again by those that watch.
_UNTOLD = ("/healthz", "/readyz", "/metrics")
_LEAST_TOKEN = 16
LOOPBACK = ("localhost", "127.0.0.1", "::1")
# A page of this server loads from it alone, and nobody else shows it in a frame.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:;"
    " media-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


def read_token(host: str, token_file: Path | None) -> str | None:
    """The token that clients must send, None where only this machine can call.

    Raises:
        UserError: For a file that cannot be read, a token that is easily guessed, or none where one is needed.
    """
    if token_file is None:
        if host not in LOOPBACK:
            raise UserError(
                f"--host {host} can be reached from other machines, and then a token is needed: write one"
                " into a file (`openssl rand -hex 32 > token`), and give --token-file"
            )
        return None
    try:
        token = token_file.read_text(encoding="ascii").strip()
    except OSError as error:
        raise UserError(f"cannot read {token_file}: {error.strerror}") from None
    except UnicodeDecodeError:
        token = ""
    if len(token) < _LEAST_TOKEN or not token.isprintable() or " " in token:
        raise UserError(
            f"{token_file} must hold a token of at least {_LEAST_TOKEN} ASCII letters and digits;"
            " make one with `openssl rand -hex 32`"
        )
    return token


class Guard:
    """Lets callers pass or not, and tells browsers how to treat what they get. An ASGI application around another.

    Args:
        app: The one inside.
        token: That every request needs, but for those that look after the server's health, and the page, which asks
            for it. None: none does.
        hosts: Names under which a server without a token may be called, so that no page elsewhere reaches it under a
            name of its own.
    """

    def __init__(self, app: ASGIApp, token: str | None = None, hosts: Iterable[str] = LOOPBACK) -> None:
        self._app, self._hosts = app, frozenset(hosts)
        self._token = None if token is None else token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=message["headers"])
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                message["headers"] = headers.raw
            await send(message)

        try:
            self._check(scope)
        except ApiError as error:
            await refuse(error, scope, receive, send_guarded)
        else:
            await self._app(scope, receive, send_guarded)

    def _check(self, scope: Scope) -> None:
        """Raise ApiError for a caller that may not call."""
        headers, path = Headers(scope=scope), scope["path"]
        host = headers.get("host", "")
        if self._token is None and _name(host) not in self._hosts:
            raise ForeignOriginError(
                f"this server is called localhost, not {shown(_name(host) or 'nothing')}; call it so, or start it"
                " with a token"
            )
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise ForeignOriginError(f"pages of {shown(origin)} may not use this server")
        is_open = path in _OPEN or path.startswith("/page/")
        if self._token is not None and not is_open:
            kind, _, given = headers.get("authorization", "").partition(" ")
            # Takes as long for any wrong token.
            matches = hmac.compare_digest(given.strip().encode("latin-1", "replace"), self._token)
            if kind.lower() != "bearer" or not matches:
                raise TokenError
        if not path.isprintable():
            raise NoSuchPathError(
                f"{shown(path)}: no path has such letters; GET /v1/schema tells what there is"
            )


class BodyReader:
    """Reads bodies whole, within limits, and only where there is room for what they ask.

    Args:
        app: The application inside.
        limits: Of bodies.
        worker: Who must have room.
    """

    def __init__(self, app: ASGIApp, limits: Limits, worker: Worker) -> None:
        self._app, self._limits, self._worker = app, limits, worker
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        body = bytearray()
        try:
            again = await self._read(receive, Headers(scope=scope), body)
        except ApiError as error:
            await refuse(error, scope, receive, send)
        else:
            await self._app(scope, again, send)
        finally:
            self._held -= len(body)

    async def _read(self, receive: Receive, headers: Headers, body: bytearray) -> Receive:
        """Fill the body. Gives what tells it again."""
        if not self._worker.has_room():
            raise OverloadedError(self._worker.retry_after)
        most, seconds = self._limits.body_bytes, self._limits.body_seconds
        too_large = TooLargeError(f"the body is over {most:,} bytes; send less")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > most:
            raise too_large
        more = True
        try:
            async with asyncio.timeout(seconds):
                while more:
                    message = await self._worker.unless_stopping(receive())
                    piece = message.get("body", b"")
                    body += piece
                    self._held += len(piece)
                    if len(body) > most:
                        raise too_large
                    if self._held > self._limits.held_bytes:
                        raise OverloadedError(self._worker.retry_after)
                    more = message.get("more_body", False)
        except TimeoutError:
            raise SlowBodyError(f"the body did not arrive within {seconds:g} s; try again") from None
        whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def again() -> Message:
            return whole.pop() if whole else await receive()

        return again


class Observer:
    """Counts requests and writes a line for each, without what they hold.

    Args:
        app: The application inside.
        metrics: Of the server.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin, status = time.monotonic(), 0

        async def send_observed(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, receive, send_observed)
        except asyncio.CancelledError:
            # The server ends, and this client did not read in time. Nothing is left to be told.
            status = 499
        finally:
            seconds = time.monotonic() - begin
            # The pattern, so that no caller makes new names of metrics.
            route = getattr(scope.get("route"), "path", "none")
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.seconds.labels(route).observe(seconds)
            if route not in _UNTOLD:
                logger.info("%s %s %d %.2f s", scope["method"], shown(scope["path"]), status, seconds)


async def refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with an error."""
    await JSONResponse(error.body(), error.status, error.headers)(scope, receive, send)


def _name(host: str) -> str:
    """Of a Host header, without the port."""
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() and not host.endswith("]") else host
    return name.strip("[]").lower()
