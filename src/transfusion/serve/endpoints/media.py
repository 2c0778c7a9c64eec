"""Images as they travel: data URLs and files of a request, base64 of an answer.

C channels, H/W image height and width.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Sequence
from typing import Literal

import anyio.to_thread
from torch import Tensor

from transfusion.config import Config
from transfusion.errors import UserError
from transfusion.generate import Recipe, to_image
from transfusion.generate.pillow_images import read_image
from transfusion.sequence.sizes import Size

OutputFormat = Literal["png", "jpeg", "webp"]
_DATA_URL = re.compile(r"data:image/(?:png|jpeg|jpg|webp)(?:;[\w=.+-]+)*;base64,", re.IGNORECASE)
# Images that are read at a time. A large one takes some hundred MB while it is decoded.
_READ_AT_ONCE = 2


class ImageReader:
    """Reads the images of requests, on threads."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._limiter: anyio.CapacityLimiter | None = None

    async def read(self, data: bytes, name: str) -> Tensor:
        """The bytes of a file as uint8 [C, H, W]. Raises UserError, which begins with the name."""
        return await self._on_thread(read_image, data, self._config, name)

    async def read_url(self, url: str, name: str) -> Tensor:
        """As `read`, for a data URL. No other URL is ever fetched."""
        return await self._on_thread(self._read_url, url, name)

    async def _on_thread(self, function: Callable[..., Tensor], *arguments: object) -> Tensor:
        # Made where an event loop runs.
        self._limiter = self._limiter or anyio.CapacityLimiter(_READ_AT_ONCE)
        return await anyio.to_thread.run_sync(function, *arguments, limiter=self._limiter)

    def _read_url(self, url: str, name: str) -> Tensor:
        found = _DATA_URL.match(url)
        if found is None:
            raise UserError(
                f"{name}: this server fetches no URL; send the image itself, as data:image/png;base64,..."
            )
        try:
            data = base64.b64decode(memoryview(url.encode("ascii"))[found.end() :], validate=True)
        except ValueError:
            raise UserError(f"{name}: its base64 is broken; encode the file again") from None
        return read_image(data, self._config, name)


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


def data_url(encoded: str, form: OutputFormat = "png") -> str:
    """Base64 as a URL that any page shows."""
    return f"data:image/{form};base64,{encoded}"


def size_name(size: Size) -> str:
    """WIDTHxHEIGHT, as OpenAI writes sizes. The command line has the height first."""
    return f"{size.width}x{size.height}"


def size_of(name: str, sizes: Sequence[Size]) -> Size | None:
    """The size of this name, None for "auto"."""
    return next((size for size in sizes if size_name(size) == name), None)
