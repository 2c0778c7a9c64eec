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
        """Draw images.

        Args:
            runner: The network, with its codec and sizes.
            prefixes: What comes before each image. It must not be changed.
            rows: Image i continues row rows[i] of `prefixes`.
            keys: Image i is drawn from the random numbers of keys[i].
            sampling: Guidance, steps, sampler and size.
            config: The section `diffusion`.

        Returns:
            Latents or tokens of the images, as the codec decodes them.
        """


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
        draw: Draws images.
        image_calls: How often drawing images of so many patches calls the model.
        image_operations: Operations of forward and backward through what encodes and decodes one image. Takes the
            network, the shape [C, H, W] of the latents, and whether blocks are computed again.
        head_targets: How many tokens of an image with latents [C, H, W] the text head predicts.
        image_metric: How the validation suite reports the image loss.
    """

    network: type[Backbone]
    loss: Callable[[Config, Codec | None], Loss]
    draw: ImageGenerator
    image_calls: Callable[[ImageSampling, DiffusionConfig, int], int]
    image_operations: Callable[[Backbone, tuple[int, int, int], bool], int]
    head_targets: Callable[[tuple[int, int, int]], int]
    image_metric: Callable[[DiffusionConfig], ImageMetric]
