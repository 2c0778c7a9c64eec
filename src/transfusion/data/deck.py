"""The documents of one source in the order in which they are drawn, each with its variant, caption and length.

Shape suffixes: N samples of the source, C their texts and captions, D documents drawn together.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from transfusion.data import keyed
from transfusion.data.sequence import IMAGE_CONTROL_TOKENS, PAIR_CONTROL_TOKENS, TEXT_CONTROL_TOKENS

Integers = NDArray[np.int64]
# Share of the tokens by step: (first step, share), the first from step 0 on.
Schedule = tuple[tuple[int, float], ...]

_ORDER, _DROP, _CAPTION_FIRST, _CAPTION = (
    keyed.word(name) for name in ("order", "caption drop", "caption first", "caption")
)


class Variant(enum.IntEnum):
    """How a sample is laid out."""

    TEXT = 0
    CAPTION_FIRST = 1
    IMAGE_FIRST = 2
    CAPTION_DROPPED = 3
    INTERLEAVED = 4


class Lengths(Protocol):
    """What planning needs to know of a source: integers only, asked for many samples at once."""

    @property
    def name(self) -> str: ...

    @property
    def schedule(self) -> Schedule:
        """Share of the tokens by step."""

    def __len__(self) -> int:
        """Samples."""

    def captions(self, sample_D: Integers) -> Integers:
        """How many texts or captions each sample has, at least 1."""

    def text_tokens(self, sample_D: Integers, caption_D: Integers) -> Integers:
        """Ids of this text or caption of each sample, without control tokens."""

    def image_tokens(self, sample_D: Integers) -> Integers:
        """Patches of each sample's images, with the control tokens of all but one; 0 says that it is a text."""

    def interleaved(self, sample_D: Integers) -> NDArray[np.bool_]:
        """Whether each sample has images and an order of its own."""

    def digest(self) -> str:
        """Changes when any length does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceLengths:
    """The `Lengths` of an indexed source.

    caption_start_N: N + 1 borders of each sample's captions in C; a text counts as one.
    text_tokens_C: ids of each. images_N: images of each document. interleaved_N: whether these and its texts have an
    order of their own, else one image is a pair and none a text.
    """

    name: str
    schedule: Schedule
    caption_start_N: Integers
    text_tokens_C: Integers
    images_N: Integers
    interleaved_N: NDArray[np.bool_]
    patches: int

    def __len__(self) -> int:
        return len(self.images_N)

    def captions(self, sample_D: Integers) -> Integers:
        counts: Integers = self.caption_start_N[sample_D + 1] - self.caption_start_N[sample_D]
        return counts

    def text_tokens(self, sample_D: Integers, caption_D: Integers) -> Integers:
        tokens: Integers = self.text_tokens_C[self.caption_start_N[sample_D] + caption_D]
        return tokens

    def image_tokens(self, sample_D: Integers) -> Integers:
        images_D = self.images_N[sample_D]
        each = self.patches + IMAGE_CONTROL_TOKENS
        return np.where(images_D > 0, images_D * each - IMAGE_CONTROL_TOKENS, 0)

    def interleaved(self, sample_D: Integers) -> NDArray[np.bool_]:
        return self.interleaved_N[sample_D]

    def digest(self) -> str:
        digest = hashlib.blake2b(f"{self.patches} {len(self)}".encode(), digest_size=8)
        for array in (self.text_tokens_C, self.caption_start_N, self.images_N, self.interleaved_N):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantRule:
    """Shares of the variants. caption_drop is decided first, caption_first among the others."""

    seed: int
    caption_first: float
    caption_drop: float


class Documents(NamedTuple):
    """Draws of one source: which sample in which epoch, how it is laid out, with which of its captions, how long."""

    epoch_D: Integers
    sample_D: Integers
    variant_D: Integers
    caption_D: Integers
    tokens_D: Integers


def share_at(schedule: Schedule, step: int) -> float:
    """The share that holds at a step."""
    return [share for first, share in schedule if first <= step][-1]


def next_change(schedules: Sequence[Schedule], step: int) -> int | None:
    """The first step after this one at which a share changes."""
    return min((first for schedule in schedules for first, _ in schedule if first > step), default=None)


class Deck:
    """Documents of a source by the number of their draw; every epoch holds each sample exactly once."""

    def __init__(self, source: Lengths, rule: VariantRule) -> None:
        self.source = source
        self.size = len(source)
        self._rule = rule
        self._key = keyed.word(source.name)

    def documents(self, draw_D: Integers) -> Documents:
        """These draws, a pure function of their numbers and the seed. Draw d is number d % size of epoch d // size."""
        epoch_D, place_D = np.divmod(draw_D, self.size)
        sample_D = np.empty_like(draw_D)
        for epoch in np.unique(epoch_D).tolist():
            here_D = epoch_D == epoch
            sample_D[here_D] = keyed.permuted(
                place_D[here_D], self.size, self._rule.seed, _ORDER, self._key, epoch
            )
        patches_D = self.source.image_tokens(sample_D)
        variant_D = self._variants(epoch_D, sample_D, patches_D > 0)
        variant_D[self.source.interleaved(sample_D)] = int(Variant.INTERLEAVED)
        caption_D = self._captions(epoch_D, sample_D)
        text_D = self.source.text_tokens(sample_D, caption_D)
        text_D = np.where(variant_D == Variant.CAPTION_DROPPED, 0, text_D)
        control_D = np.where(patches_D > 0, PAIR_CONTROL_TOKENS, TEXT_CONTROL_TOKENS)
        tokens_D = (text_D + patches_D + control_D).astype(np.int64)
        return Documents(epoch_D, sample_D, variant_D, caption_D, tokens_D)

    def _variants(self, epoch_D: Integers, sample_D: Integers, is_pair_D: NDArray[np.bool_]) -> Integers:
        """`Variant` of each, by hashes of (seed, source, epoch, sample)."""
        rule = self._rule
        dropped_D = keyed.uniform(rule.seed, _DROP, self._key, epoch_D, sample_D) < rule.caption_drop
        first_D = keyed.uniform(rule.seed, _CAPTION_FIRST, self._key, epoch_D, sample_D) < rule.caption_first
        pair_D = np.where(first_D, int(Variant.CAPTION_FIRST), int(Variant.IMAGE_FIRST))
        pair_D = np.where(dropped_D, int(Variant.CAPTION_DROPPED), pair_D)
        return np.where(is_pair_D, pair_D, int(Variant.TEXT)).astype(np.int64)

    def _captions(self, epoch_D: Integers, sample_D: Integers) -> Integers:
        """Which of its captions each has, by the same kind of hash."""
        place_D = keyed.uniform(self._rule.seed, _CAPTION, self._key, epoch_D, sample_D)
        chosen: Integers = (place_D * self.source.captions(sample_D)).astype(np.int64)
        return chosen
