"""The pieces of other tokenizers as bytes, to find in another vocabulary what ours has too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transfusion.errors import UserError
from transfusion.sequence.pieces import bytes_of_pieces
from transfusion.sequence.published_tokenizer import numbers_of, spelt_pieces
from transfusion.sequence.tokenizer import read_pieces

# In the order in which they are looked for.
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
# By their names elsewhere; ours have no bytes of their own.
CONTROL_NAMES = {
    "<s>": b"<BOS>",
    "<|begin_of_text|>": b"<BOS>",
    "</s>": b"<EOS>",
    "<|end_of_text|>": b"<EOS>",
    "<unk>": b"<UNK>",
}


def pieces_of_folder(folder: Path) -> dict[bytes, int] | None:
    """Number of each piece of a model folder's tokenizer, by its bytes; None where it has no tokenizer.

    Reads tokenizer.json (byte-level and sentencepiece-like byte-pair pieces), else tokenizer.model. Control tokens
    stand under our own names for them. Raises UserError for a file of another kind.
    """
    described, model = (folder / name for name in TOKENIZERS)
    if described.exists():
        return _from_json(described)
    if not model.exists():
        return None
    pieces = read_pieces(model)
    return {
        CONTROL_NAMES.get(piece, spelt): number
        for number, (piece, spelt) in enumerate(zip(pieces, bytes_of_pieces(pieces), strict=True))
    }


def numbers_of_folder(folder: Path) -> dict[str, int] | None:
    """Number of each piece of a folder's tokenizer.json as it is written there; None where it has none."""
    path = folder / TOKENIZERS[0]
    return numbers_of(_read(path)) if path.exists() else None


def _from_json(path: Path) -> dict[bytes, int]:
    values = _read(path)
    spelt = spelt_pieces(values)
    return {CONTROL_NAMES.get(piece, spelt[piece]): number for piece, number in numbers_of(values).items()}


def _read(path: Path) -> dict[str, Any]:
    """The values of a tokenizer.json whose pieces can be read."""
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        spelt_pieces(values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a tokenizer whose pieces can be read: {error}") from None
    return values
