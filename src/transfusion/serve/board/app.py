"""The endpoints of the board, and its start. Everything is read, nothing written."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from transfusion.errors import UserError, shown
from transfusion.observe.console import start_logging
from transfusion.serve.board.folders import Run, Runs, differences
from transfusion.serve.connection import PlainServer, address, bind
from transfusion.serve.errors import ApiError, EngineFailedError, error_body
from transfusion.serve.guard import Guard, read_token

logger = logging.getLogger(__name__)
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_PAGE = "board.html"
# That answers under way have when the board is told to stop.
_GRACE_SECONDS = 2
_MAX_COMPARED, _MAX_DIGITS = 64, 16


class UnknownRunError(ApiError):
    """The run is not in the list, or no longer."""

    status, code = 404, "run_not_found"


class NoGridError(ApiError):
    """The run has no sample grid of a step."""

    status, code = 404, "grid_not_found"


class _Json(Response):
    """JSON in ASCII, which holds any name and any line of a log."""

    media_type = "application/json"

    def __init__(self, content: Any, status_code: int = 200, headers: dict[str, str] | None = None) -> None:
        super().__init__(content, status_code, {"Cache-Control": "no-store", **(headers or {})})

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def board(runs: Path, *, host: str, port: int, token_file: Path | None) -> None:
    """Show the runs of a folder until the process is told to stop.

    Raises:
        UserError: For a folder that is not there, an address that cannot be had, or a missing or weak token.
    """
    start_logging(None)
    if not runs.is_dir():
        raise UserError(
            f"there is no folder {shown(runs)}; name that of a run or of several, such as runs, or make one with"
            " `transfusion train configs/train/quickstart.yaml`"
        )
    token = read_token(host, token_file)
    listener = bind(host, port)
    try:
        logger.info("the board of %s is at %s", shown(runs), address(listener))
        PlainServer(Guard(build_app(Runs(runs)), token), _GRACE_SECONDS).run([listener])
    finally:
        listener.close()


def build_app(runs: Runs) -> Starlette:
    """The page and what it asks for. Names of runs are looked up in the list of those that were found."""
    pages = {
        path.name: (path.read_bytes(), _TYPES[path.suffix])
        for path in Path(__file__).parent.iterdir()
        if path.suffix in _TYPES
    }

    def page(request: Request) -> Response:
        name = request.path_params.get("name", _PAGE)
        if name not in pages:
            raise HTTPException(404)
        content, kind = pages[name]
        return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})

    def listed(_: Request) -> Response:
        return _Json(runs.summary())

    def series(request: Request) -> Response:
        query = request.query_params
        return _Json(_run(runs, request).series(query.getlist("name"), query.get("cursor", "")))

    def samples(request: Request) -> Response:
        return _Json(_run(runs, request).grids())

    def sample(request: Request) -> Response:
        run, step = _run(runs, request), request.path_params["step"]
        image = run.grid(int(step)) if step.isdecimal() and len(step) < _MAX_DIGITS else None
        if image is None:
            raise NoGridError(f"{run.name} has no sample grid of step {shown(step)}, or no longer")
        return Response(image, media_type="image/png", headers={"Cache-Control": "no-store"})

    def log(request: Request) -> Response:
        return _Json(_run(runs, request).log(request.query_params.get("cursor", "")))

    def compared(request: Request) -> Response:
        names = request.query_params.getlist("run")[:_MAX_COMPARED]
        return _Json(differences([_named(runs, name) for name in names]))

    def healthy(_: Request) -> Response:
        return _Json({"status": "ok"})

    return Starlette(
        routes=[
            Route("/", page),
            Route("/page/{name}", page),
            Route("/healthz", healthy),
            Route("/api/runs", listed),
            Route("/api/series", series),
            Route("/api/samples", samples),
            Route("/api/samples/{step}", sample),
            Route("/api/log", log),
            Route("/api/differences", compared),
        ],
        exception_handlers={ApiError: _refused, HTTPException: _no_route, Exception: _bug},
    )


def _run(runs: Runs, request: Request) -> Run:
    return _named(runs, request.query_params.get("run", ""))


def _named(runs: Runs, name: str) -> Run:
    try:
        return runs[name]
    except KeyError:
        raise UnknownRunError(f"there is no run {shown(name)} here, or no longer") from None


def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _Json(error.body(), error.status, error.headers)


def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = f"{request.method} {shown(request.url.path)}: {error.detail}; the page is at /"
    return _Json(error_body(said, ApiError.kind), error.status_code)


def _bug(_: Request, __: Exception) -> Response:
    return _Json(EngineFailedError().body(), 500)
