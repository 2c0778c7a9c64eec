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
