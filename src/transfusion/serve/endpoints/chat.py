"""/v1/chat/completions: text, images and sounds in and out, in the order in which the model makes them.

Models of this project continue documents. So a chat is one document: what its messages say in their order, a new line
before each that is no answer.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from fastapi import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from transfusion.generate import Done, ImageDone, ImagePreview, MediaDone, Part, Request, TextDelta
from transfusion.generate.request import joined
from transfusion.generate.settings import AnswerSettings
from transfusion.sequence.sizes import IMAGE
from transfusion.serve.endpoints.context import Context, new_seed, read_json
from transfusion.serve.endpoints.media import data_url, encode, encode_media
from transfusion.serve.endpoints.protocol import AudioPart, ChatBody, ImagePart, Message, TextPart
from transfusion.serve.endpoints.stream import EventStream, sse, watched
from transfusion.serve.worker import Answers

# As OpenAI calls them. abort, as vLLM says it, is an answer that the stopping server hands back as it is.
_FINISH = {"end": "stop", "image": "stop", "tokens": "length", "length": "length", "cancelled": "abort"}


async def completions(context: Context, request: HttpRequest) -> Response:
    """POST /v1/chat/completions."""
    body = await read_json(context, request, context.protocol.chat)
    context.check_model(body.model)
    seed = new_seed() if body.seed is None else body.seed
    prompt = await _prompt(context, body.messages)
    answers = await context.submit(lambda: _requests(context, body, prompt, seed))
    chat = _Chat(context, answers, body, seed)
    if body.stream:
        return EventStream(answers, chat.pieces(), context.metrics)
    async with watched(answers, request.receive):
        return JSONResponse(await chat.whole())


async def _prompt(context: Context, messages: Sequence[Message]) -> list[Part]:
    """The messages as one document."""
    parts = [message.all_parts() for message in messages]
    flat = [part for each in parts for part in each]
    context.check_images(sum(not isinstance(part, TextPart) for part in flat))
    context.pipeline.check_letters(part.text for part in flat if isinstance(part, TextPart))
    prompt: list[Part] = []
    for number, (message, each) in enumerate(zip(messages, parts, strict=True)):
        said: list[Part] = []
        for part in each:
            if isinstance(part, ImagePart):
                said.append(
                    await context.media.read_url(part.image_url.url, f"the image of message {number}")
                )
            elif isinstance(part, AudioPart):
                # The body has none for a model without sounds.
                assert context.sound is not None
                name = f"the sound of message {number}"
                said.append(await context.media.read_base64(part.input_audio.data, context.sound, name))
            else:
                said = joined(said, [part.text])
        prompt = joined(prompt, said, "" if message.role == "assistant" else "\n")
    return prompt


def _requests(context: Context, body: ChatBody, prompt: list[Part], seed: int) -> list[Request]:
    drawing = body.image_config.image_settings(context.sizes)
    named = {"image": IMAGE, "audio": context.sound}
    drawn = [name for asked in body.modalities if (name := named.get(asked)) is not None]
    if drawn and len(body.modalities) == 1:
        first = context.pipeline.image_request(prompt, modality=drawn[0], seed=seed, **drawing)
    else:
        settings: AnswerSettings = {
            **drawing,
            "modalities": drawn or [IMAGE],
            "max_images": body.max_images if drawn else 0,
            "max_tokens": body.max_completion_tokens or body.max_tokens,
            "temperature": body.temperature,
            "top_p": body.top_p,
        }
        first = context.pipeline.request(prompt, seed=seed, **settings)
    return context.numbered(first, body.n, body.partial_images)


class _StopTexts:
    """Finds the first of some texts in a text that comes in pieces, and holds back what may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held = stops, ""
        self.is_found = False

    def pass_on(self, text: str, *, complete: bool = False) -> str:
        """What may be told. complete: nothing follows, but for an image."""
        if self.is_found:
            return ""
        text = self._held + text
        self._held = ""
        places = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if places:
            self.is_found = True
            return text[: min(places)]
        if complete:
            return text
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """How many of the last letters of a text may begin the stop."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(slots=True)
class _Choice:
    """One answer of a chat."""

    stops: _StopTexts
    previews: int = 0
    parts: list[dict[str, Any]] = field(default_factory=list)
    audio: dict[str, Any] = field(default_factory=dict)
    finish: str = ""


class _Chat:
    """Answers to one chat, as they are told."""

    def __init__(self, context: Context, answers: Answers, body: ChatBody, seed: int) -> None:
        self._context, self._answers, self._body = context, answers, body
        self._choices = [_Choice(_StopTexts(body.stops)) for _ in answers.places]
        self._id, self._created, self._seed = f"chatcmpl-{uuid4().hex}", int(time.time()), seed
        self._ended: list[Done] = []

    async def whole(self) -> dict[str, Any]:
        """The answers in one piece."""
        async for number, delta in self._deltas():
            choice = self._choices[number]
            if text := delta.get("content"):
                last = choice.parts[-1] if choice.parts else {}
                if last.get("type") == "text":
                    last["text"] += text
                else:
                    choice.parts.append({"type": "text", "text": text})
            choice.parts += delta.get("images", [])
            if audio := delta.get("audio"):
                choice.audio = choice.audio or audio
                choice.parts.append(_sound(audio["data"]))
        choices = [
            {
                "index": number,
                "message": _message(choice),
                "finish_reason": choice.finish,
                "logprobs": None,
            }
            for number, choice in enumerate(self._choices)
        ]
        return {**self._about("chat.completion"), "choices": choices, "usage": self._usage()}

    async def pieces(self) -> AsyncIterator[bytes]:
        """The answers as chunks."""
        about = self._about("chat.completion.chunk")

        def chunk(number: int, delta: dict[str, Any], finish: str | None = None) -> bytes:
            choice = {"index": number, "delta": delta, "finish_reason": finish, "logprobs": None}
            return sse({**about, "choices": [choice]})

        for number in range(len(self._choices)):
            yield chunk(number, {"role": "assistant", "content": ""})
        async for number, delta in self._deltas():
            yield chunk(number, delta, None if delta else self._choices[number].finish)
        options = self._body.stream_options
        if options is not None and options.include_usage:
            yield sse({**about, "choices": [], "usage": self._usage()})
        yield sse("[DONE]")

    async def _deltas(self) -> AsyncIterator[tuple[int, dict[str, Any]]]:
        """What comes to each answer, and an empty piece at its end."""
        async for number, event in self._answers:
            choice = self._choices[number]
            if choice.finish:
                if isinstance(event, Done):
                    self._ended.append(event)
                continue
            if isinstance(event, TextDelta):
                told = choice.stops.pass_on(event.text)
            else:
                told = choice.stops.pass_on("", complete=True)
            if told:
                yield number, {"content": told}
            if choice.stops.is_found:
                self._answers.cancel(number)
                choice.finish = "stop"
                yield number, {}
            elif isinstance(event, ImagePreview):
                if choice.previews < self._body.partial_images:
                    image = _image(await encode(event.pixels), event.index)
                    yield number, {"images": [{**image, "partial_image_index": choice.previews}]}
                    choice.previews += 1
            elif isinstance(event, ImageDone):
                choice.previews = 0
                image = _image(await encode(event.pixels, recipe=event.recipe), event.index)
                yield number, {"images": [{**image, "seed": event.seed}]}
            elif isinstance(event, MediaDone):
                yield number, {"audio": await self._audio(event)}
            elif isinstance(event, Done):
                self._ended.append(event)
                choice.finish = _FINISH[event.reason]
                yield number, {}

    def _about(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._context.name,
            "seed": self._seed,
        }

    async def _audio(self, event: MediaDone) -> dict[str, Any]:
        """A sound as OpenAI has it. Nothing is stored, so its id leads nowhere. What was said is not known."""
        _, encoded = await encode_media(event.media, self._context.pipeline.config)
        return {
            "id": f"audio-{uuid4().hex}",
            "data": encoded,
            "expires_at": self._created,
            "transcript": "",
            "seed": event.seed,
        }

    def _usage(self) -> dict[str, Any]:
        read = self._ended[0].prompt_positions if self._ended else 0
        made, images = sum(done.tokens for done in self._ended), sum(done.images for done in self._ended)
        return {
            "prompt_tokens": read,
            "completion_tokens": made,
            "total_tokens": read + made,
            "completion_images": images,
        }


def _image(encoded: str, index: int) -> dict[str, Any]:
    return {"type": "image_url", "index": index, "image_url": {"url": data_url(encoded)}}


def _sound(encoded: str) -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": encoded, "format": "wav"}}


def _message(choice: _Choice) -> dict[str, Any]:
    """A message whose text, images and first sound clients find by their usual names, and all of it under `parts`."""
    texts = [part["text"] for part in choice.parts if part["type"] == "text"]
    return {
        "role": "assistant",
        "content": "".join(texts) if texts or not choice.parts else None,
        "images": [part for part in choice.parts if part["type"] == "image_url"],
        **({"audio": choice.audio} if choice.audio else {}),
        "parts": choice.parts,
    }
