"""The baseline that a language model must beat: an interpolated absolute-discount bigram."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence

from transfusion.schema import SpecialToken

DISCOUNT = 0.75


class Bigram:
    """P(w | v) = max(c(v w) - D, 0) / c(v) + D * n(v) / c(v) * P(w), with n(v) the number of words seen after v.

    P(w) is the unigram distribution, discounted in the same way against the uniform one over the vocabulary
    (Ney, Essen and Kneser, 1994).
    """

    def __init__(self, documents: Iterable[Sequence[int]], vocabulary: int) -> None:
        """Fit on token ids of documents; each is read as <BOS> ids <EOS>."""
        self.vocabulary = vocabulary
        self.pairs: Counter[tuple[int, int]] = Counter()
        self.words: Counter[int] = Counter()
        for document in documents:
            row = _with_borders(document)
            self.pairs.update(itertools.pairwise(row))
            self.words.update(row[1:])
        self.contexts: Counter[int] = Counter()
        self.followers: Counter[int] = Counter()
        for (context, _), count in self.pairs.items():
            self.contexts[context] += count
            self.followers[context] += 1
        self.total = sum(self.words.values())

    def probability(self, context: int, word: int) -> float:
        """P(word | context)."""
        seen = self.contexts[context]
        unseen = DISCOUNT * len(self.words) / self.total / self.vocabulary
        lower = max(self.words[word] - DISCOUNT, 0.0) / self.total + unseen
        if not seen:
            return lower
        reserved = DISCOUNT * self.followers[context] / seen
        return max(self.pairs[context, word] - DISCOUNT, 0.0) / seen + reserved * lower

    def nats(self, documents: Iterable[Sequence[int]]) -> float:
        """Summed negative log probability of the documents, <EOS> included."""
        total = 0.0
        for document in documents:
            row = _with_borders(document)
            total -= sum(math.log(self.probability(v, w)) for v, w in itertools.pairwise(row))
        return total


def _with_borders(document: Sequence[int]) -> list[int]:
    return [int(SpecialToken.BEGIN_DOCUMENT), *document, int(SpecialToken.END_DOCUMENT)]
