"""The pieces of other tokenizers as bytes, to find in another vocabulary what ours has too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transfusion.errors import UserError
from transfusion.sequence.tokenizer import bytes_of_pieces, read_pieces

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


def _from_json(path: Path) -> dict[bytes, int]:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        vocabulary: dict[str, int] = values["model"]["vocab"]
        added = {token["content"]: int(token["id"]) for token in values.get("added_tokens") or []}
        numbers = {**vocabulary, **added}
        byte_level = "ByteLevel" in json.dumps([values.get("pre_tokenizer"), values.get("decoder")])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a tokenizer whose pieces can be read: {error}") from None
    if byte_level:
        byte_of = _byte_of_letter()
        spelt = [
            bytes(byte_of[letter] for letter in piece) if set(piece) <= byte_of.keys() else piece.encode()
            for piece in numbers
        ]
    else:
        spelt = bytes_of_pieces(list(numbers))
    return {
        CONTROL_NAMES.get(piece, value): number
        for (piece, number), value in zip(numbers.items(), spelt, strict=True)
    }


def _byte_of_letter() -> dict[str, int]:
    """How byte-level pieces write bytes as letters (GPT-2): printable ones as they are, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(0x100 + place): byte for place, byte in enumerate(others)}
