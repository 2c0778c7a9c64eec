"""tokenizer.json gives the ids of sentencepiece for any text, or is refused with the reason."""

from __future__ import annotations

import io
import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from transfusion.sequence import tokenizer as module
from transfusion.sequence.tokenizer import Tokenizer, train_tokenizer
from transfusion.sequence.tokenizer_json import tokenizer_json

HOSTILE = [
    "",
    " ",
    "     ",
    "\n",
    "\t\t tabs\r\n \x0b\x0c and spaces  ",
    "  leading, double  and trailing  ",
    "<PAD><BOS> <EOS><UNK> <BOI><PATCH><EOI>",
    "<s></s><unk><pad> <0x41><0x0A>",
    "\u2581leading mark, \u2581\u2581 inside\u2581 \u2581",
    "\0nul\0 \x1b[0m \x7f \x85",
    "\ufeffmark \u00a0\u2003\u3000 other spaces",
    "e\u0301 is not \u00e9, \uff21 is not A, \ufb01 is not fi, \u1e9b\u0323",
    "Z\u0351\u036b\u0343\u036a\u0302\u036b algo",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f3f3\ufe0f\u200d\U0001f308 \U0001f44d\U0001f3fd",
    "\u65e5\u672c\u8a9e \u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u0928\u092e\u0938\u094d\u0924\u0947",
    "\ud7ff\ue000\ufffd\ufffe\uffff\U0010ffff",
]


def read(values: dict[str, Any]) -> Any:
    """The `tokenizers` library's reading of a file."""
    library = pytest.importorskip("tokenizers", reason="tokenizers is not installed (extra: oracles)")
    return library.Tokenizer.from_str(json.dumps(values))


def assert_same(tokenizer: Tokenizer, theirs: Any, texts: list[str]) -> None:
    for text in texts:
        ids = tokenizer.encode(text)
        assert theirs.encode(text).ids == ids, text[:200]
        assert theirs.decode(ids) == text, text[:200]


@pytest.fixture(scope="module")
def of_prose(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Pieces of English, Markdown, code, and of runs of spaces."""
    texts = [
        path.read_text(encoding="utf-8")
        for path in sorted((Path(__file__).parents[3] / "docs/guides").glob("*.md"))[:6]
    ]
    return train_tokenizer(texts, tmp_path_factory.mktemp("prose") / "tokenizer.model", vocabulary=1500)


def test_every_text_has_the_ids_of_sentencepiece(of_prose: Tokenizer) -> None:
    theirs = read(tokenizer_json(of_prose.path.read_bytes()))
    assert_same(of_prose, theirs, HOSTILE)
    generator = random.Random(0)
    pieces = of_prose.pieces(range(of_prose.vocabulary))
    letters = [(0, 0x80), (0x80, 0xD800), (0xE000, 0x110000)]
    texts = []
    for _ in range(4000):
        parts = [
            generator.choice(pieces) if generator.random() < 0.6
            else generator.choice(HOSTILE) if generator.random() < 0.4
            else chr(generator.randrange(*generator.choice(letters)))
            for _ in range(generator.randrange(12))
        ]  # fmt: skip
        texts.append("".join(parts))
    assert_same(of_prose, theirs, texts)
    assert_same(of_prose, theirs, ["".join(texts), "a" * 50_000, " " * 50_000])


@pytest.mark.parametrize("seed", range(6))
def test_pieces_that_overlap_themselves_are_joined_in_the_same_order(seed: int, tmp_path: Path) -> None:
    """Of one or two letters nearly all pieces can be made in several ways, and a tie is between neighbours."""
    generator = random.Random(seed)
    letters = "ab" if seed % 2 else "a"
    texts = ["".join(generator.choices(9 * letters + " ", k=40)) for _ in range(300)]
    texts += [letters[0] * length for length in range(1, 30)]
    tokenizer = train_tokenizer(texts, tmp_path / "tokenizer.model", vocabulary=400)
    theirs = read(tokenizer_json(tokenizer.path.read_bytes()))
    for _ in range(800):
        assert_same(tokenizer, theirs, ["".join(generator.choices(letters, k=generator.randrange(90)))])


def model(**changes: Any) -> bytes:
    """A model as `train_tokenizer` makes it, but for these options."""
    written = io.BytesIO()
    options = {
        "model_type": "bpe", "vocab_size": 290, "byte_fallback": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "add_dummy_prefix": False, "allow_whitespace_only_pieces": True,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a handwritten three", "someone wrote the number nine"] * 20),
        model_writer=written, num_threads=1, minloglevel=2, **module._control_options() | options | changes,
    )  # fmt: skip
    return written.getvalue()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "unigram", "hard_vocab_limit": False}, "its pieces are not byte pairs"),
        ({"byte_fallback": False, "vocab_size": 40}, "no pieces for single bytes"),
        ({"normalization_rule_name": "nmt_nfkc"}, "it normalises texts"),
        ({"add_dummy_prefix": True}, "adds or removes spaces"),
        ({"remove_extra_whitespaces": True}, "adds or removes spaces"),
        ({"user_defined_symbols": ["three"]}, "pieces that a user defined"),
    ],
)
def test_what_the_format_cannot_say_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        tokenizer_json(model(**changes))


def piece(text: str, score: float) -> bytes:
    """One more piece of a model, to be put behind it."""
    body = b"\x0a" + bytes([len(text.encode())]) + text.encode() + b"\x15" + struct.pack("<f", score)
    return b"\x0a" + bytes([len(body)]) + body


def test_pieces_that_could_be_taken_for_others_are_refused() -> None:
    whole = model()
    tokenizer_json(whole + piece("nth", -500))
    for pieces, reason in (
        ([piece("<BOS>", -500)], "two of its pieces are spelt alike"),
        ([piece("a b", -500)], "two of its pieces are spelt alike"),
        ([piece("nth", -500), piece("ntw", -500)], "two of its pieces have one score"),
        ([piece("n\u00e9", -500)], "the space, or a letter of a piece, is no piece"),
    ):
        with pytest.raises(ValueError, match=reason):
            tokenizer_json(whole + b"".join(pieces))


@pytest.mark.parametrize("seed", range(8))
def test_any_pieces_in_any_order_are_joined_alike(seed: int, tmp_path: Path) -> None:
    """Pieces that no training makes: some are never joined, others by parts that come later than they do."""
    generator, whole = random.Random(seed), model()
    former = tokenizer_json(whole)["model"]["vocab"].keys()
    new = {"".join(generator.choices("ant", k=generator.randrange(2, 7))) for _ in range(20)} - former
    scores = generator.sample(range(-40, 40), len(new))
    path = tmp_path / "tokenizer.model"
    path.write_bytes(
        whole + b"".join(piece(text, score + 0.5) for text, score in zip(sorted(new), scores, strict=True))
    )
    tokenizer, theirs = Tokenizer(path), read(tokenizer_json(path.read_bytes()))
    for _ in range(400):
        assert_same(tokenizer, theirs, ["".join(generator.choices("ant", k=generator.randrange(60)))])
