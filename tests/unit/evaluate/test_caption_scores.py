"""Words, CIDEr-D and BLEU against the answers that the oracle gave, and by hand.

tests/oracles/test_caption_scores.py made those answers, and tells how to make them anew.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from transfusion.errors import UserError
from transfusion.evaluate.metrics.caption_scores import cider_d, corpus_bleu
from transfusion.evaluate.metrics.ptb import ptb_tokens, ptb_words

FROZEN: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "assets" / "captions.json").read_text(encoding="utf-8")
)


def words_of(each: dict[str, Any]) -> tuple[list[list[str]], list[list[list[str]]]]:
    """What is said and the references of a frozen set, as words."""
    return (
        [caption.split() for caption in each["said"]],
        [[caption.split() for caption in those] for those in each["references"]],
    )


def test_captions_are_cut_as_the_oracle_cut_them() -> None:
    assert len(FROZEN["captions"]) > 200
    found = [[caption, " ".join(ptb_tokens(caption))] for caption, _ in FROZEN["captions"]]
    assert [pair for pair in found if pair not in FROZEN["captions"]] == []


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A man's dog isn't here (yet)...", "a man 's dog is n't here -lrb- yet -rrb-"),
        ("What?!  £5 and 1 1/2 cups", "what ?! # 5 and 1 1/2 cups"),
        ("in the U.S., end. x, end.,", "in the u.s. end x end."),
        ("a😀b", "a b"),
        ("two\nlines", "two lines"),
        ("?.", ""),
        ("", ""),
    ],
)
def test_words_by_hand(caption: str, words: str) -> None:
    assert ptb_words(caption) == words.split()


@pytest.mark.parametrize("each", FROZEN["sets"])
def test_scores_are_those_of_the_oracle(each: dict[str, Any]) -> None:
    assert cider_d(*words_of(each)) == pytest.approx(each["cider"], rel=0, abs=1e-12)
    assert corpus_bleu(*words_of(each)) == pytest.approx(each["bleu"], rel=0, abs=1e-12)


def test_scores_by_hand() -> None:
    """Two images with no word in common: each n-gram has the weight log 2."""
    references = [[list("abcde")], [list("fghij")]]
    exact = [those[0] for those in references]
    assert cider_d(exact, references) == pytest.approx([10, 10])
    assert corpus_bleu(exact, references) == pytest.approx([1] * 4)
    # Two of five words: cosines 2 / (5 2)^(1/2), 1 / 4^(1/2), none, none. The lengths differ by 3.
    score = 10 * math.exp(-9 / 72) * (2 / math.sqrt(10) + 1 / 2) / 4
    assert cider_d([["a", "b"], exact[1]], references)[0] == pytest.approx(score)
    # 7 of 7 words, and 10 were wanted.
    assert corpus_bleu([["a", "b"], exact[1]], references)[0] == pytest.approx(math.exp(1 - 10 / 7))
    # A word counts as often as it stands in a reference.
    assert corpus_bleu([["a"] * 5, exact[1]], references)[0] == pytest.approx(0.6)
    # Of two references as near in length, the shorter.
    assert corpus_bleu([list("aaaa")], [[list("aaa"), list("aaaaa")]])[0] == pytest.approx(1)


def test_a_caption_without_words_scores_nothing() -> None:
    references = [[["a", "b"]], [["c", "d"]]]
    assert cider_d([[], ["c", "d"]], references)[0] == 0
    assert corpus_bleu([[], []], references) == [0, 0, 0, 0]


def test_what_has_no_score_is_told_in_a_line() -> None:
    for score in (cider_d, corpus_bleu):
        with pytest.raises(UserError, match=r"no caption to score.*at least one image"):
            score([], [])
        with pytest.raises(UserError, match=r"caption 1 has no reference.*leave it out"):
            score([["a"], ["b"]], [[["a"]], []])
        with pytest.raises(UserError, match=r"2 captions have references of 1 images"):
            score([["a"], ["b"]], [[["a"]]])
    with pytest.raises(UserError, match=r"CIDEr of one image is not defined.*two images or more"):
        cider_d([["a"]], [[["a"]]])
    assert corpus_bleu([["a"]], [[["a"]]])[0] == pytest.approx(1)
