"""A published tokenizer.json in place of a tokenizer of our own. The only importer of the `tokenizers` library.

Our control tokens keep the first ids, and each id of the file is moved behind them. So the layout of documents, which
knows control tokens by their ids, is the same with every tokenizer, and so is what generation may choose. A model that
starts from published weights moves its rows by as many places. An export moves the ids in its own copy of the file,
whose first entries are our control tokens then. Such a file is read as it stands.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transfusion.errors import UserError
from transfusion.files import FINGERPRINT_BYTES, digest
from transfusion.sequence.pieces import bytes_of_letters, bytes_of_pieces, shown
from transfusion.tokens import CONTROL_PIECES, SpecialToken

# What a text becomes depends on these alone.
_ENCODES = ("normalizer", "pre_tokenizer", "model", "decoder")
# Composed letters are one of at most four: the greatest a normal form makes of letters and their marks.
_COMPOSED = 4
# More letters than anybody has.
_NO_LIMIT = 1 << 62


def is_json(content: bytes) -> bool:
    """Whether a tokenizer's file is JSON, and so no sentencepiece model."""
    return content[:1] == b"{"


def numbers_of(values: Mapping[str, Any]) -> dict[str, int]:
    """Number of each piece of a tokenizer.json. Raises KeyError, TypeError, ValueError or AttributeError otherwise."""
    vocabulary: dict[str, int] = values["model"]["vocab"]
    return {**vocabulary, **{token["content"]: int(token["id"]) for token in _added(values)}}


def spelt_pieces(values: Mapping[str, Any]) -> dict[str, bytes]:
    """The bytes that each piece of a tokenizer.json stands for. Raises as `numbers_of` does."""
    names = list(numbers_of(values))
    byte_level = "ByteLevel" in json.dumps([values.get("pre_tokenizer"), values.get("decoder")])
    spelt = dict(zip(names, (bytes_of_letters if byte_level else bytes_of_pieces)(names), strict=True))
    # Added ones stand in a text as they are written.
    return spelt | {token["content"]: token["content"].encode() for token in _added(values)}


def moved(published: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer.json whose ids are ours: control tokens, then its own. Texts never become a control token.

    Its own added tokens are found in texts as before. None of them is special, so that what leaves out or spells
    special tokens does so for our control tokens alone.
    """
    plain = {"post_processor": None, "truncation": None, "padding": None}
    values: dict[str, Any] = copy.deepcopy({**published, **plain})
    by = 0 if _is_moved(numbers_of(values)) else len(SpecialToken)
    vocabulary = {piece: number + by for piece, number in values["model"]["vocab"].items()}
    values["model"]["vocab"] = {piece: int(token) for token, piece in CONTROL_PIECES.items()} | vocabulary
    for token in _added(values):
        token |= {"id": token["id"] + by, "special": False}
    return values


class PublishedPieces:
    """The pieces of a tokenizer.json, with ids behind our control tokens."""

    def __init__(self, path: Path, content: bytes) -> None:
        """Raises UserError where the library is missing, and for a file that it cannot read or that is of no use."""
        try:
            import tokenizers
        except ImportError:
            raise UserError(f"{path} needs the tokenizers library: pip install 'tokenizers>=0.21'") from None
        values = _values(path, content)
        try:
            self._library = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:
            # The library raises no class of its own.
            raise UserError(f"{path} cannot be read by the tokenizers library: {error}") from None
        # The library may number added tokens otherwise than the file does.
        numbers: dict[str, int] = self._library.get_vocab(with_added_tokens=True)
        clash = sorted(set(CONTROL_PIECES.values()) & numbers.keys())
        own = _is_moved(numbers)
        if clash and not own:
            raise UserError(
                f"{path} has a piece that is called {clash[0]}, as a control token here; take another tokenizer"
            )
        self._spelt = spelt_pieces(values)
        # A text is never cut or filled.
        self._library.no_truncation()
        self._library.no_padding()
        self._by = 0 if own else len(SpecialToken)
        self.size = self._by + max(numbers.values()) + 1
        self.fingerprint = _fingerprint(values, self._by)
        self._names = [""] * self.size
        for name, number in numbers.items():
            self._names[self._by + number] = name
        for token, name in CONTROL_PIECES.items():
            self._names[token] = name
        self._letters = self._longest(values)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, as the library gives them without special tokens, each moved."""
        ids: list[int] = self._library.encode(text, add_special_tokens=False).ids
        return [token + self._by for token in ids] if self._by else ids

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """As `encode`, of each. Not in one call, which would start threads that do not outlive a fork."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int], continues: bool) -> str:
        """Text of ids that are no control tokens, behind other text or at its beginning, where a space may be gone."""
        plain = [token - self._by for token in ids]
        if not continues or self._before is None:
            text: str = self._library.decode(plain, skip_special_tokens=False)
            return text
        number, letters = self._before
        text = self._library.decode([number, *plain], skip_special_tokens=False)
        return text[letters:]

    @functools.cached_property
    def _before(self) -> tuple[int, int] | None:
        """A piece that stands before others, and how many letters it is there."""
        ids = self._library.encode("a", add_special_tokens=False).ids
        return (ids[-1], len(self._library.decode(ids[-1:], skip_special_tokens=False))) if ids else None

    def names(self) -> list[str]:
        """Each piece as its file writes it. Empty for ids without one."""
        return self._names

    def piece_bytes(self) -> list[bytes]:
        """See `Tokenizer.piece_bytes`."""
        return [self._spelt.get(name, name.encode()) for name in self._names]

    @property
    def longest(self) -> int:
        """See `Tokenizer.longest_piece`."""
        return self._letters

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """See `Tokenizer.pieces`."""
        return [shown(self._spelt.get(self._names[token], self._names[token].encode())) for token in ids]

    def _longest(self, values: Mapping[str, Any]) -> int:
        if any(token.get("lstrip") or token.get("rstrip") for token in _added(values)):
            # They take any number of spaces with them.
            return _NO_LIMIT
        return max(map(len, self._names)) * (_COMPOSED if values.get("normalizer") else 1)


def read_values(path: Path) -> dict[str, Any]:
    """The values of a tokenizer.json that can be used. Raises UserError for another file."""
    return _values(path, path.read_bytes())


def _values(path: Path, content: bytes) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(content)
        spelt_pieces(values)
        model = values["model"]
        kind, dropout = model.get("type", "BPE"), model.get("dropout")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no tokenizer.json ({error!r}); copy it again") from None
    if kind != "BPE":
        raise UserError(f"{path} has pieces of type {kind}, and only BPE can be read; take another tokenizer")
    if dropout:
        raise UserError(f"{path} cuts texts at random (dropout); set it to null there")
    return values


def _added(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    added: list[dict[str, Any]] = values.get("added_tokens") or []
    return added


def _is_moved(numbers: Mapping[str, int]) -> bool:
    """Whether the first ids are our control tokens."""
    return all(numbers.get(piece) == token for token, piece in CONTROL_PIECES.items())


def _fingerprint(values: Mapping[str, Any], by: int) -> str:
    """Of what texts become: the same for a published file and for an export's copy of it, where ids were moved."""
    back = len(SpecialToken) - by
    model = dict(values["model"])
    controls = set(CONTROL_PIECES.values()) if not by else set()
    model["vocab"] = {
        piece: number - back for piece, number in model["vocab"].items() if piece not in controls
    }
    added = [
        {name: value for name, value in token.items() if name != "special"} | {"id": token["id"] - back}
        for token in _added(values)
    ]
    parts = [{name: values.get(name) for name in _ENCODES} | {"model": model}, added]
    return digest(json.dumps(parts, sort_keys=True).encode(), FINGERPRINT_BYTES)
