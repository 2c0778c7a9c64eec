"""What a family of models consists of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from transfusion.codec import Codec
from transfusion.config import Config, DiffusionConfig
from transfusion.inference.cache import KeyValueCache
from transfusion.inference.image_diffusion import ImageSampling
from transfusion.inference.runner import ModelRunner
from transfusion.losses.loss import Loss
from transfusion.model.backbone import Backbone


class ImageGenerator(Protocol):
    """Draws images behind cached prefixes that end in <BOI>."""

    def __call__(
        self,
        runner: ModelRunner,
        prefixes: KeyValueCache,
        rows: Sequence[int],
        keys: Sequence[int],
        sampling: ImageSampling,
        config: DiffusionConfig,
        /,
    ) -> Tensor:
        """Latents or tokens of images, as the codec decodes them. Image i continues row rows[i] of `prefixes`, from the
        random numbers of keys[i]. `prefixes` stays as it is."""


class ImageMetric(NamedTuple):
    """How the image loss of validation data is named and told. how: `{}` stands for the source."""

    name: str
    unit: str
    how: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """All that differs between families of models.

    network: built from (model, codec) of a configuration. loss: of a configuration and its open codec; None: batches
    hold what the network reads. draw: images. image_operations: forward and backward through what encodes and decodes
    one image, by the network, the latents' shape [C, H, W], and whether blocks are computed again. head_targets: what
    the text head predicts of one image of that shape. image_metric: of the validation suite.
    """

    network: type[Backbone]
    loss: Callable[[Config, Codec | None], Loss]
    draw: ImageGenerator
    image_operations: Callable[[Backbone, tuple[int, int, int], bool], int]
    head_targets: Callable[[tuple[int, int, int]], int]
    image_metric: Callable[[DiffusionConfig], ImageMetric]
