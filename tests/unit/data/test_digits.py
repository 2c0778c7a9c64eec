"""Captions of the digits."""

from __future__ import annotations

import collections

import pytest

from transfusion.data.prepare.digits import (
    COMMON_TEMPLATE,
    DIGIT_WORDS,
    TEMPLATES,
    captions_for,
    digit_in_caption,
)
from transfusion.data.shards.webdataset import sample_key


def test_every_template_names_its_digit_and_no_other() -> None:
    assert 16 <= len(TEMPLATES) + 1 <= 24
    for template in (COMMON_TEMPLATE, *TEMPLATES):
        for digit, word in enumerate(DIGIT_WORDS):
            assert digit_in_caption(template.format(word=word, numeral=digit)) == digit


def test_captions_vary_and_the_common_one_is_the_most_common() -> None:
    captions = collections.Counter(
        caption for number in range(1500) for caption in captions_for(3, sample_key(number))
    )
    (most_common, count), *_ = captions.most_common()
    assert most_common == "a handwritten three" and count > 0.4 * captions.total()
    assert len(captions) == len(TEMPLATES) + 1
    assert all(digit_in_caption(caption) == 3 for caption in captions)
    assert any(
        "an eight" in caption for number in range(9) for caption in captions_for(8, sample_key(number))
    )


@pytest.mark.parametrize(
    ("text", "digit"),
    [
        ("Seven!", 7),
        ("the digit 7, a seven", 7),
        ("a three and a four", None),
        ("nothing", None),
        ("", None),
        ("12", None),
        ("someone alone", None),
        ("a3b", None),
        ("007", 7),
    ],
)
def test_which_digit_a_text_names(text: str, digit: int | None) -> None:
    assert digit_in_caption(text) == digit
