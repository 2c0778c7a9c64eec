"""CIDEr-D and BLEU of captions, with the numbers that pycocoevalcap 1.2 gives for the same words.

Captions come as words, which `ptb.ptb_words` cuts as published figures have them. A caption without words scores 0.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from transfusion.errors import UserError

Words = Sequence[str]
Ngram = tuple[str, ...]

LONGEST = 4
# Of CIDEr-D, the width of the penalty for another length, in words.
SIGMA = 6.0
# Of BLEU, they keep each precision finite and, without a match, nearly 0.
_TINY, _SMALL = 1e-15, 1e-9


def cider_d(said: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """CIDEr-D of each image's caption, from 0 to 10 (Vedantam et al., 2015, arXiv:1411.5726, section 5 and equation 4).

    The mean over images is what papers report, mostly times 100. Document frequencies are those of the references.
    Raises UserError for a single image, no image, or an image without references.
    """
    _check(said, references)
    if len(said) == 1:
        raise UserError(
            "CIDEr of one image is not defined, as each word is in all images then; measure two images or more"
        )
    counted = [[_ngrams(words) for words in each] for each in references]
    images_with = Counter(ngram for each in counted for ngram in set().union(*each))

    def weighted(ngrams: Iterable[tuple[Ngram, int]]) -> list[dict[Ngram, float]]:
        """The n-grams by length, each with its count times the log of how rare it is."""
        by_length: list[dict[Ngram, float]] = [{} for _ in range(LONGEST)]
        for ngram, count in ngrams:
            by_length[len(ngram) - 1][ngram] = count * math.log(len(said) / max(1, images_with[ngram]))
        return by_length

    scores = []
    for words, those, counts in zip(said, references, counted, strict=True):
        own = weighted(_ngrams(words).items())
        total = 0.0
        for other, count in zip(those, counts, strict=True):
            apart = len(words) - len(other)
            pairs = zip(own, weighted(count.items()), strict=True)
            total += math.exp(-(apart**2) / (2 * SIGMA**2)) * sum(_clipped_cosine(*pair) for pair in pairs)
        scores.append(10 * total / LONGEST / len(those))
    return scores


def corpus_bleu(said: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """BLEU-1 to BLEU-4 of all captions together (Papineni et al., 2002, section 2).

    Of an image's references the one nearest in length counts for the brevity penalty, and of two the shorter. Raises
    UserError for no image, or an image without references.
    """
    _check(said, references)
    length = sum(map(len, said))
    wanted = sum(
        min((abs(len(other) - len(words)), len(other)) for other in those)[1]
        for words, those in zip(said, references, strict=True)
    )
    matched, guessed = Counter[int](), Counter[int]()
    for words, those in zip(said, references, strict=True):
        own, most = _ngrams(words), Counter[Ngram]()
        for other in those:
            most |= _ngrams(other)
        for ngram, count in own.items():
            guessed[len(ngram)] += count
            matched[len(ngram)] += min(count, most[ngram])
    ratio = (length + _TINY) / (wanted + _SMALL)
    brevity = math.exp(min(0.0, 1 - 1 / ratio))
    scores, product = [], 1.0
    for size in range(1, LONGEST + 1):
        product *= (matched[size] + _TINY) / (guessed[size] + _SMALL)
        scores.append(brevity * product ** (1 / size))
    return scores


def _check(said: Sequence[Words], references: Sequence[Sequence[Words]]) -> None:
    if not said:
        raise UserError("there is no caption to score; name at least one image")
    if len(said) != len(references):
        raise UserError(
            f"{len(said)} captions have references of {len(references)} images; give one list for each"
        )
    if bare := [place for place, those in enumerate(references) if not those]:
        raise UserError(f"caption {bare[0]} has no reference; give each image one or leave it out")


def _ngrams(words: Words) -> Counter[Ngram]:
    sizes = range(1, LONGEST + 1)
    return Counter(
        tuple(words[start : start + size]) for size in sizes for start in range(len(words) - size + 1)
    )


def _clipped_cosine(own: dict[Ngram, float], other: dict[Ngram, float]) -> float:
    """The cosine of two captions, where no n-gram counts for more than in the reference."""
    shared = sum(min(weight, other[ngram]) * other[ngram] for ngram, weight in own.items() if ngram in other)
    norms = math.hypot(*own.values()) * math.hypot(*other.values())
    return shared / norms if norms else 0.0
