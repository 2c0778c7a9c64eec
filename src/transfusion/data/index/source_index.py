"""What a source holds, where it stands and how long it is: all that planning needs, from the index of each shard.

Shape suffixes: N samples of the source, C their texts and captions, T tokens of these.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transfusion.config import CacheConfig, CodecConfig, Config, SourceConfig
from transfusion.config.sections import SourceKind
from transfusion.data.images.latents import refuse_other_latents
from transfusion.data.index.build import (
    HARMLESS,
    IndexLocation,
    cache_of,
    faults_of,
    find_shards,
    open_indexes,
    too_many_faults,
)
from transfusion.data.index.shard_index import Integers, OpenShards, ShardIndex
from transfusion.data.planning.epoch import Schedule, SourceLengths, Windows
from transfusion.data.remote.cache import CacheSettings
from transfusion.data.shards.sample import Fault, reasons
from transfusion.data.shards.scan import pick_shards
from transfusion.errors import UserError
from transfusion.files import fingerprint
from transfusion.schema import ImageSegment, Segment, TextSegment
from transfusion.sequence.layout import (
    IMAGE_CONTROL_TOKENS,
    PAIR_CONTROL_TOKENS,
    TEXT_CONTROL_TOKENS,
    image_segment,
)
from transfusion.sequence.sizes import IMAGE, MediaSizes, Size
from transfusion.sequence.tokenizer import Tokenizer

# Two bytes a token where the vocabulary allows.
TokenIds = NDArray[np.uint16] | NDArray[np.int32]


class SourceIndex:
    """The samples of one source that fit a row, and the faults that were left out. lengths: what planning is told."""

    def __init__(
        self,
        name: str,
        parts: Sequence[ShardIndex],
        *,
        patches: int,
        sequence_length: int,
        latent_channels: int = 0,
        shuffle_window: int = 1,
        sizes: MediaSizes | None = None,
        modality_channels: Sequence[int] = (),
        schedule: Schedule = ((0, 1.0),),
        kind: SourceKind = "auto",
        clean_context: bool = False,
        captions_follow: bool = True,
    ) -> None:
        """patches: of one image, or with `sizes` those of the size that it takes. latent_channels: of precomputed
        latents; 0: any. modality_channels: of arrays of further modalities of `sizes`. shuffle_window: of a remote
        source. clean_context: images that something follows take their patches twice (`diffusion.context`).
        captions_follow: whether a caption may follow its image.

        What cannot be cut and is longer than a row is a fault; of several captions only those too long are left out.
        """
        self.name = name
        self.shards = tuple(part.shard for part in parts)
        self._parts, self._patches, self._sequence_length = tuple(parts), patches, sequence_length
        self._sizes = sizes if sizes and sizes.is_multi_size else None
        self._image = ImageSegment(None, patches)
        self._modalities = sizes.modalities if sizes else (IMAGE,)
        channels = np.array([latent_channels, *modality_channels], np.int64)
        others = sizes.others if sizes else ()
        widest = np.array([0, *(max(size.width for size in other.sizes) for other in others)], np.int64)
        self._clean_context, self._captions_follow = clean_context, captions_follow
        self._size_numbers: dict[int, NDArray[np.uint8]] = {}
        views = [
            _FittingSamples(
                part,
                faults,
                self._document_patches(part, number),
                self._context_patches(part, number),
                sequence_length,
                part.modality_I(self._modalities),
                channels,
                widest,
                kind,
            )
            for number, (part, faults) in enumerate(
                zip(parts, faults_of(parts, [kind] * len(parts)), strict=True)
            )
        ]
        # Which samples of each shard are kept; None: all.
        self._kept = [view.kept for view in views]
        # A list, which is searched faster for one sample than an array.
        self._start_of_part = list(itertools.accumulate((len(view.captions_N) for view in views), initial=0))
        self.faults = tuple(fault for view in views for fault in view.faults)
        self.lengths = SourceLengths(
            name=name,
            schedule=schedule,
            caption_start_N=_sums(_joined([view.captions_N for view in views], np.int64)),
            text_tokens_C=_joined([view.tokens_C for view in views], np.int64),
            images_N=_joined([view.images_N for view in views], np.int64),
            interleaved_N=_joined([view.interleaved_N for view in views], np.bool_),
            patches=patches,
            windows=Windows(np.diff(self._start_of_part), shuffle_window) if self.is_remote else None,
            patches_N=_joined([view.patches_N for view in views], np.int64) if self._sizes else None,
            image_sizes=tuple(map(str, self._sizes.all)) if self._sizes else (),
            context_N=_joined([view.context_N for view in views], np.int64) if clean_context else None,
        )

    def __len__(self) -> int:
        return self._start_of_part[-1]

    @property
    def is_remote(self) -> bool:
        """Whether shards of the source have to be fetched."""
        return any(shard.is_remote for shard in self.shards)

    @property
    def is_pair_N(self) -> NDArray[np.bool_]:
        """An image with captions."""
        return (self.lengths.images_N > 0) & ~self.lengths.interleaved_N

    @property
    def digest(self) -> str:
        """Changes with any byte of a local shard, and with name and size of a remote one."""
        facts = [
            [part.shard_bytes, part.copy_name if part.shard.folder is None else part.digest]
            for part in self._parts
        ]
        return fingerprint(facts)

    def part(self, shard: int) -> ShardIndex:
        """The index of one shard, by its number."""
        return self._parts[shard]

    def key(self, sample: int) -> str:
        """Key of the sample, unique in its shard."""
        _, part, place = self._located(sample)
        return part.key(place)

    def text_ids(self, sample: int, caption: int = 0) -> TokenIds:
        """Ids of the sample's text, or of the caption with this number among its own."""
        _, part, place = self._located(sample)
        first, end = part.caption_start_N.item(place), part.caption_start_N.item(place + 1)
        if end - first > 1:
            lengths = part["tokens_C"][first:end]
            copies = 2 if self._clean_context and self._captions_follow else 1
            longest = self._sequence_length - copies * self.image(sample).patches - PAIR_CONTROL_TOKENS
            first += int(np.flatnonzero(lengths <= longest)[caption])
        start_C = part.token_start_C
        return part["token_ids_T"][start_C.item(first) : start_C.item(first + 1)]

    def segments(self, sample: int) -> tuple[list[Segment], list[int]]:
        """An interleaved document without its pixels, and which of the sample's images each image in it is."""
        _, part, place = self._located(sample)
        ids, segments, images, first = self.text_ids(sample).tolist(), list[Segment](), list[int](), 0
        for element in part.elements(place):
            if element < 0:
                segments.append(self.image(sample, -1 - element))
                images.append(-1 - element)
            else:
                segments.append(TextSegment(tuple(ids[first : first + element])))
                first += element
        return segments, images

    def image(self, sample: int, image_number: int = 0) -> ImageSegment:
        """One of the sample's images as planned, without its pixels."""
        size = self.size(sample, image_number)
        return image_segment(self._sizes, size) if self._sizes and size else self._image

    def size(self, sample: int, image_number: int = 0) -> Size | None:
        """The size that one of the sample's images takes; None: there is only one."""
        if self._sizes is None:
            return None
        number, part, place = self._located(sample)
        return self._sizes.all[self._numbers(part, number)[part.image_start_N[place] + image_number]]

    def modality(self, sample: int, image_number: int = 0) -> str:
        """Of one of the sample's images: `image`, or the name of another."""
        if len(self._modalities) == 1:
            return IMAGE
        size = self.size(sample, image_number)
        return size.modality if size else IMAGE

    def images_by_size(self) -> dict[str, int]:
        """Stored images, those of documents left out among them, by the size that they take; empty: there is one."""
        if self._sizes is None:
            return {}
        number_I = np.concatenate([self._numbers(part, number) for number, part in enumerate(self._parts)])
        counts_K = np.bincount(number_I, minlength=len(self._sizes.all)).tolist()
        return {str(size): count for size, count in zip(self._sizes.all, counts_K, strict=True)}

    def _numbers(self, part: ShardIndex, number: int) -> NDArray[np.uint8]:
        """Of each stored image of a shard the number of its size."""
        if self._sizes is not None and number not in self._size_numbers:
            shape = part["image_height_I"], part["image_width_I"], part["latent_channels_I"] > 0
            modality_I = part.modality_I(self._modalities) if self._sizes.others else None
            self._size_numbers[number] = self._sizes.numbers(*shape, modality_I).astype(np.uint8)
        return self._size_numbers[number]

    def _document_patches(self, part: ShardIndex, number: int) -> Integers:
        """Patches [N] of all images of each sample's document, in one shard."""
        if self._sizes is None:
            return part.images_N * self._patches
        patches_I = self._sizes.patches_K[self._numbers(part, number)]
        stored_N = np.diff(_sums(patches_I)[part.image_start_N])
        element_E = part["element_E"].astype(np.int64)
        if not element_E.size:
            return stored_N
        # The same image may stand in a document several times.
        image_E = np.repeat(part.image_start_N[:-1], part["elements_N"]) - 1 - element_E
        shown_E = np.zeros_like(element_E)
        shown_E[element_E < 0] = patches_I[image_E[element_E < 0]]
        shown_N = np.diff(_sums(shown_E)[part.element_start_N])
        return np.where(part["elements_N"] > 0, shown_N, stored_N)

    def _context_patches(self, part: ShardIndex, number: int) -> Integers:
        """Patches [N] of the images of each sample's document that something follows, or may; 0 without copies."""
        if not self._clean_context:
            return np.zeros(len(part), np.int64)
        patches_N = self._document_patches(part, number).copy()
        element_E, start_N = part["element_E"].astype(np.int64), part.element_start_N
        has_order_N = part["elements_N"] > 0
        last_N = np.zeros(len(part), np.int64)
        last_N[has_order_N] = element_E[start_N[1:][has_order_N] - 1]
        ends_N = has_order_N & (last_N < 0)
        if not self._captions_follow:
            patches_N[~has_order_N] = 0
        if self._sizes is None:
            return patches_N - ends_N * self._patches
        patches_I = self._sizes.patches_K[self._numbers(part, number)]
        image_N = part.image_start_N[:-1][ends_N] - 1 - last_N[ends_N]
        patches_N[ends_N] -= patches_I[image_N]
        return patches_N

    def read_image(self, sample: int, image_number: int = 0, shards: OpenShards | None = None) -> bytes:
        """Bytes of one of the sample's images or latents, as they are now in the shard. Raises OSError.

        shards: open ones, where several are read.
        """
        _, part, place = self._located(sample)
        return part.read_image(place, image_number, shards)

    def is_latent(self, sample: int, image_number: int = 0) -> bool:
        """Whether these are latents, not an image."""
        _, part, place = self._located(sample)
        return part.is_latent(place, image_number)

    def fault(self, sample: int, reason: str) -> Fault:
        """A fault of this sample, found when it was read."""
        _, part, place = self._located(sample)
        return part.fault(place, reason)

    def _located(self, sample: int) -> tuple[int, ShardIndex, int]:
        """Number of the shard, its index, and the number of the sample there."""
        number = bisect_right(self._start_of_part, sample) - 1
        place = sample - self._start_of_part[number]
        kept = self._kept[number]
        return number, self._parts[number], place if kept is None else int(kept[place])

    def __getstate__(self) -> dict[str, Any]:
        # Lengths are for planning, which workers do not; without them a large source starts at once there too.
        kept = {name: value for name, value in self.__dict__.items() if name not in ("lengths", "faults")}
        return kept | {"_size_numbers": {}}


class _FittingSamples:
    """Of one shard what fits a row of this length. kept: numbers of these samples; None: all of them.

    patches_N: of all images of each sample's document. context_N: of noised copies beside them. modality_I: of stored
    images and arrays. -1: the configuration does not declare it. channels_M: of stored latents or arrays, by modality.
    widest_M: width of its widest size.
    """

    def __init__(
        self,
        part: ShardIndex,
        faults: list[Fault],
        patches_N: Integers,
        context_N: Integers,
        sequence_length: int,
        modality_I: NDArray[np.int8],
        channels_M: Integers,
        widest_M: Integers,
        kind: SourceKind,
    ) -> None:
        self.captions_N: NDArray[Any] = part["captions_N"]
        self.tokens_C: NDArray[Any] = part["tokens_C"]
        self.images_N: NDArray[Any] = part.images_N
        self.interleaved_N: NDArray[np.bool_] = (part["elements_N"] > 0) & (self.images_N > 0)
        self.patches_N, self.context_N = patches_N, context_N
        self.kept: Integers | None = None
        self.faults = faults
        images_N = patches_N + context_N + self.images_N * IMAGE_CONTROL_TOKENS
        longest_N = sequence_length - TEXT_CONTROL_TOKENS - images_N
        is_cut_N = self.images_N == 0
        fits_C = np.repeat(is_cut_N, self.captions_N) | (
            self.tokens_C <= np.repeat(longest_N, self.captions_N)
        )
        channels_I, own_I = part["latent_channels_I"], channels_M[modality_I]
        is_other_I = (channels_I > 0) & (channels_I != own_I) & (own_I > 0)
        is_long_I = (modality_I > 0) & (channels_I == 0) & (part["image_width_I"] > widest_M[modality_I])
        strange_I = is_other_I | is_long_I | (modality_I < 0)
        sample_I = np.repeat(np.arange(len(part)), part["stored_images_N"])
        strange, undeclared, long = (
            set(sample_I[which_I].tolist()) for which_I in (strange_I, modality_I < 0, is_long_I)
        )
        fits_C &= ~np.repeat(np.isin(np.arange(len(part)), list(strange)), self.captions_N)
        # Those of another kind are among the faults already.
        wrong_N = part.stray_N(kind)
        fits_C &= ~np.repeat(wrong_N, self.captions_N)
        if fits_C.all():
            return
        fitting_N = np.add.reduceat(fits_C, part.caption_start_N[:-1], dtype=np.int64)
        self.kept = np.flatnonzero(fitting_N)
        for sample in np.flatnonzero((fitting_N == 0) & ~wrong_N).tolist():
            reason = "latent_shape" if sample in strange else "longer_than_row"
            reason = "sound_too_long" if sample in long else reason
            reason = "modality_undeclared" if sample in undeclared else reason
            self.faults.append(part.fault(sample, reason))
        self.captions_N, self.tokens_C = fitting_N[self.kept], self.tokens_C[fits_C]
        self.images_N, self.interleaved_N = self.images_N[self.kept], self.interleaved_N[self.kept]
        self.patches_N, self.context_N = self.patches_N[self.kept], self.context_N[self.kept]


def build_index(
    source: SourceConfig,
    tokenizer: Tokenizer,
    *,
    patches: int,
    sequence_length: int,
    place: IndexLocation | None = None,
    latent_channels: int = 0,
    cache: CacheSettings | None = None,
    codec: CodecConfig | None = None,
    sizes: MediaSizes | None = None,
    modality_channels: Sequence[int] = (),
    clean_context: bool = False,
    captions_follow: bool = True,
) -> SourceIndex:
    """The index of a source; index files that are missing are made first.

    patches, sizes, modality_channels, clean_context, captions_follow: see `SourceIndex`. cache: for remote shards;
    None: the default one below this folder. codec: the one whose latents are taken; None: any. Raises UserError when a
    shard is missing, an index is stale, latents are of another codec, or no good sample is left.
    """
    cache = cache or CacheSettings.of(CacheConfig(), Path("cache"))
    found = find_shards(source.shards, cache)
    shards = pick_shards(found, f"source {source.name}")
    parts = open_indexes(shards, tokenizer, place or IndexLocation(), source.verify)
    for part in parts:
        # What stands beside a remote shard is not seen.
        beside = part.shard.folder
        if codec and beside is not None and part.has_latents:
            refuse_other_latents(beside / part.shard.name, part.digest, codec, source.name)
    index = SourceIndex(
        source.name,
        parts,
        patches=patches,
        sequence_length=sequence_length,
        latent_channels=latent_channels,
        shuffle_window=source.shuffle_window,
        sizes=sizes,
        modality_channels=modality_channels,
        schedule=source.schedule,
        kind=source.kind,
        clean_context=clean_context,
        captions_follow=captions_follow,
    )
    if not len(index):
        raise UserError(
            f"source {source.name} has no usable sample in {len(shards)} shards{reasons(index.faults)}"
        )
    return index


def build_indexes(
    config: Config,
    sources: Sequence[SourceConfig],
    tokenizer: Tokenizer,
    *,
    captions_follow: bool = True,
) -> list[SourceIndex]:
    """The index of each source, for rows and images of this configuration; missing files of it are made.

    captions_follow: False where no caption comes after its image, and so no pair has a noised copy.
    """
    return [
        build_index(
            source,
            tokenizer,
            patches=config.patches_per_image,
            sequence_length=config.data.sequence_length,
            place=IndexLocation.of(config),
            latent_channels=source.latent_channels or config.codec.stored_channels,
            cache=cache_of(config),
            codec=config.codec,
            sizes=config.media_sizes,
            modality_channels=[modality.channels for modality in config.modalities],
            clean_context=config.diffusion.context == "clean",
            captions_follow=captions_follow,
        )
        for source in sources
    ]


def refuse_too_many(indexes: Iterable[SourceIndex], max_share: float) -> None:
    """Raises UserError for a source with too many faults, with its reasons."""
    for index in indexes:
        harm = [fault for fault in index.faults if fault.reason != HARMLESS]
        lost = sum(fault.lost for fault in harm)
        if too_many_faults(lost, lost + len(index), max_share):
            raise UserError(
                f"source {index.name}: {lost} of {lost + len(index)} samples are bad{reasons(harm)};"
                f" `transfusion data index` lists them; fix the shards, or raise data.max_bad_fraction ({max_share})"
            )


def _sums(counts: NDArray[Any]) -> Integers:
    """Of none, of the first, of the first two, and so on."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def _joined(arrays: Sequence[NDArray[Any]], kind: type) -> NDArray[Any]:
    return np.concatenate(arrays).astype(kind) if arrays else np.empty(0, kind)
