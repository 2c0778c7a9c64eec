"""Text to token ids and back, and training of the tokenizer. The only importer of sentencepiece."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from transfusion.errors import UserError
from transfusion.files import FINGERPRINT_BYTES, atomic_file, digest
from transfusion.sequence.pieces import SPACE_MARK, bytes_of_pieces
from transfusion.sequence.published_tokenizer import PublishedPieces, is_json
from transfusion.tokens import CONTROL_PIECES, SpecialToken

# Under which a folder keeps its own.
MODEL, JSON = "tokenizer.model", "tokenizer.json"
_REMEDY = "make one with `transfusion tokenizer train`"
# The trainer drops longer sentences, so documents are cut at line ends first.
_LONGEST_SENTENCE = 4000


class Tokenizer:
    """A tokenizer whose first ids are `SpecialToken`; text never produces one of them.

    It is a sentencepiece model of ours, or a published tokenizer.json, whose ids stand behind the control tokens (see
    `published_tokenizer`). With ours any text comes back unchanged from `decode(encode(text))`: nothing is normalised,
    and what has no piece is spelt in bytes. A published one may normalise texts.
    """

    def __init__(self, path: str | Path) -> None:
        """Raises UserError when the file is missing, of another kind, or a sentencepiece model of another project."""
        self.path = Path(path)
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read tokenizer {path}: {error.strerror}; {_REMEDY}") from None
        self.is_published = is_json(content)
        self._pieces = (PublishedPieces if self.is_published else _SentencePieces)(self.path, content)
        self.fingerprint = self._pieces.fingerprint
        self.vocabulary: int = self._pieces.size
        # What single tokens were decoded to.
        self._texts: dict[tuple[int, bool], str] = {}

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without control tokens. Raises UnicodeEncodeError on lone surrogates."""
        text.encode()
        return self._pieces.encode(text)

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """As `encode`, of each; with sentencepiece in one call, which then takes a third of the time."""
        for text in texts:
            text.encode()
        return self._pieces.encode_all(texts)

    def decode(self, ids: Sequence[int], *, continues: bool = False) -> str:
        """Text of the ids; control tokens and ids outside the vocabulary leave nothing.

        continues: whether text stands before it. Some published tokenizers drop a space where a text begins.
        """
        if len(ids) == 1:
            # An answer is told token by token, and a call of the library takes longer than the token.
            key = (int(ids[0]), continues)
            if key not in self._texts:
                self._texts[key] = self._decode(ids, continues)
            return self._texts[key]
        return self._decode(ids, continues)

    def _decode(self, ids: Sequence[int], continues: bool) -> str:
        first, end = len(SpecialToken), self.vocabulary
        return self._pieces.decode([int(token) for token in ids if first <= token < end], continues)

    def piece_bytes(self) -> list[bytes]:
        """The bytes that each piece stands for; of a control token its name, as `<BOS>`."""
        return self._pieces.piece_bytes()

    def names(self) -> list[str]:
        """Each piece as its file writes it."""
        return self._pieces.names()

    @functools.cached_property
    def longest_piece(self) -> int:
        """Letters of the longest piece. No text has fewer tokens than its letters divided by this."""
        return self._pieces.longest

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The piece of each id as text, for eyes: parts of a letter are shown as <0xNN>."""
        return self._pieces.pieces([int(token) for token in ids])


class _SentencePieces:
    """A sentencepiece model that `train_tokenizer` made."""

    def __init__(self, path: Path, content: bytes) -> None:
        """Raises UserError where it is none."""
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError:
            raise UserError(f"{path} is not a sentencepiece model, nor a tokenizer.json; {_REMEDY}") from None
        if not _has_our_tokens(self._processor):
            raise UserError(f"{path} has other control tokens than this project's; {_REMEDY}")
        self._space_mark_ids = [
            self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()
        ]
        self.fingerprint = digest(content, FINGERPRINT_BYTES)
        self.size: int = self._processor.get_piece_size()

    def encode(self, text: str) -> list[int]:
        if SPACE_MARK not in text:
            ids: list[int] = self._processor.encode(text)
            return ids
        first, *parts = self._processor.encode(text.split(SPACE_MARK))
        joined: list[int] = list(first)
        for part in parts:
            joined += self._space_mark_ids
            joined += part
        return joined

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        if any(SPACE_MARK in text for text in texts):
            return [self.encode(text) for text in texts]
        ids: list[list[int]] = self._processor.encode(list(texts), num_threads=1)
        return ids

    def decode(self, ids: Sequence[int], continues: bool) -> str:
        text: str = self._processor.decode(list(ids))
        return text

    def names(self) -> list[str]:
        names: list[str] = self._processor.id_to_piece(list(range(self.size)))
        return names

    def piece_bytes(self) -> list[bytes]:
        return bytes_of_pieces(self.names())

    @property
    def longest(self) -> int:
        return max(map(len, self.names()))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        pieces: list[str] = self._processor.id_to_piece(list(ids))
        return [piece.replace(SPACE_MARK, " ") for piece in pieces]


def file_name(path: Path) -> str:
    """Under which name a folder keeps a copy of a tokenizer's file, so that other programs know what it is."""
    with path.open("rb") as file:
        return JSON if is_json(file.read(1)) else MODEL


def tokenizer_in(folder: Path) -> Path:
    """Where a run's folder or an export has its tokenizer. Beside tokenizer.model, tokenizer.json is a copy of it."""
    return folder / JSON if (folder / JSON).is_file() and not (folder / MODEL).is_file() else folder / MODEL


def read_pieces(path: Path) -> list[str]:
    """The pieces of any sentencepiece model, as it writes them. Raises UserError where it is none."""
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    except (OSError, RuntimeError):
        raise UserError(f"{path} is not a sentencepiece model") from None
    pieces: list[str] = processor.id_to_piece(list(range(processor.get_piece_size())))
    return pieces


def train_tokenizer(texts: Iterable[str], out: Path, *, vocabulary: int) -> Tokenizer:
    """Train byte-pair pieces on the texts and write the model to `out`, whole or not at all.

    The same texts give the same file. Where they are too few for so many pieces it has all that they allow, if they can
    be read again. Raises UserError when there are none, or the vocabulary is too small.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocabulary,
            byte_fallback=True,
            # Reference text: spaces, indentation and line ends carry meaning, and nothing is rewritten.
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=8 * _LONGEST_SENTENCE,
            num_threads=1,
            minloglevel=2,
            **_control_options(),
        )
    except RuntimeError as error:
        most = re.search(r"value <= (\d+)", str(error))
        if most and not isinstance(texts, Iterator):
            return train_tokenizer(texts, out, vocabulary=int(most[1]))
        raise UserError(_explain(str(error), vocabulary)) from None
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(out) as unfinished:
        unfinished.write_bytes(model.getvalue())
    return Tokenizer(out)


def _control_options() -> dict[str, Any]:
    names = {
        "pad": SpecialToken.PADDING,
        "bos": SpecialToken.BEGIN_DOCUMENT,
        "eos": SpecialToken.END_DOCUMENT,
    }
    options: dict[str, Any] = {}
    for name, token in {**names, "unk": SpecialToken.UNKNOWN}.items():
        options[f"{name}_id"] = int(token)
        options[f"{name}_piece"] = CONTROL_PIECES[token]
    options["control_symbols"] = [
        piece for token, piece in CONTROL_PIECES.items() if token > SpecialToken.UNKNOWN
    ]
    return options


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Pieces of the texts short enough for the trainer, cut after blank lines or line ends."""
    for text in texts:
        for paragraph in re.split(r"(?<=\n\n)", text):
            start, end = 0, len(paragraph)
            while end - start > _LONGEST_SENTENCE:
                limit = start + _LONGEST_SENTENCE
                cut = paragraph.rfind("\n", start + 1, limit) + 1 or limit
                yield paragraph[start:cut]
                start = cut
            if start < end:
                yield paragraph[start:]


def _has_our_tokens(processor: sentencepiece.SentencePieceProcessor) -> bool:
    if processor.get_piece_size() <= len(SpecialToken) + 256:
        return False
    named = all(processor.id_to_piece(int(token)) == piece for token, piece in CONTROL_PIECES.items())
    return named and processor.is_byte(len(SpecialToken))


def _explain(message: str, vocabulary: int) -> str:
    """The trainer's complaint in our words."""
    if match := re.search(r"value <= (\d+)", message):
        return f"the texts are too few for {vocabulary} pieces; the maximum vocabulary is {match[1]}"
    if match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return f"a vocabulary of {vocabulary} is too small; these texts need at least {int(match[1]) + 1}"
    if "sentences_.empty()" in message:
        return "there is no text to train a tokenizer on; name shards or .jsonl files that hold some"
    return f"the tokenizer could not be trained: {' '.join(message.split())}"
