"""The application: which path leads where, and what is told of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.staticfiles import StaticFiles

from transfusion import __version__
from transfusion.config import ModalityConfig
from transfusion.errors import UserError, shown
from transfusion.serve.endpoints import chat, images, native
from transfusion.serve.endpoints.context import Context
from transfusion.serve.endpoints.media import size_name
from transfusion.serve.errors import ApiError, EngineFailedError, UnknownModelError, error_body
from transfusion.serve.metrics import METRICS_TYPE

PAGE = Path(__file__).parents[1] / "page"
# Prompts that the page proposes.
_EXAMPLES = 6
_REFERENCE = "#/components/schemas/{model}"
_CODES = (400, 401, 403, 404, 408, 413, 415, 429, 500, 503)
_GET_CODES = (401, 403, 500)
_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_ERROR_CONTENT = {"application/json": {"schema": {"$ref": _REFERENCE.format(model="Error")}}}


def build_app(context: Context) -> FastAPI:
    """The endpoints of one server. Documentation pages are left out, since they load from foreign hosts."""
    app = FastAPI(
        title="Transfusion", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    _add_posts(app, context)
    _add_gets(app, context)
    _add_errors(app)
    app.mount("/page", StaticFiles(directory=PAGE))
    app.openapi = lambda: _openapi(app, context)  # type: ignore[method-assign]
    return app


def _add_posts(app: FastAPI, context: Context) -> None:
    protocol = context.protocol
    endpoints: dict[
        str, tuple[Callable[[Context, HttpRequest], Awaitable[Response]], type[BaseModel], str]
    ] = {
        "/v1/images/generations": (images.generations, protocol.images, "application/json"),
        "/v1/images/edits": (images.edits, protocol.edits, "multipart/form-data"),
        "/v1/chat/completions": (chat.completions, protocol.chat, "application/json"),
        "/v1/generate": (native.generate, protocol.generate, "application/json"),
        "/v1/inspect": (native.inspect, protocol.inspect, "application/json"),
    }
    for path, (answer, model, kind) in endpoints.items():
        app.add_api_route(
            path,
            _with_context(answer, context),
            methods=["POST"],
            name=answer.__name__,
            response_model=None,
            openapi_extra={
                "requestBody": {
                    "required": True,
                    "content": {kind: {"schema": {"$ref": _REFERENCE.format(model=model.__name__)}}},
                }
            },
        )


def _with_context(
    answer: Callable[[Context, HttpRequest], Awaitable[Response]], context: Context
) -> Callable[[HttpRequest], Awaitable[Response]]:
    async def endpoint(request: HttpRequest) -> Response:
        return await answer(context, request)

    endpoint.__doc__ = answer.__doc__
    return endpoint


def _add_gets(app: FastAPI, context: Context) -> None:
    about = {"id": context.name, "object": "model", "created": context.created, "owned_by": "transfusion"}

    @app.get("/v1/models", response_model=None)
    async def models() -> Response:
        """The one model that is served."""
        return JSONResponse({"object": "list", "data": [about]})

    @app.get("/v1/models/{name:path}", response_model=None)
    async def model(name: str) -> Response:
        """What is told of a model."""
        if name != context.name:
            raise UnknownModelError(f"the model {shown(name)} is not served here; this is {context.name}")
        return JSONResponse(about)

    @app.get("/", include_in_schema=False, response_model=None)
    async def page() -> Response:
        """For people."""
        return FileResponse(PAGE / "index.html", headers={"Cache-Control": "no-cache"})

    described = _describe(context)

    @app.get("/v1/schema", response_model=None)
    async def schema() -> Response:
        """What this model and this server allow."""
        return JSONResponse(described)

    @app.get("/healthz", response_model=None)
    async def healthz() -> Response:
        """200 while the server can answer anything. Else it should be started again."""
        return JSONResponse({"status": "broken" if context.worker.is_broken else "ok"}, _alive(context))

    @app.get("/readyz", response_model=None)
    async def readyz() -> Response:
        """200 while new requests are taken."""
        if context.worker.is_stopping:
            return JSONResponse({"status": "stopping"}, 503)
        return JSONResponse({"status": "ready" if context.worker.has_room() else "full"}, _ready(context))

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(context.metrics.text(), media_type=METRICS_TYPE)


def _alive(context: Context) -> int:
    return 503 if context.worker.is_broken else 200


def _ready(context: Context) -> int:
    return _alive(context) if context.worker.has_room() else 503


def _describe(context: Context) -> dict[str, Any]:
    config, protocol = context.pipeline.config, context.protocol
    return {
        "model": context.name,
        "version": __version__,
        "sizes": [size_name(size) for size in context.sizes],
        "channels": config.codec.channels,
        "sequence_length": config.data.sequence_length,
        "has_guidance": config.data.caption_dropout > 0,
        "has_previews": context.has_previews,
        "examples": list(dict.fromkeys(prompt for prompt in config.sample_grid.prompts if prompt))[
            :_EXAMPLES
        ],
        "limits": asdict(context.limits),
        "bodies": {body.__name__: body.model_json_schema() for body in protocol.bodies},
        **({"modalities": [_modality(each) for each in config.modalities]} if config.modalities else {}),
    }


def _modality(modality: ModalityConfig) -> dict[str, Any]:
    return {
        "name": modality.name,
        "kind": modality.kind,
        "channels": modality.channels,
        "shapes": [size_name(size) for size in modality.sizes.sizes],
    }


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(_: HttpRequest, error: ApiError) -> Response:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(UserError)
    async def user_error(_: HttpRequest, error: UserError) -> Response:
        return JSONResponse(error_body(str(error), ApiError.kind), 400)

    @app.exception_handler(HTTPException)
    async def no_route(request: HttpRequest, error: HTTPException) -> Response:
        said = (
            f"{request.method} {shown(request.url.path)}: {error.detail}; GET /v1/schema tells what there is"
        )
        return JSONResponse(error_body(said, ApiError.kind), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def bug(_: HttpRequest, __: Exception) -> Response:
        return JSONResponse(EngineFailedError().body(), 500)


def _openapi(app: FastAPI, context: Context) -> dict[str, Any]:
    """The description of the endpoints. FastAPI knows neither the bodies, which depend on the model, nor the errors."""
    found = get_openapi(title=app.title, version=app.version, routes=app.routes)
    protocol = context.protocol
    _, schemas = models_json_schema(
        [(body, "validation") for body in protocol.bodies], ref_template=_REFERENCE
    )
    for body in protocol.with_nulls:
        fields, required = (
            schemas["$defs"][body.__name__].get(key, {}) for key in ("properties", "required")
        )
        for name in set(fields) - set(required):
            if "anyOf" not in fields[name]:
                fields[name] = {"anyOf": [fields[name], {"type": "null"}]}
    edits = schemas["$defs"][protocol.edits.__name__]
    edits["properties"]["image"] = {
        "type": "array",
        "items": {"type": "string", "format": "binary"},
        "minItems": 1,
        "maxItems": context.limits.prompt_images,
    }
    edits["required"] = [*edits["required"], "image"]
    # No field of a form is null.
    for field in edits["properties"].values():
        if "anyOf" in field:
            field.update(next(kind for kind in field.pop("anyOf") if kind != {"type": "null"}))
            field.pop("default", None)
    found["components"] = {"schemas": {**schemas["$defs"], "Error": _ERROR_SCHEMA}}
    for path, methods in found["paths"].items():
        for method, operation in methods.items():
            responses = {"200": {"description": "the answer", "content": _content(path, method)}}
            for code in _CODES if method == "post" else (*_GET_CODES, *((404,) if "{" in path else ())):
                responses[str(code)] = {
                    "description": "what is wrong, in OpenAI's shape",
                    "content": _ERROR_CONTENT,
                }
            if path in ("/healthz", "/readyz"):
                responses["503"] = {"description": "not so", "content": _content(path, method)}
            operation["responses"] = responses
    return found


def _content(path: str, method: str) -> dict[str, Any]:
    if path == "/metrics":
        return {"text/plain": {"schema": {"type": "string"}}}
    whole = {"application/json": {"schema": {"type": "object"}}}
    # The schema is that of the data of one event.
    events = {"text/event-stream": {"schema": {"type": "object"}}}
    if method != "post" or path == "/v1/inspect":
        return whole
    return events if path == "/v1/generate" else {**whole, **events}
