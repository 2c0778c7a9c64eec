"""The captioned images of a configuration's data, all of them or a few.

C channels, H/W image height and width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from transfusion.config import Config, SourceConfig
from transfusion.data.index.source_index import SourceIndex, build_indexes
from transfusion.data.loading.rows import RowSettings, read_values
from transfusion.data.loading.validation import documents
from transfusion.data.shards.sample import SampleError
from transfusion.errors import UserError
from transfusion.evaluate.progress_lines import ProgressLines
from transfusion.generate.pipeline import Pipeline
from transfusion.schema import ImageSegment, TextSegment
from transfusion.sequence.sizes import IMAGE
from transfusion.sequence.tokenizer import Tokenizer

# Images that a codec decodes at once.
_AT_ONCE = 64


class NoCaptionedImagesError(UserError):
    """The data hold no images with captions."""

    def __init__(self, where: str) -> None:
        super().__init__(f"{where} names no images with captions")


def single_images(
    config: Config, sources: Sequence[SourceConfig], tokenizer: Tokenizer
) -> Iterator[tuple[str, Tensor, str]]:
    """Key, values [C, H, W] and caption of the documents with one image, in file order."""
    sizes = config.media_sizes
    for document in documents(config, sources, tokenizer):
        images = [part for part in document.segments if isinstance(part, ImageSegment)]
        if len(images) == 1 and sizes.is_image(images[0].begin):
            texts = [part for part in document.segments if isinstance(part, TextSegment)]
            caption = "".join(tokenizer.decode(part.token_ids) for part in texts)
            yield document.key, torch.as_tensor(images[0].values_CHW), caption


def sources_of_the_same_name(config: Config) -> list[SourceConfig]:
    """The training sources of what is measured: those with a name of a validation source. Where none has one, all."""
    measured = {source.name for source in config.data.validation}
    return [source for source in config.data.sources if source.name in measured] or config.data.sources


def captioned_images(
    config: Config, tokenizer: Tokenizer, *, validation: bool
) -> tuple[list[Tensor], list[str]]:
    """uint8 [C, H, W] and captions of the single images of a configuration's sources, in file order.

    Raises UserError where there are none, or latents in their place.
    """
    where = "data.validation" if validation else "data.sources"
    sources = config.data.validation if validation else config.data.sources
    images, captions = [], []
    tell = ProgressLines(f"reading the images of {where}")
    for key, values_CHW, caption in tell.each(single_images(config, sources, tokenizer)):
        if values_CHW.dtype != torch.uint8:
            raise UserError(
                f"{where} has latents at {key}, and the classifier needs images; name their shards"
            )
        images.append(values_CHW)
        captions.append(caption)
    if not images:
        raise NoCaptionedImagesError(where)
    return images, captions


@torch.no_grad()
def training_images(pipeline: Pipeline) -> list[Tensor]:
    """uint8 [C, H, W]: the captioned training images, as the codec decodes them where they are stored as latents.

    Raises NoCaptionedImagesError.
    """
    tell = ProgressLines("reading the training images")
    found = tell.each(single_images(pipeline.config, pipeline.config.data.sources, pipeline.tokenizer))
    images = [values for _, values, _ in found]
    if not images:
        raise NoCaptionedImagesError("data.sources")
    return _pixels(pipeline, images)


class CaptionedSamples:
    """Which samples of the validation data are one image with a caption. None is read before it is asked for.

    Raises NoCaptionedImagesError where there are none.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline, self._settings = pipeline, RowSettings.of(pipeline.config)
        config = pipeline.config
        self._indexes = build_indexes(config, config.data.validation, pipeline.tokenizer)
        self._known = [
            (index, sample)
            for index in self._indexes
            for sample in np.flatnonzero(index.lengths.images_N == 1).tolist()
            if not config.modalities or index.modality(sample, _image_number(index, sample)) == IMAGE
        ]
        if not self._known:
            raise NoCaptionedImagesError("data.validation")

    def __len__(self) -> int:
        return len(self._known)

    @property
    def digests(self) -> dict[str, str]:
        """Of the contents of each source."""
        return {index.name: index.digest for index in self._indexes}

    def read(self, places: Iterable[int]) -> Iterator[tuple[Tensor, str]]:
        """Values [C, H, W] and captions at these places, without those that cannot be read or say nothing."""
        for place in places:
            index, sample = self._known[place]
            caption = self._pipeline.tokenizer.decode(index.text_ids(sample).tolist())
            try:
                values = torch.as_tensor(
                    read_values(index, sample, _image_number(index, sample), self._settings)
                )
            except (SampleError, OSError):
                continue
            if caption.strip():
                yield values, caption


@torch.no_grad()
def some_captioned_images(pipeline: Pipeline, most: int) -> tuple[list[Tensor], list[str], int]:
    """As `captioned_images`, a few of the validation data, evenly spread, and how many there are.

    No other image is read. Stored latents come as the codec decodes them. Raises NoCaptionedImagesError.
    """
    known = CaptionedSamples(pipeline)
    images, captions = [], []
    for values, caption in known.read(evenly(len(known), most)):
        images.append(values)
        captions.append(caption)
    if not images:
        raise NoCaptionedImagesError("data.validation")
    return _pixels(pipeline, images), captions, len(known)


def _pixels(pipeline: Pipeline, values: Sequence[Tensor]) -> list[Tensor]:
    """uint8 [C, H, W] each, in order: images as they are, and what the codec makes of latents or tokens."""
    images = list(values)
    shapes: dict[torch.Size, list[int]] = {}
    for place, values_CHW in enumerate(values):
        if values_CHW.dtype != torch.uint8:
            shapes.setdefault(values_CHW.shape, []).append(place)
    parts = [places[i : i + _AT_ONCE] for places in shapes.values() for i in range(0, len(places), _AT_ONCE)]
    for places in ProgressLines("decoding images").each(parts) if parts else ():
        encoded = torch.stack([values[place] for place in places]).to(pipeline.runner.device)
        encoded = encoded.float() if encoded.is_floating_point() else encoded.long()
        for place, image in zip(places, pipeline.runner.codec.decode(encoded).cpu(), strict=True):
            images[place] = image
    return images


def evenly(count: int, most: int) -> list[int]:
    """At most so many of the numbers below `count`, the first and the last among them."""
    return [round(place) for place in np.linspace(0, count - 1, min(most, count)).tolist()]


def _image_number(index: SourceIndex, sample: int) -> int:
    """Of the sample's stored images the one that its document shows."""
    return index.segments(sample)[1][0] if index.lengths.interleaved_N[sample] else 0
