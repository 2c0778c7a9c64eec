"""The bigram baseline is a probability distribution and equals the formula worked out by hand."""

from __future__ import annotations

import math

import pytest

from transfusion.evaluate.metrics.bigram import Bigram

VOCABULARY = 12
TRAINING = [[7, 8, 7, 8, 9], [7, 8, 10], []]


@pytest.mark.parametrize("context", [1, 7, 8, 9, 10, 11])
def test_probabilities_sum_to_one(context: int) -> None:
    bigram = Bigram(TRAINING, VOCABULARY)
    assert sum(bigram.probability(context, word) for word in range(VOCABULARY)) == pytest.approx(1.0)


def test_formula_by_hand() -> None:
    bigram = Bigram(TRAINING, VOCABULARY)
    # 8 words of text and three <EOS>: 7 x3, 8 x3, 9, 10, <EOS> x3; five of twelve seen.
    unigram_8 = (3 - 0.75) / 11 + 0.75 * 5 / 11 / VOCABULARY
    # After 7 always 8, three times.
    assert bigram.probability(7, 8) == pytest.approx((3 - 0.75) / 3 + 0.75 * 1 / 3 * unigram_8)
    # 11 was never a context.
    assert bigram.probability(11, 8) == pytest.approx(unigram_8)


def test_nats_add_up_over_documents_with_their_ends() -> None:
    bigram = Bigram(TRAINING, VOCABULARY)
    expected = -sum(math.log(bigram.probability(v, w)) for v, w in [(1, 7), (7, 8), (8, 2), (1, 2)])
    assert bigram.nats([[7, 8], []]) == pytest.approx(expected)
