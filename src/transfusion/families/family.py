"""What a family of models consists of."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from transfusion.codec import Codec
from transfusion.config import Config, DiffusionConfig
from transfusion.inference.cache import PagedCache, Row
from transfusion.inference.image_diffusion import ImageSampling
from transfusion.inference.image_scores import GivenImage, Score
from transfusion.inference.runner import ModelRunner
from transfusion.losses.loss import Loss
from transfusion.model.backbone import Backbone


class ImageDrawing(Protocol):
    """One image in the making, behind cached rows that end in <BOI>.

    Attributes:
        rows: The row that it continues, and under guidance one without a caption.
        calls: How often the model was called for it.
        all_calls: How often that will be.
        result: Latents or tokens of the image, as the codec decodes them, once it is done.
    """

    rows: list[Row]
    all_calls: int
    result: Tensor | None

    @property
    def calls(self) -> int: ...

    @property
    def group(self) -> Hashable:
        """Drawings of one group can be advanced together."""

    @property
    def preview(self) -> Tensor | None:
        """The finished latents as they can be predicted now, if they can."""


class ImageMetric(NamedTuple):
    """How the image loss of validation data is reported.

    Attributes:
        name: Of the metric, without that of the source.
        unit: Such as "nats/token". Empty where there is none.
        how: How it is measured. `{}` stands for the source.
    """

    name: str
    unit: str
    how: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """All that differs between families of models.

    Attributes:
        network: Built from the sections `model` and `codec`.
        loss: From a configuration and its open codec. Without a codec, batches hold what the network reads.
        drawing: Begins an image, from the network, the section `diffusion`, how it is drawn, and its rows. How it is
            drawn has its size, and as seed the key of its random numbers.
        advance: Calls the model once for drawings of one group.
        image_calls: How often drawing an image of so many patches calls the model.
        image_operations: Operations of forward and backward through what encodes and decodes one image. Takes the
            network, the shape [C, H, W] of the latents, whether blocks are computed again, and the modality.
        head_targets: How many tokens of an image with latents [C, H, W] the text head predicts.
        image_metric: How the validation suite reports the image loss.
        score: How likely an image is, if the family can tell. Takes the network, the section `diffusion`, the image,
            how many draws are made, and their seed.
    """

    network: type[Backbone]
    loss: Callable[[Config, Codec | None], Loss]
    drawing: Callable[[ModelRunner, DiffusionConfig, ImageSampling, Sequence[Row]], ImageDrawing]
    advance: Callable[[ModelRunner, PagedCache, Sequence[Any]], None]
    image_calls: Callable[[ImageSampling, DiffusionConfig, int], int]
    image_operations: Callable[[Backbone, tuple[int, int, int], bool, str], int]
    head_targets: Callable[[tuple[int, int, int]], int]
    image_metric: Callable[[DiffusionConfig], ImageMetric]
    score: Callable[[ModelRunner, DiffusionConfig, GivenImage, int, int], Score] | None = None
