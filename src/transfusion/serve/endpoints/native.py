"""/v1/generate: the events of the engine, as they come. /v1/inspect: a document as the model sees it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from torch import Tensor

from transfusion.generate import Done, Event, ImageDone, ImagePreview, ImageStart, Part, Request, TextDelta
from transfusion.generate.request import joined
from transfusion.sequence.sizes import Size
from transfusion.serve.endpoints.context import Context, read_json
from transfusion.serve.endpoints.media import encode, size_name
from transfusion.serve.endpoints.protocol import GenerateBody, PromptImage
from transfusion.serve.endpoints.stream import EventStream, sse
from transfusion.serve.worker import Answers


async def generate(context: Context, request: HttpRequest) -> Response:
    """POST /v1/generate."""
    body = await read_json(context, request, context.protocol.generate)
    prompt = await _parts(context, body.prompt)
    answers = await context.submit(lambda: [_request(context, body, prompt)])
    return EventStream(answers, _pieces(answers), context.metrics)


def _request(context: Context, body: GenerateBody, prompt: list[Part]) -> Request:
    pipeline, asked = context.pipeline, {"seed": body.seed, "preview_every": body.preview_every}
    if body.draws:
        return pipeline.image_request(prompt, **asked, **body.image_settings(context.sizes))
    return pipeline.request(prompt, **asked, **body.answer_settings(context.sizes))


async def inspect(context: Context, request: HttpRequest) -> Response:
    """POST /v1/inspect."""
    body = await read_json(context, request, context.protocol.inspect)
    parts = await _parts(context, body.document)
    found = await context.worker.call(lambda: context.pipeline.inspect(parts))
    layout = found.layout
    return JSONResponse(
        {
            "tokens": layout.token_ids_S.tolist(),
            "texts": found.texts,
            "nats": [None if nat is None else round(nat, 4) for nat in found.nats],
            "positions": layout.position_SA.tolist(),
            "sees_before": layout.end_key_S.tolist(),
            "images": [
                {"first": first, "patches": patches, "columns": _columns(context, part)}
                for (first, patches), part in zip(
                    layout.images, [part for part in parts if isinstance(part, Tensor)], strict=True
                )
            ],
        }
    )


def _columns(context: Context, image: Tensor) -> int:
    """Patches in a line of an image."""
    return context.pipeline.runner.sizes.grid(Size(*image.shape[1:]))[1]


async def _parts(context: Context, prompt: str | list[str | PromptImage]) -> list[Part]:
    if isinstance(prompt, str):
        return [prompt]
    context.check_images(sum(not isinstance(part, str) for part in prompt))
    context.pipeline.check_letters(part for part in prompt if isinstance(part, str))
    parts: list[Part] = []
    for part in prompt:
        if isinstance(part, str):
            parts = joined(parts, [part])
        else:
            parts.append(await context.images.read_url(part.image, f"image {len(parts)} of the prompt"))
    return parts


async def _pieces(answers: Answers) -> AsyncIterator[bytes]:
    async for _, event in answers:
        name, data = await _record(event)
        yield sse(data, name)


async def _record(event: Event) -> tuple[str, dict[str, Any]]:
    """The name of an event and what it holds. Images are base64 of PNG files."""
    if isinstance(event, TextDelta):
        return "text", {"text": event.text}
    if isinstance(event, ImageStart):
        size = size_name(event.size)
        return "image_start", {"index": event.index, "size": size, "steps": event.steps}
    if isinstance(event, ImagePreview):
        encoded = await encode(event.pixels)
        return "image_preview", {"index": event.index, "step": event.step, "png": encoded}
    if isinstance(event, ImageDone):
        encoded = await encode(event.pixels, recipe=event.recipe)
        recipe = event.recipe.as_dict()
        return "image", {"index": event.index, "seed": event.seed, "png": encoded, "recipe": recipe}
    assert isinstance(event, Done)
    usage = {"prompt_positions": event.prompt_positions, "tokens": event.tokens, "images": event.images}
    return "done", {"reason": event.reason, "usage": usage}
