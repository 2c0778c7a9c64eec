"""What makes an image again: the request that it came of, the model, and a digest of its pixels.

A PNG carries it as a text chunk. It names no file and no folder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from transfusion.errors import UserError
from transfusion.files import digest
from transfusion.generate.request import Request, values
from transfusion.inference.image_diffusion import ImageSampling
from transfusion.inference.runner import Media
from transfusion.inference.text_sampling import TextSampling
from transfusion.sequence.sizes import IMAGE

# The keyword of the chunk, and the number of what stands in it.
KEYWORD = "transfusion"
FORMAT: Literal[1] = 1
# What Pillow raises for files that are broken, no images, or far too large.
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
# What weights can be kept in.
StoredDtype = Literal["float32", "bfloat16", "int8"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Which weights drew.

    Attributes:
        model: The id of an export. Empty for a model that is none.
        weights: "raw" or "ema".
        dtype: What the weights were kept in. Empty where that is not known.
    """

    model: str = ""
    weights: Literal["", "raw", "ema"] = ""
    dtype: StoredDtype | Literal[""] = ""


@dataclass(frozen=True, slots=True)
class PromptImage:
    """An image of a prompt, or an array of another modality, by the digest of its values."""

    image: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What makes an image again.

    Attributes:
        origin: The weights.
        prompt: Texts, and images by their digests.
        text: How text was chosen.
        image: How images were drawn.
        max_tokens: Of the request.
        max_images: Of the request.
        modalities: Of the request.
        draws: Whether the image follows the prompt at once.
        index: Of the image in the answer.
        pixels: Digest of the image.
        format: Of recipes.
    """

    origin: Origin
    prompt: tuple[str | PromptImage, ...]
    text: TextSampling
    image: ImageSampling
    max_tokens: int
    max_images: int
    draws: bool
    index: int
    pixels: str
    modalities: tuple[str, ...] = (IMAGE,)
    format: Literal[1] = FORMAT

    @classmethod
    def of(cls, request: Request, index: int, pixels_CHW: Tensor, origin: Origin, sampler: str) -> Recipe:
        """The recipe of image number `index` of an answer. sampler: what the request's "auto" means."""
        prompt = tuple(
            part if isinstance(part, str) else PromptImage(pixel_digest(values(part)))
            for part in request.prompt
        )
        return cls(
            origin=origin,
            prompt=prompt,
            text=request.text,
            image=replace(request.image, sampler=sampler),
            max_tokens=request.max_tokens,
            max_images=request.max_images,
            modalities=request.modalities,
            draws=request.draws,
            index=index,
            pixels=pixel_digest(pixels_CHW),
        )

    def request(self, images: Sequence[Tensor | Media]) -> Request:
        """The request again.

        Args:
            images: Those of the prompt, uint8 [C, H, W], and its arrays of other modalities, in any order.

        Raises:
            UserError: For an image of the prompt that is not among them.
        """
        by_digest = {pixel_digest(values(image)): image for image in images}
        wanted = [part.image for part in self.prompt if isinstance(part, PromptImage)]
        missing = [number for number, name in enumerate(wanted, 1) if name not in by_digest]
        if missing and not images:
            raise UserError(f"the prompt has images, {len(wanted)} in number; give their files with --image")
        if missing:
            raise UserError(
                f"none of the given images is image {missing[0]} of the prompt; give the very file that was used"
            )
        return Request(
            prompt=[part if isinstance(part, str) else by_digest[part.image] for part in self.prompt],
            text=self.text,
            image=self.image,
            max_tokens=self.max_tokens,
            max_images=self.max_images,
            modalities=self.modalities,
            draws=self.draws,
        )

    def as_json(self) -> str:
        """One line of JSON."""
        return json.dumps(self.as_dict(), separators=(",", ":"), ensure_ascii=False)

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        # What is so in every answer of text and images is left out, so that earlier versions read it too.
        unsaid = {"modalities"} if self.modalities == (IMAGE,) else set()
        found: dict[str, Any] = _ADAPTER.dump_python(self, mode="json", exclude=unsaid)
        if self.image.size is not None and self.image.size.modality == IMAGE:
            found["image"]["size"] = list(self.image.size.sides)
        return found

    def as_chunk(self) -> PngInfo:
        """What Pillow writes into a PNG."""
        info = PngInfo()
        info.add_itxt(KEYWORD, self.as_json())
        return info


_ADAPTER = TypeAdapter(Recipe)


def pixel_digest(pixels_CHW: Tensor) -> str:
    """Of the values [C, H, W] and their shape."""
    array = pixels_CHW.cpu().contiguous().numpy()
    return digest(repr(array.shape).encode() + array.tobytes())


def read_recipe(path: Path) -> Recipe:
    """The recipe that a PNG carries.

    Raises:
        UserError: For a file that is no PNG, has no recipe, or one of another format.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
            text = getattr(image, "text", {}).get(KEYWORD)
    except UNREADABLE as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is no whole PNG"
        raise UserError(f"cannot read {path}: {reason}") from None
    if text is None:
        raise UserError(
            f"{path} carries no recipe: it was not drawn by transfusion, or was saved again by others"
        )
    try:
        return _ADAPTER.validate_json(text)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(
            f"{path} has a recipe that this version does not read ({where or 'no JSON'}); use the version that made it"
        ) from None
