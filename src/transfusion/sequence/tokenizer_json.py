"""tokenizer.json, the format of the `tokenizers` library, from a sentencepiece model: the same ids for every text.

sentencepiece joins the two neighbours whose piece has the highest score, the leftmost of several. tokenizers joins the
two whose pair has the first rank. Both do the same, although a piece may be cut into two pieces in several ways, which
have several ranks: only one of them ever comes about. While a piece grows, nothing is joined across its ends, so it
grows as its letters do alone.

Spaces stand in the vocabulary as they are, not as U+2581. So that character has no piece in a text and is spelt in
bytes, as `Tokenizer.encode` does. Control tokens are in the vocabulary and nowhere else, so no text becomes one.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from transfusion.sequence.pieces import SPACE_MARK
from transfusion.tokens import CONTROL_PIECES, SpecialToken

# Kinds of pieces that can be said in the format. Others are those that a user defined, and unused ones.
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6
_BYTE_PAIRS = 2


class _Piece(NamedTuple):
    text: str
    score: float
    kind: int


def tokenizer_json(model: bytes) -> dict[str, Any]:
    """The tokenizer as plain values of tokenizer.json.

    Args:
        model: A file that `Tokenizer` takes.

    Returns:
        What `tokenizers.Tokenizer.from_str` reads as JSON. It encodes every text to the ids of `Tokenizer.encode`.

    Raises:
        ValueError: With the reason, where the format cannot say exactly what the model does.
    """
    pieces: list[_Piece] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for number, value in _fields(model):
        if number == 1:
            fields = dict(_fields(value))
            score = struct.unpack("<f", fields.get(2, bytes(4)))[0]
            pieces.append(_Piece(fields[1].decode(), score, fields.get(3, _NORMAL)))
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            normalizer = dict(_fields(value))
    if reason := next(_differences(pieces, trainer, normalizer), None):
        raise ValueError(reason)
    score_of = {piece.text.replace(SPACE_MARK, " "): piece.score for piece in pieces if piece.kind == _NORMAL}
    grown = sorted((text for text in score_of if len(text) > 1), key=lambda text: -score_of[text])
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": CONTROL_PIECES[SpecialToken.UNKNOWN],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece.text.replace(SPACE_MARK, " "): number for number, piece in enumerate(pieces)},
            "merges": [
                pair
                for text in grown
                for pair in ([text[:cut], text[cut:]] for cut in range(1, len(text)))
                if score_of.keys() >= set(pair)
            ],
        },
    }


def _differences(
    pieces: Sequence[_Piece], trainer: Mapping[int, Any], normalizer: Mapping[int, Any]
) -> Iterator[str]:
    """What the model does that the format cannot say. Fields by their numbers in sentencepiece_model.proto."""
    if trainer.get(3, 1) != _BYTE_PAIRS:
        yield "its pieces are not byte pairs, and sums of scores are rounded otherwise in the tokenizers library"
    if not trainer.get(35):
        yield "it has no pieces for single bytes"
    if normalizer.get(2):
        yield "it normalises texts"
    # What a file leaves out is on.
    if normalizer.get(3, 1) or normalizer.get(4, 1) or not normalizer.get(5, 1):
        yield "it adds or removes spaces"
    kinds = {piece.kind for piece in pieces}
    if kinds - {_NORMAL, _UNKNOWN, _CONTROL, _BYTE}:
        yield "it has pieces that a user defined, or unused ones"
    if len({piece.text for piece in pieces}) < len(pieces) or any(" " in piece.text for piece in pieces):
        yield "two of its pieces are spelt alike"
    normal = [piece for piece in pieces if piece.kind == _NORMAL]
    grown = [piece for piece in normal if len(piece.text) > 1]
    if len({piece.score for piece in grown}) < len(grown):
        yield "two of its pieces have one score"
    if {SPACE_MARK, *(letter for piece in grown for letter in piece.text)} - {piece.text for piece in normal}:
        yield "the space, or a letter of a piece, is no piece"


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protocol buffer: integers, and the bytes of all else."""
    at = 0

    def integer() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at, value, shift = at + 1, value | (byte & 0x7F) << shift, shift + 7
            if byte < 0x80:
                return value

    while at < len(message):
        key = integer()
        if key & 7 == 0:
            yield key >> 3, integer()
        else:
            length = {1: 8, 5: 4}.get(key & 7) or integer()
            at += length
            yield key >> 3, message[at - length : at]
