"""/v1/images: images of captions, and images made of others, as OpenAI's clients ask for them."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import anyio.to_thread
from fastapi import Request as HttpRequest
from pydantic import ValidationError
from starlette.responses import JSONResponse, Response
from torch import Tensor

from transfusion.errors import shown
from transfusion.generate import Done, ImageDone, ImagePreview, Prompt, Request
from transfusion.sequence.sizes import Size
from transfusion.serve.endpoints.context import Context, bad_body, new_seed, read_json
from transfusion.serve.endpoints.forms import read_form
from transfusion.serve.endpoints.media import encode, size_name
from transfusion.serve.endpoints.protocol import ImagesBody
from transfusion.serve.endpoints.stream import EventStream, sse, watched
from transfusion.serve.errors import ApiError, ClientGoneError, StoppingError
from transfusion.serve.worker import Answers

_IMAGE_FIELDS = ("image", "image[]")
_MOST_PAIR_LETTERS = 100


async def generations(context: Context, request: HttpRequest) -> Response:
    """POST /v1/images/generations."""
    body = await read_json(context, request, context.protocol.images)
    return await _answer(context, request, body, [body.prompt], None, "image_generation")


async def edits(context: Context, request: HttpRequest) -> Response:
    """POST /v1/images/edits."""
    body_bytes, content_type = await request.body(), request.headers.get("content-type", "")
    files, fields = await anyio.to_thread.run_sync(_read_form, content_type, body_bytes)
    try:
        body = context.protocol.edits.model_validate(fields)
    except ValidationError as error:
        raise bad_body(error, fields) from None
    if not files:
        raise ApiError("image: send at least one image, as a file", param="image")
    context.check_images(len(files))
    pixels = [await context.media.read(file, f"image {number}") for number, file in enumerate(files)]
    size = Size(*pixels[0].shape[1:])
    return await _answer(context, request, body, [*pixels, body.prompt], size, "image_edit")


def _read_form(content_type: str, body: bytes) -> tuple[list[bytes], dict[str, Any]]:
    """The files of a form, and its other fields, lists for names that end in []."""
    files: list[bytes] = []
    fields: dict[str, Any] = {}
    for part in read_form(content_type, body):
        name = shown(part.name)
        if part.is_file and part.name not in _IMAGE_FIELDS:
            raise ApiError(f"{name}: no file of this name is used; leave it out", param=name)
        if part.name in _IMAGE_FIELDS:
            if not part.is_file:
                raise ApiError("image: send it as a file, not as a text", param="image")
            files.append(bytes(part.data))
            continue
        try:
            text = part.data.decode("utf-8")
        except UnicodeDecodeError:
            raise ApiError(f"{name}: it is not UTF-8 text", param=name) from None
        base = part.name.removesuffix("[]")
        is_list = base != part.name
        if base in fields and not (is_list and isinstance(fields[base], list)):
            raise ApiError(f"{name}: it is given twice; give it once", param=name)
        if is_list:
            fields[base] = [*fields.get(base, []), text]
        else:
            fields[base] = _pair(text) if base == "guidance_interval" else text
    return files, fields


def _pair(text: str) -> Any:
    """Two numbers as forms have them, in JSON. What is none is left to be refused."""
    try:
        return json.loads(text) if len(text) < _MOST_PAIR_LETTERS else text
    except ValueError:
        return text


async def _answer(
    context: Context, request: HttpRequest, body: ImagesBody, prompt: Prompt, size: Size | None, kind: str
) -> Response:
    """Draw and answer. size: where the body names none. kind: what the events are called."""
    context.check_model(body.model)
    settings = body.image_settings(context.sizes)
    if body.size is None:
        settings["size"] = size
    seed = new_seed() if body.seed is None else body.seed

    def requests() -> list[Request]:
        first = context.pipeline.image_request(prompt, seed=seed, **settings)
        return context.numbered(first, body.n, body.partial_images)

    answers = await context.submit(requests)
    drawn = _Drawn(context, answers, body)
    if body.stream:
        return EventStream(answers, drawn.pieces(kind), context.metrics)
    async with watched(answers, request.receive):
        return JSONResponse(await drawn.whole())


class _Drawn:
    """Images of one request, as they are told."""

    def __init__(self, context: Context, answers: Answers, body: ImagesBody) -> None:
        self._answers, self._body = answers, body
        request, sizes = answers.places[0].request, context.pipeline.runner.sizes
        size = request.image.size
        assert size is not None
        self._patches = sizes.patches(size)
        self._prompt_patches = sum(
            sizes.patches(Size(*part.shape[1:])) for part in request.prompt if isinstance(part, Tensor)
        )
        self._about = {
            "background": "opaque",
            "output_format": body.output_format,
            "quality": "auto",
            "size": size_name(size),
        }

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece. Raises StoppingError where the server stopped before any image was finished."""
        data: list[dict[str, Any]] = [{} for _ in self._answers.places]
        ended = []
        async for number, event in self._answers:
            if isinstance(event, ImageDone):
                data[number] = await self._image(event)
            elif isinstance(event, Done):
                ended.append(event)
        made = [each for each in data if each]
        if not made:
            raise ClientGoneError if self._answers.is_left else StoppingError
        # OpenAI's client knows no quality "auto" here.
        about = {name: value for name, value in self._about.items() if name != "quality"}
        return {"created": int(time.time()), **about, "data": made, "usage": self._usage(ended)}

    async def pieces(self, kind: str) -> AsyncIterator[bytes]:
        """The answer as events: previews, and each image when it is finished."""
        shown_previews = [0] * len(self._answers.places)
        finished: dict[int, dict[str, Any]] = {}
        async for number, event in self._answers:
            about = {**self._about, "created_at": int(time.time()), "index": number}
            if isinstance(event, ImagePreview):
                count = shown_previews[number]
                if count < self._body.partial_images:
                    shown_previews[number] += 1
                    name = f"{kind}.partial_image"
                    encoded = await self._encode(event)
                    yield sse(
                        {"type": name, "b64_json": encoded, "partial_image_index": count, **about}, name
                    )
            elif isinstance(event, ImageDone):
                finished[number] = await self._image(event)
            elif isinstance(event, Done):
                if number not in finished:
                    raise StoppingError
                name = f"{kind}.completed"
                usage = self._usage([event])
                yield sse({"type": name, **finished.pop(number), **about, "usage": usage}, name)

    async def _image(self, event: ImageDone) -> dict[str, Any]:
        return {"b64_json": await self._encode(event), "seed": event.seed, "recipe": event.recipe.as_dict()}

    async def _encode(self, event: ImagePreview | ImageDone) -> str:
        recipe = event.recipe if isinstance(event, ImageDone) else None
        return await encode(event.pixels, self._body.output_format, self._body.output_compression, recipe)

    def _usage(self, ended: Sequence[Done]) -> dict[str, Any]:
        read = sum(done.prompt_positions for done in ended)
        made = sum(done.images for done in ended) * self._patches
        images = len(ended) * self._prompt_patches
        details = {"text_tokens": read - images, "image_tokens": images}
        return {
            "input_tokens": read,
            "output_tokens": made,
            "total_tokens": read + made,
            "input_tokens_details": details,
        }
