"""What an answer is made of, told as it comes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from PIL import Image
from torch import Tensor

from transfusion.generate.pillow_images import to_image
from transfusion.generate.recipe import Recipe
from transfusion.generate.request import Part
from transfusion.inference.runner import Media
from transfusion.sequence.sizes import Size


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More text.

    Attributes:
        text: What follows the text before. A letter that is not complete yet waits for the next event.
    """

    text: str


@dataclass(frozen=True, slots=True)
class ImageStart:
    """An image is begun.

    Attributes:
        index: Of the image in the answer, from 0.
        size: Height and width in pixels.
        steps: How often the model will be called for it.
    """

    index: int
    size: Size
    steps: int


@dataclass(frozen=True, slots=True)
class ImagePreview:
    """An image as it is expected to become.

    Attributes:
        index: Of the image in the answer, from 0.
        step: How often the model was called for it.
        pixels: uint8 [C, H, W] on the CPU, made without the codec's decoder.
    """

    index: int
    step: int
    pixels: Tensor

    @property
    def image(self) -> Image.Image:
        """For Pillow, grey or colour."""
        return to_image(self.pixels)


@dataclass(frozen=True, slots=True)
class ImageDone:
    """An image is finished.

    Attributes:
        index: Of the image in the answer, from 0.
        pixels: uint8 [C, H, W] on the CPU.
        seed: `Pipeline.sample` draws the first image of an answer again from this seed.
        recipe: `Pipeline.replay` makes the image again from it.
    """

    index: int
    pixels: Tensor
    seed: int
    recipe: Recipe

    @property
    def image(self) -> Image.Image:
        """For Pillow, grey or colour."""
        return to_image(self.pixels)


@dataclass(frozen=True, slots=True)
class MediaDone:
    """An array of another modality is finished.

    Attributes:
        index: Among images and arrays of the answer, from 0.
        media: On the CPU.
        seed: `Pipeline.sample_media` draws the first one of an answer again from this seed.
    """

    index: int
    media: Media
    seed: int


# Why an answer ended: by its own last token, at a limit of the request, where prompt and answer fill a row, because the
# one image asked for is finished, or since it was cancelled.
Reason = Literal["end", "tokens", "length", "image", "cancelled"]


@dataclass(frozen=True, slots=True)
class Done:
    """The answer is complete.

    Attributes:
        reason: Why it ended.
        prompt_positions: Tokens and patches of the prompt.
        tokens: Text tokens of the answer.
        images: Images of the answer, and arrays of other modalities.
    """

    reason: Reason
    prompt_positions: int
    tokens: int
    images: int


Event = TextDelta | ImageStart | ImagePreview | ImageDone | MediaDone | Done


def extend(parts: list[Part], event: Event) -> None:
    """Add what an event brings to the parts of an answer, where one text follows no other."""
    if isinstance(event, TextDelta):
        if parts and isinstance(parts[-1], str):
            parts[-1] += event.text
        else:
            parts.append(event.text)
    elif isinstance(event, ImageDone):
        parts.append(event.pixels)
    elif isinstance(event, MediaDone):
        parts.append(event.media)
