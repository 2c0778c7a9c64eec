"""What is asked of the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from transfusion.inference.image_diffusion import ImageSampling
from transfusion.inference.runner import Media, ModelRunner
from transfusion.inference.text_sampling import TextSampling
from transfusion.schema import Segment, TextSegment
from transfusion.sequence.sizes import IMAGE, Size
from transfusion.sequence.tokenizer import Tokenizer

# An image is uint8 [C, H, W].
Part = str | Tensor | Media


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to be answered.

    Attributes:
        prompt: Texts, images as uint8 [C, H, W] of one of the model's sizes, and arrays of other modalities.
        text: How text is chosen.
        image: How images are drawn. Where its size is None the model chooses.
        max_tokens: Maximum of text tokens.
        max_images: Maximum of images, and of arrays of other modalities.
        modalities: What the answer may begin beside text.
        draws: The answer is one image that follows the prompt at once. It needs a size.
        preview_every: Calls of the model from one preview of an image to the next. 0: none. Images that are drawn token
            by token have none.
    """

    prompt: Sequence[Part]
    text: TextSampling = field(default_factory=TextSampling)
    image: ImageSampling = field(default_factory=ImageSampling)
    max_tokens: int = 256
    max_images: int = 4
    modalities: tuple[str, ...] = (IMAGE,)
    draws: bool = False
    preview_every: int = 0


def segments(parts: Sequence[Part], runner: ModelRunner, tokenizer: Tokenizer) -> list[Segment]:
    """The parts of a prompt as those of a document."""
    found: list[Segment] = []
    for part in parts:
        if isinstance(part, str):
            found.append(TextSegment(tuple(tokenizer.encode(part))))
        else:
            found.append(runner.image(size(part), values(part)))
    return found


def media(parts: Sequence[Part]) -> list[Tensor | Media]:
    """Those of the parts that are no text."""
    return [part for part in parts if not isinstance(part, str)]


def values(part: Tensor | Media) -> Tensor:
    """Pixels of an image, or the array of another modality."""
    return part.values if isinstance(part, Media) else part


def size(part: Tensor | Media) -> Size:
    """Of an image, or of the array of another modality."""
    height, width = values(part).shape[1:]
    return Size(height, width, part.modality if isinstance(part, Media) else IMAGE)


def joined(parts: Sequence[Part], more: Sequence[Part], between: str = "") -> list[Part]:
    """Parts behind others, so that one text follows no other."""
    joined = list(parts)
    for part in more:
        if joined and isinstance(part, str) and isinstance(joined[-1], str):
            joined[-1] += between + part
        else:
            joined.append(part)
    return joined
