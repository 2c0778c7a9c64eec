"""Captions of the handwritten digits, and which digit a caption names."""

from __future__ import annotations

import re

from transfusion.data.planning import hash_rng
from transfusion.files import name_hash

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# {word} is the digit's word, {numeral} its numeral. No template may name another digit ("one" included).
COMMON_TEMPLATE = "a handwritten {word}"
TEMPLATES = (
    "a handwritten {numeral}",
    "a handwritten digit {word}",
    "a handwritten digit {numeral}",
    "the digit {word}",
    "the digit {numeral}",
    "the number {word}",
    "the number {numeral}",
    "the numeral {numeral}",
    "a {word} written by hand",
    "a {numeral} written by hand",
    "a scan of a handwritten {word}",
    "a scan of the digit {word}",
    "a small grey picture of a {word}",
    "a small picture of the digit {numeral}",
    "{word}, written by hand",
    "the figure {word} in bright ink",
    "a bright {word} on a black ground",
    "a bright {numeral} on a black ground",
    "someone wrote a {word}",
    "someone wrote the number {numeral}",
    "this is a {word}",
)
# Share of captions that use the common template.
COMMON_SHARE = 0.5
# As if so many people had each described a scan.
CAPTIONS_PER_DIGIT = 8

_NAMED = re.compile(rf"\b(?:{'|'.join(DIGIT_WORDS)}|\d+)\b", re.IGNORECASE)


def captions_for(digit: int, key: str) -> list[str]:
    """Captions of a scan of the digit; some may be the same."""
    return [_caption(digit, name_hash(f"{key}/{number}")) for number in range(CAPTIONS_PER_DIGIT)]


def _caption(digit: int, name: int) -> str:
    if hash_rng.uniform(name_hash("digits: common"), name)[0] < COMMON_SHARE:
        template = COMMON_TEMPLATE
    else:
        template = TEMPLATES[int(hash_rng.uniform(name_hash("digits: template"), name)[0] * len(TEMPLATES))]
    text = template.format(word=DIGIT_WORDS[digit], numeral=digit)
    return re.sub(r"\ba (?=eight|8)", "an ", text)


def digit_in_caption(text: str) -> int | None:
    """The digit that the text names, as a word or as a numeral; None when it names none or several."""
    named = {match.lower() for match in _NAMED.findall(text)}
    digits = {DIGIT_WORDS.index(name) if name in DIGIT_WORDS else int(name) for name in named}
    if len(digits) != 1:
        return None
    digit = digits.pop()
    return digit if 0 <= digit <= 9 else None
