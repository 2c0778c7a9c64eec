"""What a source holds, where it stands and how long it is: all that planning needs, from the index of each shard.

Shape suffixes: N samples of the source, C their texts and captions, T tokens of these.
"""

from __future__ import annotations

import collections
import itertools
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transfusion.config import CacheConfig, CodecConfig, SourceConfig
from transfusion.data.cache import CacheSettings, RemoteShard
from transfusion.data.deck import Windows
from transfusion.data.indexing import HARMLESS, IndexPlace, find_shards, open_indexes, too_many_faults
from transfusion.data.latents import refuse_other_latents
from transfusion.data.sample import Fault
from transfusion.data.scan import is_shard
from transfusion.data.sequence import IMAGE_CONTROL_TOKENS, PAIR_CONTROL_TOKENS, TEXT_CONTROL_TOKENS
from transfusion.data.shardindex import Integers, OpenShards, ShardIndex
from transfusion.data.tokenizer import Tokenizer
from transfusion.errors import UserError
from transfusion.schema import ImageSegment, Segment, TextSegment

# Two bytes a token where the vocabulary allows.
TokenIds = NDArray[np.uint16] | NDArray[np.int32]


class SourceIndex:
    """The samples of one source that fit a row, and the faults that were left out.

    caption_start_N: N + 1 borders of each sample's captions in C; a text counts as one, and so does an
    interleaved document. text_tokens_C: ids of each. images_N: images in each sample's document.
    interleaved_N: whether the document has an order of its own. windows: the order of the samples, if remote.
    """

    def __init__(
        self,
        name: str,
        parts: Sequence[ShardIndex],
        *,
        patches: int,
        row_length: int,
        latent_channels: int = 0,
        window_shards: int = 1,
    ) -> None:
        """patches: of one image. latent_channels: of precomputed latents; 0: any. window_shards: of a remote source.

        What cannot be cut and is longer than a row is a fault; of several captions only those too long are left out.
        """
        self.name = name
        self.shards = tuple(part.shard for part in parts)
        self._parts, self._patches = tuple(parts), patches
        self._longest_caption = row_length - patches - PAIR_CONTROL_TOKENS
        views = [_View(part, patches, row_length, latent_channels) for part in parts]
        # Which samples of each shard are kept; None: all.
        self._kept = [view.kept for view in views]
        # A list, which is searched faster for one sample than an array.
        self._start_of_part = list(itertools.accumulate((len(view.captions_N) for view in views), initial=0))
        self.caption_start_N = np.zeros(self._start_of_part[-1] + 1, np.int64)
        if views:
            np.cumsum(np.concatenate([view.captions_N for view in views]), out=self.caption_start_N[1:])
        self.text_tokens_C: Integers = _joined([view.tokens_C for view in views], np.int64)
        self.images_N: Integers = _joined([view.images_N for view in views], np.int64)
        self.interleaved_N: NDArray[np.bool_] = _joined([view.interleaved_N for view in views], np.bool_)
        self.faults = tuple(fault for view in views for fault in view.faults)
        self.windows: Windows | None = None
        if any(isinstance(shard, RemoteShard) for shard in self.shards):
            self.windows = Windows(np.diff(self._start_of_part), window_shards)

    def __len__(self) -> int:
        return self._start_of_part[-1]

    @property
    def is_pair_N(self) -> NDArray[np.bool_]:
        """A picture with captions."""
        is_pair_N: NDArray[np.bool_] = (self.images_N > 0) & ~self.interleaved_N
        return is_pair_N

    def part(self, shard: int) -> ShardIndex:
        """The index of one shard, by its number."""
        return self._parts[shard]

    def key(self, sample: int) -> str:
        """Key of the sample, unique in its shard."""
        part, place = self._place(sample)
        return part.key(place)

    def text_ids(self, sample: int, caption: int = 0) -> TokenIds:
        """Ids of the sample's text, or of the caption with this number among its own."""
        part, place = self._place(sample)
        first, end = part.caption_start_N.item(place), part.caption_start_N.item(place + 1)
        if end - first > 1:
            lengths = part["tokens_C"][first:end]
            first += int(np.flatnonzero(lengths <= self._longest_caption)[caption])
        start_C = part.token_start_C
        ids: TokenIds = part["token_ids_T"][start_C.item(first) : start_C.item(first + 1)]
        return ids

    def segments(self, sample: int) -> tuple[list[Segment], list[int]]:
        """An interleaved document without its pixels, and for each image in it the number of its picture."""
        part, place = self._place(sample)
        ids, segments, pictures, first = self.text_ids(sample).tolist(), list[Segment](), list[int](), 0
        for element in part.elements(place):
            if element < 0:
                segments.append(ImageSegment(None, self._patches))
                pictures.append(-1 - element)
            else:
                segments.append(TextSegment(tuple(ids[first : first + element])))
                first += element
        return segments, pictures

    def read_picture(self, sample: int, picture: int = 0, shards: OpenShards | None = None) -> bytes:
        """Bytes of one of the sample's pictures or latents, as they are now in the shard. Raises OSError.

        shards: open ones, where several are read.
        """
        part, place = self._place(sample)
        return part.read_picture(place, picture, shards)

    def is_latent(self, sample: int, picture: int = 0) -> bool:
        """Whether these are latents, not a picture."""
        part, place = self._place(sample)
        return part.is_latent(place, picture)

    def fault(self, sample: int, reason: str) -> Fault:
        """A fault of this sample, found when it was read."""
        part, place = self._place(sample)
        return part.fault(place, reason)

    def _place(self, sample: int) -> tuple[ShardIndex, int]:
        number = bisect_right(self._start_of_part, sample) - 1
        place = sample - self._start_of_part[number]
        kept = self._kept[number]
        return self._parts[number], place if kept is None else int(kept[place])

    def __getstate__(self) -> dict[str, Any]:
        # Lengths are for planning, which workers do not; without them a large source starts at once there too.
        lengths = ("caption_start_N", "text_tokens_C", "images_N", "interleaved_N", "faults", "windows")
        return {name: value for name, value in self.__dict__.items() if name not in lengths}


class _View:
    """Of one shard what fits a row of this length. kept: numbers of these samples; None: all of them."""

    def __init__(self, part: ShardIndex, patches: int, row_length: int, latent_channels: int) -> None:
        self.captions_N: NDArray[Any] = part["captions_N"]
        self.tokens_C: NDArray[Any] = part["tokens_C"]
        self.images_N: NDArray[Any] = part.images_N
        self.interleaved_N: NDArray[np.bool_] = (part["elements_N"] > 0) & (self.images_N > 0)
        self.kept: Integers | None = None
        self.faults = list(part.faults())
        is_pair_C = np.repeat((self.images_N > 0) & ~self.interleaved_N, self.captions_N)
        fits_C = ~is_pair_C | (self.tokens_C <= row_length - patches - PAIR_CONTROL_TOKENS)
        if self.interleaved_N.any():
            longest_C = row_length - TEXT_CONTROL_TOKENS - np.repeat(
                self.images_N * (patches + IMAGE_CONTROL_TOKENS), self.captions_N
            )  # fmt: skip
            fits_C &= ~np.repeat(self.interleaved_N, self.captions_N) | (self.tokens_C <= longest_C)
        channels_I = part["latent_channels_I"]
        strange_I = (channels_I > 0) & (channels_I != latent_channels) & (latent_channels > 0)
        strange = set(np.repeat(np.arange(len(part)), part["pictures_N"])[strange_I].tolist())
        fits_C &= ~np.repeat(np.isin(np.arange(len(part)), list(strange)), self.captions_N)
        if not fits_C.all():
            self._leave_out(part, fits_C, strange)

    def _leave_out(self, part: ShardIndex, fits_C: NDArray[np.bool_], strange: set[int]) -> None:
        fitting_N = np.add.reduceat(fits_C, part.caption_start_N[:-1], dtype=np.int64)
        self.kept = np.flatnonzero(fitting_N)
        for sample in np.flatnonzero(fitting_N == 0).tolist():
            self.faults.append(part.fault(sample, "latent_shape" if sample in strange else "longer_than_row"))
        self.captions_N, self.tokens_C = fitting_N[self.kept], self.tokens_C[fits_C]
        self.images_N, self.interleaved_N = self.images_N[self.kept], self.interleaved_N[self.kept]


def build_index(
    source: SourceConfig,
    tokenizer: Tokenizer,
    *,
    patches: int,
    row_length: int,
    place: IndexPlace | None = None,
    latent_channels: int = 0,
    cache: CacheSettings | None = None,
    codec: CodecConfig | None = None,
) -> SourceIndex:
    """The index of a source; index files that are missing are made first.

    cache: for remote shards; None: the default one below this folder. codec: the one whose latents are taken; None:
    any. Raises UserError when a shard is missing, an index is stale, latents are of another codec, or no good sample
    is left.
    """
    cache = cache or CacheSettings.of(CacheConfig(), Path("cache"))
    shards = [shard for shard in find_shards(source.shards, cache) if is_shard(shard)]
    parts = open_indexes(shards, tokenizer, place or IndexPlace())
    for part in parts:
        # What stands beside a remote shard is not seen.
        if codec and isinstance(part.shard, Path) and part["latent_channels_I"].any():
            refuse_other_latents(part.shard, codec, source.name)
    index = SourceIndex(
        source.name,
        parts,
        patches=patches,
        row_length=row_length,
        latent_channels=latent_channels,
        window_shards=source.window_shards,
    )
    if not len(index):
        raise UserError(
            f"source {source.name} has no usable sample in {len(shards)} shards{_why(index.faults)}"
        )
    return index


def refuse_too_many(indexes: Iterable[SourceIndex], greatest_share: float) -> None:
    """Raises UserError for a source with too many faults, with its reasons."""
    for index in indexes:
        harm = [fault for fault in index.faults if fault.reason != HARMLESS]
        if too_many_faults(len(harm), len(harm) + len(index), greatest_share):
            raise UserError(
                f"source {index.name}: {len(harm)} of {len(harm) + len(index)} samples are bad{_why(harm)};"
                f" mend the shards or raise data.max_faults ({greatest_share})"
            )


def _joined(arrays: Sequence[NDArray[Any]], kind: type) -> NDArray[Any]:
    return np.concatenate(arrays).astype(kind) if arrays else np.empty(0, kind)


def _why(faults: Iterable[Fault]) -> str:
    counts = collections.Counter(fault.reason for fault in faults)
    return (
        f" ({', '.join(f'{reason}: {count}' for reason, count in counts.most_common(4))})" if counts else ""
    )
