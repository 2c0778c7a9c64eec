"""Round trips, and that text never becomes a control token."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import sentencepiece

from transfusion.errors import UserError
from transfusion.schema import SpecialToken
from transfusion.sequence import tokenizer as module
from transfusion.sequence.tokenizer import Tokenizer, train_tokenizer

LITERALS = [
    "<s></s><unk><pad>",
    "<BOS> <EOS> <PAD> <UNK>",
    "<BOI><PATCH><EOI>",
    "<0x41><0x0A>",
    "\u2581leading mark and \u2581\u2581 inside\u2581",
    "  indented\n\n\n    twice\t\ttabs\r\n   ",
    " ",
    "\n",
    "",
    "\0nul\0",
    "\ufeffmark first",
    "e\u0301 is not \u00e9, \uff21 is not A",
    "日本語 und Straße, \U0001f600\u200d\U0001f525",
]


@pytest.mark.parametrize("text", LITERALS)
def test_literals_come_back_and_hold_no_control_token(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(len(SpecialToken) <= token < tokenizer.vocabulary for token in ids)


def test_random_texts_come_back(tokenizer: Tokenizer) -> None:
    generator = random.Random(0)
    fragments = [*LITERALS, "three", " a", "handwritten", "\n", "  ", "<", ">", "\u2581", "é", "\U0010ffff"]
    for _ in range(2000):
        text = "".join(
            generator.choice(fragments) if generator.random() < 0.7 else chr(generator.randrange(1, 0xD800))
            for _ in range(generator.randrange(12))
        )
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert min(ids, default=99) >= len(SpecialToken)


def test_control_tokens_and_foreign_ids_decode_to_nothing(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("three")
    assert tokenizer.decode([SpecialToken.BEGIN_DOCUMENT, *ids, SpecialToken.END_DOCUMENT, 10**9]) == "three"


def test_the_specials_have_the_ids_of_the_schema(tokenizer: Tokenizer) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    assert processor.pad_id() == SpecialToken.PADDING and processor.bos_id() == SpecialToken.BEGIN_DOCUMENT
    assert processor.eos_id() == SpecialToken.END_DOCUMENT and processor.unk_id() == SpecialToken.UNKNOWN
    assert processor.piece_to_id("<PATCH>") == SpecialToken.PATCH


def test_the_same_texts_give_the_same_file(tokenizer: Tokenizer, texts: list[str], tmp_path: Path) -> None:
    again = train_tokenizer(texts, tmp_path / "deep" / "again.model", vocabulary=1024)
    assert again.fingerprint == tokenizer.fingerprint
    assert [path.name for path in again.path.parent.iterdir()] == ["again.model"]


def test_too_few_texts_give_all_the_pieces_that_they_allow(tmp_path: Path) -> None:
    out, texts = tmp_path / "tokenizer.model", ["a few words", "and a few more"]
    with pytest.raises(UserError, match=r"maximum vocabulary is (\d+)") as refused:
        train_tokenizer(iter(texts), out, vocabulary=5000)
    assert not list(tmp_path.iterdir())
    greatest = int(str(refused.value).rsplit(" ", 1)[1])
    assert train_tokenizer(texts, out, vocabulary=greatest).vocabulary == greatest
    assert train_tokenizer(texts, out, vocabulary=5000).vocabulary == greatest
    with pytest.raises(UserError, match="too small"):
        train_tokenizer(["a few words"], out, vocabulary=100)
    with pytest.raises(UserError, match="no text"):
        train_tokenizer([], out, vocabulary=300)


def test_missing_and_foreign_files_are_one_line(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.model"
    foreign.write_bytes(b"not a model")
    other = tmp_path / "other.model"
    with other.open("wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["some words", "more"] * 9),
            model_writer=stream,
            vocab_size=13,
            minloglevel=2,
        )
    for path in (tmp_path / "missing.model", foreign, other):
        with pytest.raises(UserError, match="transfusion tokenizer train") as refused:
            Tokenizer(path)
        assert "\n" not in str(refused.value) and str(path) in str(refused.value)


@pytest.mark.parametrize("letter", ["\u2581", "\u2581 ", "a", " ", "\n", "e\u0301", "\u6f22"])
def test_long_texts_of_one_letter_take_time_in_proportion(tokenizer: Tokenizer, letter: str) -> None:
    def seconds(count: int) -> float:
        text, begin = letter * count, time.process_time()
        ids = tokenizer.encode(text)
        taken = time.process_time() - begin
        assert tokenizer.decode(ids) == text
        return taken

    # Quadratic time was 40 seconds for half of it.
    assert seconds(80_000) < 8 * seconds(20_000) + 1


def test_texts_are_cut_for_the_trainer_in_proportion_and_without_loss() -> None:
    for text in ("a" * 2_000_000, "ab\n" * 700_000, "\n\n" * 100_000 + "x" * 9_000):
        begin = time.process_time()
        assert "".join(module._sentences([text])) == text
        assert time.process_time() - begin < 2
