"""What all endpoints share: the model, its limits, and how a body becomes requests of the engine."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import anyio.to_thread
from fastapi import Request as HttpRequest
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, from_json, to_json

from transfusion.errors import UserError, shown
from transfusion.generate import Pipeline, Request
from transfusion.generate.request import size as media_size
from transfusion.generate.settings import check_seeds
from transfusion.sequence.sizes import IMAGE, Size
from transfusion.serve.endpoints.media import MediaReader
from transfusion.serve.endpoints.protocol import Protocol
from transfusion.serve.errors import ApiError, MediaTypeError, UnknownModelError
from transfusion.serve.limits import Limits
from transfusion.serve.metrics import Metrics
from transfusion.serve.worker import Answers, Worker

logger = logging.getLogger(__name__)
Body = TypeVar("Body", bound=BaseModel)
# Of seeds that nobody asked for.
_SEED_BITS = 31


@dataclass(frozen=True, slots=True)
class Context:
    """One server.

    Attributes:
        pipeline: The model.
        name: Of the model, as clients name it.
        created: When it was made, in seconds since 1970.
        limits: Of requests.
        protocol: What they may hold.
        worker: Who answers them.
        metrics: What is counted.
        media: Who reads their images and other media.
        logs_prompts: Whether prompts may stand in the log.
    """

    pipeline: Pipeline
    name: str
    created: int
    limits: Limits
    protocol: Protocol
    worker: Worker
    metrics: Metrics
    media: MediaReader
    logs_prompts: bool = False

    @property
    def has_previews(self) -> bool:
        """Whether images can be shown while they are made."""
        if self.pipeline.config.codec.kind == "vq":
            return False
        try:
            self.pipeline.runner.check_previews()
        except UserError:
            return False
        return True

    @property
    def sizes(self) -> list[Size]:
        """Of the model's images."""
        return self.sizes_of(IMAGE)

    def sizes_of(self, modality: str) -> list[Size]:
        """Of images, or of another modality."""
        return [size for size in self.pipeline.runner.sizes.all if size.modality == modality]

    @property
    def sound(self) -> str | None:
        """The modality of the sounds of a chat."""
        modalities = self.pipeline.config.modalities
        return next((modality.name for modality in modalities if modality.kind == "mel"), None)

    def check_model(self, name: str | None) -> None:
        """Raise UnknownModelError for a name that is not that of the model."""
        if name not in (None, self.name):
            raise UnknownModelError(
                f"the model {shown(name)} is not served here; this is {self.name}", param="model"
            )

    def check_images(self, count: int) -> None:
        """Raise ApiError for more images and other media in a prompt than may be."""
        if count > self.limits.prompt_images:
            raise ApiError(
                f"a prompt of {count} images or other media; this server takes {self.limits.prompt_images}"
            )

    def numbered(self, first: Request, count: int, previews: int) -> list[Request]:
        """A request so many times, of its seed, the next and so on. previews: of each image, or some more."""
        check_seeds(first.image.seed, count)
        every = 0
        if previews:
            sizes, image = self.pipeline.runner.sizes, first.image
            patches = sizes.patches(image.size or sizes.first)
            calls = self.pipeline.family.image_calls(image, self.pipeline.config.diffusion, patches)
            every = max(1, calls // (previews + 1))
        return [
            replace(
                first,
                preview_every=every,
                text=replace(first.text, seed=first.text.seed + number),
                image=replace(first.image, seed=first.image.seed + number),
            )
            for number in range(count)
        ]

    async def submit(self, make: Callable[[], list[Request]]) -> Answers:
        """Make requests on a thread, since to measure a long prompt takes a while, and submit them.

        Raises:
            ApiError: Where they cannot be taken.
            UserError: For what they may not be.
        """
        requests = await anyio.to_thread.run_sync(make)
        if self.logs_prompts:
            parts = requests[0].prompt
            texts = [part if isinstance(part, str) else f"[{media_size(part).modality}]" for part in parts]
            logger.info("prompt: %s", shown(" ".join(texts)))
        return await self.worker.submit(requests)


def new_seed() -> int:
    """A seed where none was given."""
    return secrets.randbits(_SEED_BITS)


async def read_json(context: Context, request: HttpRequest, model: type[Body]) -> Body:
    """The body of a request. Numbers are no texts, and 1 is not true.

    Raises:
        ApiError: For what it may not be.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise MediaTypeError(f"the body must be application/json, not {shown(kind or 'of no type')}")
    body = await request.body()
    # To tell what is wrong with a million values takes minutes.
    if sum(map(body.count, (b",", b"[", b"{"))) > context.limits.body_values:
        raise ApiError(f"the body has more than {context.limits.body_values:,} values; send fewer")
    if model in context.protocol.with_nulls:
        body = _without_nulls(body)
    try:
        return model.model_validate_json(body, strict=True)
    except ValidationError as error:
        raise bad_body(error, _parsed(body)) from None


def _without_nulls(body: bytes) -> bytes:
    """OpenAI's clients may send null for what is not set."""
    data = _parsed(body) if b"null" in body else None
    if not isinstance(data, dict):
        return body
    return to_json({name: value for name, value in data.items() if value is not None})


def _parsed(body: bytes) -> Any:
    try:
        return from_json(body)
    except ValueError:
        return None


def bad_body(error: ValidationError, body: Any) -> ApiError:
    """What is wrong with a body, in its own names. Of alternatives, the one that was followed furthest."""

    def rank(found: ErrorDetails) -> tuple[int, bool]:
        return len(_path(found, body)), not found["type"].endswith("_type")

    first = max(error.errors(include_url=False, include_input=False, include_context=False), key=rank)
    where = shown(".".join(map(str, _path(first, body))))
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "this server knows no such field; GET /v1/schema lists what it knows"
    return ApiError(f"{where}: {message}" if where else message, param=where or None)


def _path(found: ErrorDetails, body: Any) -> list[str | int]:
    """Where it is in the body. pydantic also names the alternatives that it tried on the way."""
    path: list[str | int] = []
    for number, name in enumerate(found["loc"]):
        inside = body is not None and (
            (isinstance(body, dict) and name in body)
            or (isinstance(body, list) and isinstance(name, int) and name < len(body))
        )
        is_missing = found["type"] == "missing" and number == len(found["loc"]) - 1
        if inside or is_missing:
            path.append(name)
            body = body[name] if inside else None
    return path
