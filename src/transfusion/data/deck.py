"""The documents of one source in the order in which they are drawn, each with its variant and length.

Shape suffixes: N samples of the source, D documents drawn together.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from transfusion.data import keyed
from transfusion.data.sequence import PAIR_CONTROL_TOKENS, TEXT_CONTROL_TOKENS

_ORDER, _DROP, _CAPTION_FIRST = (keyed.word(name) for name in ("order", "caption drop", "caption first"))
_DRAWN_TOGETHER = 1024


class Variant(enum.IntEnum):
    """How a sample is laid out."""

    TEXT = 0
    CAPTION_FIRST = 1
    IMAGE_FIRST = 2
    CAPTION_DROPPED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceLengths:
    """What planning needs to know of a source: integers only.

    text_tokens_N: ids of each sample's text or caption. is_pair_N: whether it has a picture.
    """

    name: str
    share: float
    text_tokens_N: NDArray[np.int64]
    is_pair_N: NDArray[np.bool_]
    patches: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantRule:
    """Shares of the variants. caption_drop is decided first, caption_first among the others."""

    seed: int
    caption_first: float
    caption_drop: float


class Drawn(NamedTuple):
    """One draw: which sample, how it is laid out, and its whole length in tokens."""

    epoch: int
    sample: int
    variant: int
    tokens: int


class Deck:
    """Documents of a source by (epoch, position); every epoch holds each sample exactly once."""

    def __init__(self, source: SourceLengths, rule: VariantRule) -> None:
        self.source = source
        self.size = len(source.text_tokens_N)
        self._rule = rule
        self._key = keyed.word(source.name)
        self._chunk: tuple[int, int] | None = None
        self._drawn: list[Drawn] = []

    def document(self, epoch: int, position: int) -> Drawn:
        """The document at this position of this epoch, a pure function of both and the seed."""
        chunk = (epoch, position // _DRAWN_TOGETHER)
        if chunk != self._chunk:
            self._chunk, self._drawn = chunk, self._draw(*chunk)
        return self._drawn[position % _DRAWN_TOGETHER]

    def _draw(self, epoch: int, chunk: int) -> list[Drawn]:
        first = chunk * _DRAWN_TOGETHER
        positions = np.arange(first, min(first + _DRAWN_TOGETHER, self.size))
        sample_D = keyed.permuted(positions, self.size, self._rule.seed, _ORDER, self._key, epoch)
        variant_D = self.variants(epoch, sample_D)
        tokens_D = self.lengths(sample_D, variant_D)
        triples = zip(sample_D.tolist(), variant_D.tolist(), tokens_D.tolist(), strict=True)
        return [Drawn(epoch, *triple) for triple in triples]

    def variants(self, epoch: int, sample_D: NDArray[np.int64]) -> NDArray[np.int64]:
        """`Variant` of each sample in this epoch, by hashes of (seed, source, epoch, sample)."""
        rule = self._rule
        dropped_D = keyed.uniform(rule.seed, _DROP, self._key, epoch, sample_D) < rule.caption_drop
        caption_D = keyed.uniform(rule.seed, _CAPTION_FIRST, self._key, epoch, sample_D) < rule.caption_first
        pair_D = np.where(caption_D, Variant.CAPTION_FIRST, Variant.IMAGE_FIRST)
        pair_D = np.where(dropped_D, Variant.CAPTION_DROPPED, pair_D)
        return np.where(self.source.is_pair_N[sample_D], pair_D, Variant.TEXT).astype(np.int64)

    def lengths(self, sample_D: NDArray[np.int64], variant_D: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of each document, control tokens included."""
        text_D = np.where(variant_D == Variant.CAPTION_DROPPED, 0, self.source.text_tokens_N[sample_D])
        control_D = np.where(
            variant_D == Variant.TEXT, TEXT_CONTROL_TOKENS, PAIR_CONTROL_TOKENS + self.source.patches
        )
        return (text_D + control_D).astype(np.int64)
