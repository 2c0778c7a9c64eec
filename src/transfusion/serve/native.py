"""/v1/generate: the events of the engine, as they come."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request as HttpRequest
from starlette.responses import Response

from transfusion.generate import Done, Event, ImageDone, ImagePreview, ImageStart, Part, Request, TextDelta
from transfusion.generate.request import joined
from transfusion.serve.context import Context, read_json
from transfusion.serve.media import encode, size_name
from transfusion.serve.protocol import GenerateBody
from transfusion.serve.stream import EventStream, sse
from transfusion.serve.worker import Answers


async def generate(context: Context, request: HttpRequest) -> Response:
    """POST /v1/generate."""
    body = await read_json(request, context.protocol.generate)
    prompt = await _prompt(context, body)
    answers = await context.submit(lambda: [_request(context, body, prompt)])
    return EventStream(answers, _pieces(answers), context.limits.read_seconds, context.metrics)


def _request(context: Context, body: GenerateBody, prompt: list[Part]) -> Request:
    pipeline, asked = context.pipeline, {"seed": body.seed, "preview_every": body.preview_every}
    if body.draws:
        return pipeline.image_request(prompt, **asked, **body.image_settings(context.sizes))
    return pipeline.request(prompt, **asked, **body.answer_settings(context.sizes))


async def _prompt(context: Context, body: GenerateBody) -> list[Part]:
    if isinstance(body.prompt, str):
        return [body.prompt]
    context.check_images(sum(not isinstance(part, str) for part in body.prompt))
    context.pipeline.check_letters(part for part in body.prompt if isinstance(part, str))
    parts: list[Part] = []
    for part in body.prompt:
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
