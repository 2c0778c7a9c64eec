"""One planned row as arrays: its documents laid out, its images decoded, its random numbers drawn.

Stateless: the same plan gives the same row, in whichever process.
Shape suffixes: S positions of the row, A position axes, C channels, H/W image height and width.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from transfusion.config import Config, DiffusionConfig
from transfusion.data.images.decode import decode_to
from transfusion.data.images.latents import read_latent, read_tokens
from transfusion.data.index.shard_index import OpenShards
from transfusion.data.index.source_index import SourceIndex
from transfusion.data.planning import hash_rng
from transfusion.data.planning.epoch import Variant
from transfusion.data.planning.packing import DocumentSpan, RowPlan
from transfusion.data.shards.sample import Fault, SampleError
from transfusion.data.sounds.files import decode_to as decode_sound
from transfusion.files import name_hash
from transfusion.schema import ImageSegment, Modality, Segment, SpecialToken
from transfusion.sequence.layout import (
    TokenizedDocument,
    Twin,
    image_segment,
    lay_out_all,
    position_axes,
    tokenize_document,
    tokenize_pair,
    tokenize_text,
    with_twins,
)
from transfusion.sequence.sizes import IMAGE, MediaSizes
from transfusion.sequence.timesteps import CLEAN_TIMESTEP, TimestepLaw

_TIMESTEP, _NOISE = name_hash("timestep"), name_hash("noise")
# Decoded images are kept up to this size: a small data set is then decoded once, not once an epoch.
_CACHE_BYTES = 64 << 20
# uint8 pixels or float32 latents, [C, H, W], or int32 tokens [H, W].
Values = NDArray[np.uint8] | NDArray[np.float32] | NDArray[np.int32]
# Of an image, latents or tokens: source, sample, number among the sample's.
Place = tuple[int, int, int]


class NoiseLevels(NamedTuple):
    """How timesteps of a modality are drawn. most_when_read: those of what something follows are below this."""

    law: TimestepLaw
    most_when_read: int

    @classmethod
    def of(cls, diffusion: DiffusionConfig) -> NoiseLevels:
        law = TimestepLaw(
            diffusion.timestep_sampling,
            diffusion.timestep_shift,
            diffusion.steps,
            diffusion.logit_mean,
            diffusion.logit_std,
        )
        return cls(law, diffusion.max_timestep_before_caption or diffusion.steps)

    def draw(self, uniform: float, *, is_read: bool) -> int:
        """The timestep for a number in [0, 1)."""
        return self.law.draw(uniform, self.most_when_read if is_read else self.law.steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSettings:
    """The part of the configuration that decides what a row holds. noise, array_channels: by modality."""

    seed: int
    sequence_length: int
    axes: int
    channels: int
    latent_channels: int
    sizes: MediaSizes
    noise: Mapping[str, NoiseLevels]
    clean_context: bool = False
    causal_images: bool = False
    codebook_size: int = 0
    array_channels: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Config) -> RowSettings:
        diffusion = config.diffusion
        return cls(
            seed=config.run.seed,
            sequence_length=config.data.sequence_length,
            axes=position_axes(config.model.position),
            channels=config.codec.channels,
            latent_channels=config.codec.depth,
            sizes=config.media_sizes,
            noise={IMAGE: NoiseLevels.of(diffusion)}
            | {other.name: NoiseLevels.of(other.diffusion) for other in config.modalities},
            clean_context=diffusion.context == "clean",
            causal_images=config.model.image_attention == "causal",
            codebook_size=config.codec.codebook_size if config.codec.makes == "tokens" else 0,
            array_channels={other.name: other.channels for other in config.modalities},
        )


class RowImage(NamedTuple):
    """An image of the row: pixels or latents, the position of its first patch, its noise level and noise.

    is_context: it stands clean, to be read and not learned. Of another modality the values are its array.
    """

    values_CHW: Values
    first_patch: int
    patches: int
    timestep: int
    noise_key: int
    is_context: bool = False
    modality: str = IMAGE


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row as it enters a batch (see `schema.Batch`). samples: its spans, good and bad."""

    token_ids_S: NDArray[np.int64]
    modality_S: NDArray[np.uint8]
    position_SA: NDArray[np.int64]
    target_ids_S: NDArray[np.int64]
    text_weight_S: NDArray[np.float32]
    first_key_S: NDArray[np.int32]
    end_key_S: NDArray[np.int32]
    twins: tuple[Twin, ...]
    images: tuple[RowImage, ...]
    faults: tuple[Fault, ...]
    samples: int


class RowBuilder:
    """Builds rows from plans over these indexes."""

    def __init__(self, indexes: Sequence[SourceIndex], settings: RowSettings) -> None:
        self._indexes, self._settings = tuple(indexes), settings
        self._source_keys = [name_hash(index.name) for index in indexes]
        self._cache: dict[Place, Values] = {}
        self._cached_bytes = 0

    def build(self, plan: RowPlan) -> Row:
        """The planned row, of padding alone where no spans are planned.

        A sample that cannot be read keeps its place, masked out, as a fault of the row.
        """
        decoded, faults = self._decode(plan)
        tokenized = [self._tokenize(span, decoded.get(number, ())) for number, span in enumerate(plan)]
        if self._settings.clean_context:
            tokenized = [with_twins(each) for each in tokenized]
        bad = [number for number, span in enumerate(plan) if _has_images(span) and number not in decoded]
        images = self._images(plan, tokenized, decoded)
        return joined(tokenized, self._settings, images, faults, masked_out=bad)

    def _tokenize(self, span: DocumentSpan, values: Sequence[Values]) -> TokenizedDocument:
        """values: of its images; none of a span whose images could not be had."""
        index = self._indexes[span.source]
        if span.variant == Variant.TEXT:
            return tokenize_text(index.text_ids(span.sample, span.caption), span.first, span.tokens)
        if span.variant == Variant.INTERLEAVED:
            segments = index.segments(span.sample)[0]
            return tokenize_document(
                with_values(segments, values, self._settings.sizes) if values else segments
            )
        caption, image = index.text_ids(span.sample, span.caption), index.image(span.sample)
        if values and self._settings.sizes.is_multi_size:
            image = _cut(values[0], image, self._settings.sizes)
        return tokenize_pair(
            None if span.variant == Variant.CAPTION_DROPPED else caption,
            image,
            caption_first=span.variant == Variant.CAPTION_FIRST,
        )

    def _decode(self, plan: RowPlan) -> tuple[dict[int, list[Values]], tuple[Fault, ...]]:
        """The images of each span by its number, and the faults of those spans whose images could not be had."""
        decoded: dict[int, list[Values]] = {}
        faults: list[Fault] = []
        with OpenShards() as shards:
            for number, span in enumerate(plan):
                if not _has_images(span):
                    continue
                index = self._indexes[span.source]
                try:
                    decoded[number] = [
                        self._values((span.source, span.sample, image_number), shards)
                        for image_number in self._numbers(span)
                    ]
                except SampleError as error:
                    faults.append(index.fault(span.sample, str(error)))
                except OSError as error:
                    faults.append(index.fault(span.sample, f"unreadable shard ({error.strerror})"))
        return decoded, tuple(faults)

    def _numbers(self, span: DocumentSpan) -> Sequence[int]:
        """Which of the sample's images each image of the span is."""
        if span.variant != Variant.INTERLEAVED:
            return (0,)
        return self._indexes[span.source].segments(span.sample)[1]

    def _values(self, place: Place, shards: OpenShards) -> Values:
        """An image or latents, remembered while there is room. Raises SampleError and OSError."""
        if (values := self._cache.get(place)) is None:
            source, sample, number = place
            values = read_values(self._indexes[source], sample, number, self._settings, shards)
            if self._cached_bytes + values.nbytes <= _CACHE_BYTES:
                self._cache[place] = values
                self._cached_bytes += values.nbytes
        return values

    def _images(
        self, plan: RowPlan, tokenized: Sequence[TokenizedDocument], decoded: dict[int, list[Values]]
    ) -> tuple[RowImage, ...]:
        if not decoded:
            return ()
        starts = borders(tokenized)
        places = [(number, image) for number, values in decoded.items() for image in range(len(values))]
        # Timesteps and noise are hashes of (seed, source, epoch, sample, image).
        words = [
            (self._source_keys[plan[number].source], plan[number].epoch, plan[number].sample, image)
            for number, image in places
        ]
        columns = np.array(words, np.uint64).reshape(-1, 4).T
        uniforms = hash_rng.uniform(self._settings.seed, _TIMESTEP, *columns)
        noise_keys = hash_rng.bits(self._settings.seed, _NOISE, *columns) >> np.uint64(1)
        images: list[RowImage] = []
        drawn = zip(places, uniforms.tolist(), noise_keys.tolist(), strict=True)
        for (number, image), uniform, noise_key in drawn:
            document = tokenized[number]
            # What something reads is not noised beyond recognition, or not at all.
            is_read = not self._settings.clean_context and document.is_followed(image)
            span = plan[number]
            modality = self._indexes[span.source].modality(span.sample, self._numbers(span)[image])
            timestep = self._settings.noise[modality].draw(uniform, is_read=is_read)
            values = decoded[number][image]
            images += placed(document, starts[number], image, values, timestep, noise_key, modality)
        return tuple(images)


def placed(
    document: TokenizedDocument,
    start: int,
    image: int,
    values: Values,
    timestep: int,
    noise_key: int,
    modality: str = IMAGE,
) -> Iterator[RowImage]:
    """An image of a document that begins at `start`: noised at its place, or clean there and noised behind <EOS>."""
    first, patches, _ = document.images[image]
    for twin, of_image in document.twins:
        if of_image == image:
            yield RowImage(values, start + first, patches, CLEAN_TIMESTEP, noise_key, True, modality)
            first = twin
    yield RowImage(values, start + first, patches, timestep, noise_key, modality=modality)


def read_values(
    index: SourceIndex,
    sample: int,
    image_number: int,
    settings: RowSettings,
    shards: OpenShards | None = None,
) -> Values:
    """One of the sample's images as pixels, its latents or tokens, or an array. Raises SampleError and OSError.

    shards: open ones, where several are read.
    """
    data = index.read_image(sample, image_number, shards)
    size = index.size(sample, image_number) or settings.sizes.first
    if size.modality != IMAGE:
        is_array = index.is_latent(sample, image_number)
        array = read_latent(data) if is_array else decode_sound(data, size.width)
        if array.shape != (settings.array_channels[size.modality], *size.sides):
            raise SampleError("latent_shape")
        return array
    if not index.is_latent(sample, image_number):
        turned = settings.sizes.rotated(size)
        return decode_to(data, size, turned=turned, channels=settings.channels, resize=settings.sizes.resize)
    latent: Values
    shape: tuple[int, ...] = settings.sizes.latents(size)
    if settings.codebook_size:
        latent = read_tokens(data, settings.codebook_size)
    else:
        latent, shape = read_latent(data), (settings.latent_channels, *shape)
    if latent.shape != shape:
        raise SampleError("latent_shape")
    return latent


def with_values(segments: Sequence[Segment], values: Sequence[Values], sizes: MediaSizes) -> list[Segment]:
    """The document with its images, in order, each cut as its values are: one may have been turned upright."""
    remaining = iter(values)
    return [
        _cut(next(remaining), segment, sizes) if isinstance(segment, ImageSegment) else segment
        for segment in segments
    ]


def _cut(values: Values, planned: ImageSegment, sizes: MediaSizes) -> ImageSegment:
    size = sizes.of(values) if sizes.is_image(planned.begin) else None
    return image_segment(sizes, size, values) if size else replace(planned, values_CHW=values)


def _has_images(span: DocumentSpan) -> bool:
    return span.variant != Variant.TEXT


def borders(tokenized: Sequence[TokenizedDocument]) -> list[int]:
    """Where each document begins when they stand one after another, and where the last ends."""
    return list(itertools.accumulate((len(each.token_ids_S) for each in tokenized), initial=0))


def joined(
    tokenized: Sequence[TokenizedDocument],
    settings: RowSettings,
    images: tuple[RowImage, ...],
    faults: tuple[Fault, ...],
    masked_out: Sequence[int] = (),
) -> Row:
    """Documents one after another, then padding, which sees nothing and which nothing sees.

    masked_out: numbers of documents that keep their length and what they see, with nothing to read or to learn.
    """
    starts = borders(tokenized)
    layout = lay_out_all(tokenized, axes=settings.axes, causal_images=settings.causal_images)
    used, length = starts[-1], settings.sequence_length
    row = Row(
        token_ids_S=_padded(layout.token_ids_S, length, SpecialToken.PADDING),
        modality_S=_padded(layout.modality_S, length, Modality.PADDING),
        position_SA=_padded(layout.position_SA, length, 0),
        target_ids_S=_padded(layout.target_ids_S, length, SpecialToken.PADDING),
        text_weight_S=_padded(layout.text_weight_S, length, 0),
        first_key_S=_padded(layout.first_key_S, length, used),
        end_key_S=_padded(layout.end_key_S, length, used),
        twins=layout.twins,
        images=images,
        faults=faults,
        samples=len(tokenized),
    )
    for number in masked_out:
        here = slice(*starts[number : number + 2])
        row.token_ids_S[here] = row.target_ids_S[here] = SpecialToken.PADDING
        row.modality_S[here] = Modality.PADDING
        row.text_weight_S[here] = 0
    return row


def _padded(values: NDArray[Any], length: int, filling: int) -> NDArray[Any]:
    """[S, ...] to `length` positions."""
    padded = np.full((length, *values.shape[1:]), filling, values.dtype)
    padded[: len(values)] = values
    return padded
