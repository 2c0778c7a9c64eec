"""Images and other media as they travel: data URLs and files of a request, base64 of an answer.

C channels, H/W image height and width.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import anyio.to_thread
from torch import Tensor

from transfusion.config import Config
from transfusion.errors import UserError
from transfusion.generate import Media, Recipe, to_image
from transfusion.generate.media_files import as_file, read_as
from transfusion.generate.pillow_images import read_image
from transfusion.sequence.sizes import Size

OutputFormat = Literal["png", "jpeg", "webp"]
_IMAGE_URL = re.compile(r"data:image/(?:png|jpeg|jpg|webp)(?:;[\w=.+-]+)*;base64,", re.IGNORECASE)
_MEDIA_URL = re.compile(
    r"data:(?:audio/[\w.+-]+|application/octet-stream)(?:;[\w=.+-]+)*;base64,", re.IGNORECASE
)
Read = TypeVar("Read", Tensor, Media)
# Files that are read at a time. A large image takes some hundred MB while it is decoded, and so does a long sound.
_READ_AT_ONCE = 2


class MediaReader:
    """Reads the images, sounds and arrays of requests, on threads."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._modalities = {modality.name: modality for modality in config.modalities}
        self._limiter: anyio.CapacityLimiter | None = None

    async def read(self, data: bytes, name: str) -> Tensor:
        """The bytes of a file as uint8 [C, H, W]. Raises UserError, which begins with the name."""
        return await self._on_thread(read_image, data, self._config, name)

    async def read_url(self, url: str, name: str) -> Tensor:
        """As `read`, for a data URL. No other URL is ever fetched."""
        return await self._on_thread(self._read_url, url, name)

    async def read_media_url(self, url: str, modality: str, name: str) -> Media:
        """As `read_url`, for a file of another modality."""
        return await self._on_thread(self._read_media_url, url, modality, name)

    async def read_base64(self, encoded: str, modality: str, name: str) -> Media:
        """The same without the head of a URL."""
        return await self._on_thread(self._read_base64, encoded, modality, name)

    async def _on_thread(self, function: Callable[..., Read], *arguments: object) -> Read:
        # Made where an event loop runs.
        self._limiter = self._limiter or anyio.CapacityLimiter(_READ_AT_ONCE)
        return await anyio.to_thread.run_sync(function, *arguments, limiter=self._limiter)

    def _read_url(self, url: str, name: str) -> Tensor:
        begin = _head(url, _IMAGE_URL, "image itself, as data:image/png", name)
        return read_image(_decoded(url, name, begin), self._config, name)

    def _read_media_url(self, url: str, modality: str, name: str) -> Media:
        begin = _head(
            url, _MEDIA_URL, "file itself, as data:audio/wav or data:application/octet-stream", name
        )
        return self._read_base64(url, modality, name, begin)

    def _read_base64(self, encoded: str, modality: str, name: str, begin: int = 0) -> Media:
        return read_as(self._modalities[modality], _decoded(encoded, name, begin), name)


def _head(url: str, form: re.Pattern[str], remedy: str, name: str) -> int:
    """Letters before the base64 of a data URL."""
    found = form.match(url)
    if found is None:
        raise UserError(f"{name}: this server fetches no URL; send the {remedy};base64,...")
    return found.end()


def _decoded(encoded: str, name: str, begin: int) -> bytes:
    """The bytes whose base64 begins there."""
    try:
        return base64.b64decode(memoryview(encoded.encode("ascii"))[begin:], validate=True)
    except ValueError:
        raise UserError(f"{name}: its base64 is broken; encode the file again") from None


async def encode(
    pixels_CHW: Tensor, form: OutputFormat = "png", compression: int = 100, recipe: Recipe | None = None
) -> str:
    """Base64 of a file of these pixels, which a PNG's recipe stands in. compression: quality of JPEG and WebP."""
    return await anyio.to_thread.run_sync(_encode, pixels_CHW, form, compression, recipe)


def _encode(pixels_CHW: Tensor, form: OutputFormat, compression: int, recipe: Recipe | None) -> str:
    stream = io.BytesIO()
    image = to_image(pixels_CHW)
    if form == "png":
        image.save(stream, "PNG", pnginfo=None if recipe is None else recipe.as_chunk())
    elif form == "webp" and compression == 100:
        image.save(stream, "WEBP", lossless=True)
    else:
        image.save(stream, form.upper(), quality=compression)
    return base64.b64encode(stream.getvalue()).decode("ascii")


async def encode_media(media: Media, config: Config) -> tuple[str, str]:
    """Media type and base64 of a file of this sound or array."""
    return await anyio.to_thread.run_sync(_encode_media, media, config)


def _encode_media(media: Media, config: Config) -> tuple[str, str]:
    file = as_file(media, config)
    return file.media_type, base64.b64encode(file.data).decode("ascii")


def data_url(encoded: str, form: OutputFormat = "png") -> str:
    """Base64 as a URL that any page shows."""
    return f"data:image/{form};base64,{encoded}"


def size_name(size: Size) -> str:
    """WIDTHxHEIGHT, as OpenAI writes sizes. The command line has the height first."""
    return f"{size.width}x{size.height}"


def size_of(name: str, sizes: Sequence[Size]) -> Size | None:
    """The size of this name, None for "auto". Raises UserError for one of another modality."""
    by_name = {size_name(size): size for size in sizes}
    if name not in ("auto", *by_name):
        raise UserError(f"size: {name} is of another modality; choose auto or {' or '.join(by_name)}")
    return by_name.get(name)
