"""The documents of one source in the order in which they are drawn, each with its variant, caption and length.

Shape suffixes: N samples of the source, C their texts and captions, D documents drawn together.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from transfusion.data.planning import hash_rng
from transfusion.files import hasher, name_hash
from transfusion.sequence.layout import IMAGE_CONTROL_TOKENS, PAIR_CONTROL_TOKENS, TEXT_CONTROL_TOKENS

Integers = NDArray[np.int64]
# Share of the tokens by step: (first step, share), the first from step 0 on.
Schedule = tuple[tuple[int, float], ...]

_ORDER, _DROP, _CAPTION_FIRST, _CAPTION, _SHARDS = (
    name_hash(name) for name in ("order", "caption drop", "caption first", "caption", "shards")
)
# Rows of a block, rounded to whole batches: enough that a document of many rows is spread over many batches.
_ROWS_PER_BLOCK = 512
# The order of the shards is kept of as many epochs: draws may lie on both sides of a border.
_EPOCHS_KEPT = 2


class Variant(enum.IntEnum):
    """How a sample is laid out."""

    TEXT = 0
    CAPTION_FIRST = 1
    IMAGE_FIRST = 2
    CAPTION_DROPPED = 3
    INTERLEAVED = 4


class Windows:
    """The order of a source whose shards are had one by one: shards permuted, and samples within a window of them.

    Each epoch permutes the K shards anew and cuts them into windows of `shards` (the last may have fewer); the
    samples of a window are permuted together. So an epoch holds each sample once, and needs each shard once.
    """

    def __init__(self, counts_K: Integers, shards: int) -> None:
        """counts_K: samples of each shard, in the order of the source."""
        self.counts_K, self.shards = np.asarray(counts_K, np.int64), shards
        self._first_K = np.cumsum(self.counts_K) - self.counts_K
        self._orders: dict[tuple[int, ...], tuple[Integers, Integers]] = {}

    def samples(self, place_D: Integers, seed: int, key: int, epoch: int) -> Integers:
        """The samples at these places of an epoch."""
        order_K, start_K = self._order(seed, key, epoch)
        # Borders of windows, and of the shards in their new order.
        window_W = start_K[:: self.shards]
        window_D = np.searchsorted(window_W, place_D, side="right") - 1
        inside_D = np.empty_like(place_D)
        for window in np.unique(window_D).tolist():
            here_D = window_D == window
            begin, end = int(window_W[window]), int(start_K[min((window + 1) * self.shards, len(order_K))])
            inside_D[here_D] = begin + hash_rng.permuted(
                place_D[here_D] - begin, end - begin, seed, _ORDER, key, epoch, window
            )
        turn_D = np.searchsorted(start_K[:-1], inside_D, side="right") - 1
        return self._first_K[order_K[turn_D]] + inside_D - start_K[turn_D]

    def shard_of(self, sample_D: Integers) -> Integers:
        """Number of the shard of each sample."""
        return np.searchsorted(self._first_K, sample_D, side="right") - 1

    def ahead(self, place: int, seed: int, key: int, epoch: int) -> Iterator[tuple[int, int]]:
        """Shards that the epoch needs from this place on: (place from which on, shard), window after window."""
        order_K, start_K = self._order(seed, key, epoch)
        for first in range(0, len(order_K), self.shards):
            last = min(first + self.shards, len(order_K))
            if start_K[last] > place:
                yield from ((max(place, int(start_K[first])), int(shard)) for shard in order_K[first:last])

    def _order(self, seed: int, key: int, epoch: int) -> tuple[Integers, Integers]:
        """Shards [K] in the order of an epoch, and the borders [K + 1] of their samples."""
        words = (seed, key, epoch)
        if words not in self._orders:
            shards = len(self.counts_K)
            order_K = hash_rng.permuted(np.arange(shards), shards, seed, _SHARDS, key, epoch)
            start_K = np.concatenate([[0], np.cumsum(self.counts_K[order_K])])
            while len(self._orders) >= _EPOCHS_KEPT:
                del self._orders[next(iter(self._orders))]
            self._orders[words] = order_K, start_K
        return self._orders[words]


class Lengths(Protocol):
    """What planning needs to know of a source: integers only, asked for many samples at once."""

    @property
    def name(self) -> str: ...

    @property
    def schedule(self) -> Schedule:
        """Share of the tokens by step."""

    @property
    def windows(self) -> Windows | None:
        """How samples are ordered where shards are remote; None: all are permuted together."""

    def __len__(self) -> int:
        """Samples."""

    def captions(self, sample_D: Integers) -> Integers:
        """How many texts or captions each sample has, at least 1."""

    def text_tokens(self, sample_D: Integers, caption_D: Integers) -> Integers:
        """Ids of this text or caption of each sample, without control tokens."""

    def image_tokens(self, sample_D: Integers) -> Integers:
        """Patches of each sample's images, with the control tokens of all but one; 0 says that it is a text."""

    def context_tokens(self, sample_D: Integers) -> Integers:
        """Patches of noised copies, for each sample in whose order a text or an image follows an image."""

    def interleaved(self, sample_D: Integers) -> NDArray[np.bool_]:
        """Whether each sample has images and an order of its own."""

    def digest(self) -> str:
        """Changes when any length does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceLengths:
    """The `Lengths` of an indexed source.

    caption_start_N: N + 1 borders of each sample's captions in C; a text counts as one.
    text_tokens_C: ids of each. images_N: images of each document. interleaved_N: whether these and its texts have an
    order of their own, else one image is a pair and none a text. patches: of one image; patches_N: where they differ,
    of all images of each document; image_sizes: the sizes that images take then. context_N: with
    `diffusion.context=clean`, patches of the images of each document that something follows, of a pair when it is the
    caption.
    """

    name: str
    schedule: Schedule
    caption_start_N: Integers
    text_tokens_C: Integers
    images_N: Integers
    interleaved_N: NDArray[np.bool_]
    patches: int
    windows: Windows | None = None
    patches_N: Integers | None = None
    image_sizes: tuple[str, ...] = ()
    context_N: Integers | None = None

    def __len__(self) -> int:
        return len(self.images_N)

    def captions(self, sample_D: Integers) -> Integers:
        return self.caption_start_N[sample_D + 1] - self.caption_start_N[sample_D]

    def text_tokens(self, sample_D: Integers, caption_D: Integers) -> Integers:
        return self.text_tokens_C[self.caption_start_N[sample_D] + caption_D]

    def image_tokens(self, sample_D: Integers) -> Integers:
        images_D = self.images_N[sample_D]
        patches_D = images_D * self.patches if self.patches_N is None else self.patches_N[sample_D]
        return np.where(images_D > 0, patches_D + (images_D - 1) * IMAGE_CONTROL_TOKENS, 0)

    def context_tokens(self, sample_D: Integers) -> Integers:
        return np.zeros_like(sample_D) if self.context_N is None else self.context_N[sample_D]

    def interleaved(self, sample_D: Integers) -> NDArray[np.bool_]:
        return self.interleaved_N[sample_D]

    def digest(self) -> str:
        known = hasher(8)
        known.update(f"{self.patches} {len(self)}".encode())
        for array in (self.text_tokens_C, self.caption_start_N, self.images_N, self.interleaved_N):
            known.update(np.ascontiguousarray(array).data)
        if self.patches_N is not None:
            known.update(f"patches of {self.image_sizes}".encode())
            known.update(np.ascontiguousarray(self.patches_N).data)
        if self.context_N is not None:
            known.update(b"clean context")
            known.update(np.ascontiguousarray(self.context_N).data)
        if self.windows is not None:
            known.update(f"{self.windows.shards} windows".encode())
            known.update(np.ascontiguousarray(self.windows.counts_K).data)
        return known.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantRule:
    """Shares of the variants. caption_dropout is decided first, caption_first among the others."""

    seed: int
    caption_first: float
    caption_dropout: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSettings:
    """rows: of a global batch. packing_buffer: rows that wait for fitting documents at once."""

    rows: int
    sequence_length: int
    packing_buffer: int
    variants: VariantRule

    @property
    def min_span(self) -> int:
        """A text is not cut into spans shorter than this."""
        return max(1, min(32, self.sequence_length // 8))

    @property
    def closing_gap(self) -> int:
        """A row with fewer free tokens is done."""
        return max(1, min(32, self.sequence_length // 64))

    @property
    def batches_per_block(self) -> int:
        return max(2, _ROWS_PER_BLOCK // self.rows)


class SpanTable(NamedTuple):
    """Spans [P] of documents: `tokens` tokens from `first` of a draw of a source; whole: its whole length."""

    source: Integers
    draw: Integers
    epoch: Integers
    sample: Integers
    first: Integers
    tokens: Integers
    variant: Integers
    caption: Integers
    whole: Integers

    @classmethod
    def concatenate(cls, tables: Sequence[SpanTable]) -> SpanTable:
        """The spans of the tables, one table after another."""
        return cls(*map(np.concatenate, zip(*tables, strict=True)))

    def at(self, places: Integers | slice) -> SpanTable:
        """The spans at these places."""
        return SpanTable(*(column[places] for column in self))


def share_at(schedule: Schedule, step: int) -> float:
    """The share that holds at a step."""
    return [share for first, share in schedule if first <= step][-1]


def next_change(schedules: Sequence[Schedule], step: int) -> int | None:
    """The first step after this one at which a share changes."""
    return min((first for schedule in schedules for first, _ in schedule if first > step), default=None)


class EpochOrder:
    """Documents of a source by the number of their draw; every epoch holds each sample exactly once."""

    def __init__(self, source: Lengths, rule: VariantRule) -> None:
        self.source = source
        self.size = len(source)
        self._rule = rule
        self._key = name_hash(source.name)

    def documents(self, draw_D: Integers) -> SpanTable:
        """These draws, uncut: a pure function of their numbers and the seed.

        Draw d is number d % size of epoch d // size. Sources are counted elsewhere, so the column `source` is 0.
        """
        epoch_D, place_D = np.divmod(draw_D, self.size)
        sample_D = np.empty_like(draw_D)
        for epoch in np.unique(epoch_D).tolist():
            here_D = epoch_D == epoch
            sample_D[here_D] = self._samples(place_D[here_D], epoch)
        patches_D = self.source.image_tokens(sample_D)
        variant_D = self._variants(epoch_D, sample_D, patches_D > 0)
        variant_D[self.source.interleaved(sample_D)] = int(Variant.INTERLEAVED)
        caption_D = self._captions(epoch_D, sample_D)
        text_D = self.source.text_tokens(sample_D, caption_D)
        text_D = np.where(variant_D == Variant.CAPTION_DROPPED, 0, text_D)
        control_D = np.where(patches_D > 0, PAIR_CONTROL_TOKENS, TEXT_CONTROL_TOKENS)
        is_followed_D = (variant_D == Variant.IMAGE_FIRST) | (variant_D == Variant.INTERLEAVED)
        copies_D = np.where(is_followed_D, self.source.context_tokens(sample_D), 0)
        tokens_D = (text_D + patches_D + control_D + copies_D).astype(np.int64)
        nothing_D = np.zeros_like(draw_D)
        return SpanTable(
            source=nothing_D,
            draw=draw_D,
            epoch=epoch_D,
            sample=sample_D,
            first=nothing_D,
            tokens=tokens_D,
            variant=variant_D,
            caption=caption_D,
            whole=tokens_D,
        )

    def shards_ahead(self, draw: int) -> Iterator[tuple[int, int]]:
        """Shards that draws from this one on need, in order and without end: (first draw that may, shard).

        Only of a source with windows.
        """
        windows = self.source.windows
        assert windows is not None
        epoch, place = divmod(draw, self.size)
        while True:
            for first, shard in windows.ahead(place, self._rule.seed, self._key, epoch):
                yield epoch * self.size + first, shard
            epoch, place = epoch + 1, 0

    def _samples(self, place_D: Integers, epoch: int) -> Integers:
        if self.source.windows is not None:
            return self.source.windows.samples(place_D, self._rule.seed, self._key, epoch)
        return hash_rng.permuted(place_D, self.size, self._rule.seed, _ORDER, self._key, epoch)

    def _variants(self, epoch_D: Integers, sample_D: Integers, is_pair_D: NDArray[np.bool_]) -> Integers:
        """`Variant` of each, by hashes of (seed, source, epoch, sample)."""
        rule = self._rule
        dropped_D = hash_rng.uniform(rule.seed, _DROP, self._key, epoch_D, sample_D) < rule.caption_dropout
        first_D = (
            hash_rng.uniform(rule.seed, _CAPTION_FIRST, self._key, epoch_D, sample_D) < rule.caption_first
        )
        pair_D = np.where(first_D, int(Variant.CAPTION_FIRST), int(Variant.IMAGE_FIRST))
        pair_D = np.where(dropped_D, int(Variant.CAPTION_DROPPED), pair_D)
        return np.where(is_pair_D, pair_D, int(Variant.TEXT)).astype(np.int64)

    def _captions(self, epoch_D: Integers, sample_D: Integers) -> Integers:
        """Which of its captions each has, by the same kind of hash."""
        place_D = hash_rng.uniform(self._rule.seed, _CAPTION, self._key, epoch_D, sample_D)
        return (place_D * self.source.captions(sample_D)).astype(np.int64)
