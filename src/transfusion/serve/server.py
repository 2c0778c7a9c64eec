"""`transfusion serve`: from a model folder to a server, and to its end.

torch is imported when a model is, since `transfusion board` listens by this module too and needs none.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from starlette.types import ASGIApp

from transfusion.errors import UserError
from transfusion.observe.console import start_logging
from transfusion.serve.guard import LOOPBACK, BodyReader, Guard, Observer
from transfusion.serve.limits import Limits

if TYPE_CHECKING:
    from transfusion.generate import Pipeline
    from transfusion.generate.load import Dtype, Weights
    from transfusion.serve.context import Context

logger = logging.getLogger(__name__)
# A tick reads about so many positions of prompts, so that a long prompt does not halt the answers under way.
_PROMPT_POSITIONS = 512
_BACKLOG = 1024
_LEAST_TOKEN = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """How a model is served.

    Attributes:
        host: Address to listen on. Beyond this machine it needs a token.
        port: To listen on. 0: any that is free.
        name: Of the model, as clients name it. Empty: that of its folder.
        token_file: A file with the token.
        grace: Seconds that answers under way have to end when the server is told to stop.
        cache_gb: Memory for keys and values. None: what `cache_pages` finds fit.
        logs_prompts: Whether prompts may stand in the log.
        limits: Of requests.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    name: str = ""
    token_file: Path | None = None
    grace: float = 30.0
    cache_gb: float | None = None
    logs_prompts: bool = False
    limits: Limits = field(default_factory=Limits)


def serve(
    model: Path,
    settings: ServeSettings,
    *,
    weights: Weights = "auto",
    device: str = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Serve a model until the process is told to stop.

    Raises:
        UserError: For an address that cannot be had, a missing or weak token, or a model that cannot be opened.
    """
    start_logging(None)
    token = read_token(settings)
    # Before the model is loaded, so that a port in use is told at once. Nobody is let in until it is.
    listener = bind(settings.host, settings.port)
    try:
        from transfusion.generate import Pipeline

        pipeline = Pipeline.from_export(model, weights=weights, device=device, dtype=dtype)
        context = build_context(pipeline, settings.name or _name_of(model), settings)
        logger.info("%s is served at %s", context.name, address(listener))
        Server(context, token, settings.grace).run([listener])
    finally:
        listener.close()


def _name_of(model: Path) -> str:
    """That of its folder, or of the run whose folder `export` it is."""
    folder = model.resolve()
    return folder.parent.name if folder.name == "export" else folder.name


def build_context(pipeline: Pipeline, name: str, settings: ServeSettings) -> Context:
    """What the endpoints of a server share."""
    from transfusion.serve.context import Context
    from transfusion.serve.media import ImageReader
    from transfusion.serve.memory import cache_pages
    from transfusion.serve.metrics import Metrics
    from transfusion.serve.protocol import Protocol
    from transfusion.serve.worker import Worker

    limits, metrics = settings.limits, Metrics()
    pages = cache_pages(pipeline, limits.running, settings.cache_gb)
    worker = Worker(
        lambda: pipeline.engine(
            pages=pages, most_requests=limits.running, prompt_positions=_PROMPT_POSITIONS
        ),
        limits.answers,
        metrics,
    )
    return Context(
        pipeline=pipeline,
        name=name,
        created=int(time.time()),
        limits=limits,
        protocol=Protocol.of(pipeline.config, limits),
        worker=worker,
        metrics=metrics,
        images=ImageReader(pipeline.config, limits),
        logs_prompts=settings.logs_prompts,
    )


def read_token(settings: ServeSettings) -> str | None:
    """The token that clients must send, None where only this machine can call.

    Raises:
        UserError: For a file that cannot be read, a token that is easily guessed, or none where one is needed.
    """
    if settings.token_file is None:
        if settings.host not in LOOPBACK:
            raise UserError(
                f"--host {settings.host} can be reached from other machines, and then a token is needed: write one"
                " into a file (`openssl rand -hex 32 > token`), and give --token-file"
            )
        return None
    try:
        token = settings.token_file.read_text(encoding="ascii").strip()
    except OSError as error:
        raise UserError(f"cannot read {settings.token_file}: {error.strerror}") from None
    except UnicodeDecodeError:
        token = ""
    if len(token) < _LEAST_TOKEN or not token.isprintable() or " " in token:
        raise UserError(
            f"{settings.token_file} must hold a token of at least {_LEAST_TOKEN} ASCII letters and digits;"
            " make one with `openssl rand -hex 32`"
        )
    return token


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
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            backlog=_BACKLOG,
            timeout_graceful_shutdown=seconds,
        )
        super().__init__(config)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop as told, and leave with 0. uvicorn would raise the signal once more at the end."""
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


class Server(PlainServer):
    """Lets answers under way end when it is told to stop.

    Args:
        context: What it serves.
        token: That clients must send, if they must.
        grace: Seconds that answers have to end.
    """

    def __init__(self, context: Context, token: str | None, grace: float) -> None:
        from transfusion.serve.app import build_app

        inside = BodyReader(build_app(context), context.limits, context.worker)
        # uvicorn's own deadline is behind that of the answers.
        super().__init__(Observer(Guard(inside, token), context.metrics), int(grace) + 15)
        self._worker, self._grace = context.worker, grace

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer."""
        self._worker.start(asyncio.get_running_loop())
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer nothing new, and end."""
        stopping = asyncio.create_task(self._worker.stop(self._grace))
        await super().shutdown(sockets)
        await stopping
