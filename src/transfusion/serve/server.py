"""`transfusion serve`: from a model folder to a server, and to its end."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path

from transfusion.errors import UserError
from transfusion.generate import Pipeline
from transfusion.generate.load import Dtype, Weights
from transfusion.observe.console import start_logging
from transfusion.serve.connection import PlainServer, address, bind
from transfusion.serve.endpoints.app import build_app
from transfusion.serve.endpoints.context import Context
from transfusion.serve.endpoints.media import MediaReader
from transfusion.serve.endpoints.protocol import Protocol
from transfusion.serve.guard import BodyReader, Guard, Observer, read_token
from transfusion.serve.limits import Limits
from transfusion.serve.memory import cache_pages
from transfusion.serve.metrics import Metrics
from transfusion.serve.worker import Worker

logger = logging.getLogger(__name__)
# A tick reads about so many positions of prompts, so that a long prompt does not halt the answers under way.
_PROMPT_POSITIONS = 512


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
    token = read_token(settings.host, settings.token_file)
    # Before the model is loaded, so that a port in use is told at once. Nobody is let in until it is.
    listener = bind(settings.host, settings.port)
    try:
        pipeline = Pipeline.from_export(model, weights=weights, device=device, dtype=dtype)
        context = build_context(pipeline, settings.name or _name_of(model), settings)
        # So that whoever reads the line can connect.
        listener.listen()
        logger.info("%s is served at %s", context.name, address(listener))
        Server(context, token, settings.grace).run([listener])
        if context.worker.is_broken:
            raise UserError(
                "the engine failed again and again, as the log above tells; start the server again"
            )
    finally:
        listener.close()


def _name_of(model: Path) -> str:
    """That of its folder, or of the run whose folder `export` it is."""
    folder = model.resolve()
    return folder.parent.name if folder.name == "export" else folder.name


def build_context(pipeline: Pipeline, name: str, settings: ServeSettings) -> Context:
    """What the endpoints of a server share."""
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
        media=MediaReader(pipeline.config),
        logs_prompts=settings.logs_prompts,
    )


class Server(PlainServer):
    """Lets answers under way end when it is told to stop.

    Args:
        context: What it serves.
        token: That clients must send, if they must.
        grace: Seconds that answers have to end.
    """

    def __init__(self, context: Context, token: str | None, grace: float) -> None:
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
        if not self.force_exit:
            await stopping

    async def on_tick(self, counter: int) -> bool:
        """End where nothing can be answered any more, so that whoever looks after the server starts it again."""
        return await super().on_tick(counter) or self._worker.is_broken
