"""Control tokens. Apart from `schema`, so that what only reads text needs no torch."""

from __future__ import annotations

import enum


class SpecialToken(enum.IntEnum):
    """Control tokens. The tokenizer reserves these ids; user text can never produce them."""

    PADDING = 0
    BEGIN_DOCUMENT = 1
    END_DOCUMENT = 2
    UNKNOWN = 3
    BEGIN_IMAGE = 4
    END_IMAGE = 5
    # Stands at patch positions, where the embedding is replaced by the encoded patch.
    PATCH = 6


# As tokenizers name them.
CONTROL_PIECES = {
    SpecialToken.PADDING: "<PAD>",
    SpecialToken.BEGIN_DOCUMENT: "<BOS>",
    SpecialToken.END_DOCUMENT: "<EOS>",
    SpecialToken.UNKNOWN: "<UNK>",
    SpecialToken.BEGIN_IMAGE: "<BOI>",
    SpecialToken.END_IMAGE: "<EOI>",
    SpecialToken.PATCH: "<PATCH>",
}


# What is added to a seed must stay within a signed 64-bit integer.
MAX_SEED = (1 << 62) - 1
# One that is sampled with: the key of a word has 24 more bits, for its number in the answer.
MAX_SAMPLING_SEED = (1 << 38) - 1
