"""/v1/generate: the events of the engine, as they come. /v1/inspect: a document as the model sees it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from transfusion.generate import (
    Done,
    Event,
    ImageDone,
    ImagePreview,
    ImageStart,
    MediaDone,
    Part,
    Request,
    TextDelta,
)
from transfusion.generate.request import joined, media, size
from transfusion.serve.endpoints.context import Context, read_json
from transfusion.serve.endpoints.media import encode, encode_media, size_name
from transfusion.serve.endpoints.protocol import GenerateBody, PromptImage, PromptMedia
from transfusion.serve.endpoints.stream import EventStream, sse
from transfusion.serve.worker import Answers


async def generate(context: Context, request: HttpRequest) -> Response:
    """POST /v1/generate."""
    body = await read_json(context, request, context.protocol.generate)
    prompt = await _parts(context, body.prompt)
    answers = await context.submit(lambda: [_request(context, body, prompt)])
    return EventStream(answers, _pieces(context, answers), context.metrics)


def _request(context: Context, body: GenerateBody, prompt: list[Part]) -> Request:
    pipeline, asked = context.pipeline, {"seed": body.seed, "preview_every": body.preview_every}
    if body.draws:
        (modality,) = body.holds
        settings = body.image_settings(context.sizes_of(modality))
        return pipeline.image_request(prompt, modality=modality, **asked, **settings)
    return pipeline.request(prompt, **asked, **body.answer_settings(context.sizes))


async def inspect(context: Context, request: HttpRequest) -> Response:
    """POST /v1/inspect."""
    body = await read_json(context, request, context.protocol.inspect)
    parts = await _parts(context, body.document)
    found = await context.worker.call(lambda: context.pipeline.inspect(parts))
    layout, sizes = found.layout, context.pipeline.runner.sizes
    return JSONResponse(
        {
            "tokens": layout.token_ids_S.tolist(),
            "texts": found.texts,
            "nats": [None if nat is None else round(nat, 4) for nat in found.nats],
            "positions": layout.position_SA.tolist(),
            "sees_before": layout.end_key_S.tolist(),
            "images": [
                {"first": first, "patches": patches, "columns": sizes.grid(size(part))[1]}
                for (first, patches), part in zip(layout.images, media(parts), strict=True)
            ],
        }
    )


async def _parts(context: Context, prompt: str | list[str | PromptImage | PromptMedia]) -> list[Part]:
    if isinstance(prompt, str):
        return [prompt]
    context.check_images(sum(not isinstance(part, str) for part in prompt))
    context.pipeline.check_letters(part for part in prompt if isinstance(part, str))
    parts: list[Part] = []
    for part in prompt:
        if isinstance(part, str):
            parts = joined(parts, [part])
        elif isinstance(part, PromptMedia):
            name = f"{part.modality} {len(parts)} of the prompt"
            parts.append(await context.media.read_media_url(part.media, part.modality, name))
        else:
            parts.append(await context.media.read_url(part.image, f"image {len(parts)} of the prompt"))
    return parts


async def _pieces(context: Context, answers: Answers) -> AsyncIterator[bytes]:
    async for _, event in answers:
        name, data = await _record(context, event)
        yield sse(data, name)


async def _record(context: Context, event: Event) -> tuple[str, dict[str, Any]]:
    """The name of an event and what it holds. Images are base64 of PNG files, and other media of files of their own."""
    if isinstance(event, TextDelta):
        return "text", {"text": event.text}
    if isinstance(event, ImageStart):
        return "image_start", {"index": event.index, "size": size_name(event.size), "steps": event.steps}
    if isinstance(event, ImagePreview):
        encoded = await encode(event.pixels)
        return "image_preview", {"index": event.index, "step": event.step, "png": encoded}
    if isinstance(event, ImageDone):
        encoded = await encode(event.pixels, recipe=event.recipe)
        recipe = event.recipe.as_dict()
        return "image", {"index": event.index, "seed": event.seed, "png": encoded, "recipe": recipe}
    if isinstance(event, MediaDone):
        kind, encoded = await encode_media(event.media, context.pipeline.config)
        about = {"index": event.index, "modality": event.media.modality, "seed": event.seed}
        return "media", {**about, "media_type": kind, "data": encoded}
    assert isinstance(event, Done)
    usage = {"prompt_positions": event.prompt_positions, "tokens": event.tokens, "images": event.images}
    return "done", {"reason": event.reason, "usage": usage}
