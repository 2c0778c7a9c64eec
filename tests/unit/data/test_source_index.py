"""The index: lengths and places of what is good, faults of what is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from transfusion.config import Config, SourceConfig
from transfusion.data.index.source_index import build_index, refuse_too_many, too_many_faults
from transfusion.data.prepare.digits import CAPTIONS_PER_DIGIT, digit_in_caption
from transfusion.data.shards.webdataset import write_shards
from transfusion.errors import UserError
from transfusion.sequence.tokenizer import Tokenizer


def test_ids_and_images_of_every_sample(data: Path, tokenizer: Tokenizer) -> None:
    source = SourceConfig(name="digits", shards=f"{data}/digits/validation/*.tar")
    index = build_index(source, tokenizer, patches=16, sequence_length=256)
    assert len(index) == 297 and index.is_pair_N.all() and not index.faults
    digits = [digit_in_caption(tokenizer.decode(index.text_ids(sample).tolist())) for sample in range(297)]
    for sample in range(0, 297, 50):
        first, end = index.lengths.caption_start_N[sample : sample + 2]
        assert end - first == CAPTIONS_PER_DIGIT
        for caption in range(CAPTIONS_PER_DIGIT):
            ids = index.text_ids(sample, caption)
            assert len(ids) == index.lengths.text_tokens_C[first + caption] > 0
            assert digit_in_caption(tokenizer.decode(ids.tolist())) == digits[sample]
        assert index.read_image(sample).startswith(b"\x89PNG")
    assert index.text_ids(0).dtype == "uint16"


def test_texts_keep_their_white_space(data: Path, tokenizer: Tokenizer) -> None:
    source = SourceConfig(name="docs", shards=f"{data}/docs/train/*.tar")
    index = build_index(source, tokenizer, patches=16, sequence_length=256)
    from pydoc_data.topics import topics

    first = topics[sorted(topics)[0]]
    assert not index.is_pair_N.any()
    assert tokenizer.decode(index.text_ids(0).tolist()) == first


def test_a_pair_longer_than_a_row_is_a_fault(tmp_path: Path, data: Path, tokenizer: Tokenizer) -> None:
    image = build_index(
        SourceConfig(name="d", shards=f"{data}/digits/validation/*.tar"),
        tokenizer,
        patches=16,
        sequence_length=256,
    ).read_image(0)
    write_shards([{"png": image, "txt": b"three " * 20}, {"png": image, "txt": b"three"}], tmp_path)
    source = SourceConfig(name="s", shards=f"{tmp_path}/*.tar")
    index = build_index(source, tokenizer, patches=16, sequence_length=32)
    assert [fault.reason for fault in index.faults] == ["longer_than_row"] and len(index) == 1


def test_of_several_captions_only_those_too_long_are_left_out(
    tmp_path: Path, data: Path, tokenizer: Tokenizer
) -> None:
    digits = SourceConfig(name="d", shards=f"{data}/digits/validation/*.tar")
    image = build_index(digits, tokenizer, patches=16, sequence_length=256).read_image(0)
    facts = json.dumps({"captions": ["three " * 20, "3", "the digit 3"]}).encode()
    write_shards([{"png": image, "txt": b"three", "json": facts}], tmp_path)
    source = SourceConfig(name="s", shards=f"{tmp_path}/*.tar")
    index = build_index(source, tokenizer, patches=16, sequence_length=32)
    assert not index.faults
    texts = [tokenizer.decode(index.text_ids(0, caption).tolist()) for caption in range(3)]
    assert texts == ["three", "3", "the digit 3"] and index.lengths.caption_start_N.tolist() == [0, 3]


def test_nothing_usable_is_told_with_reasons(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_shards([{"txt": b" "}] * 3, tmp_path)
    with pytest.raises(UserError, match=r"no usable sample in 1 shards \(text_empty: 3\)"):
        build_index(
            SourceConfig(name="s", shards=f"{tmp_path}/*.tar"), tokenizer, patches=16, sequence_length=64
        )


def test_when_faults_are_too_many(tmp_path: Path, tokenizer: Tokenizer) -> None:
    assert not too_many_faults(1, 1, Config().data.max_bad_fraction)
    assert not too_many_faults(5, 20, 0.05) and too_many_faults(6, 20, 0.05)
    assert not too_many_faults(50, 1000, 0.05) and too_many_faults(51, 1000, 0.05)
    assert too_many_faults(1, 10**6, 0.0)
    write_shards([{"txt": b" "}] * 7 + [{"txt": b"text"}] * 20, tmp_path)
    index = build_index(
        SourceConfig(name="s", shards=f"{tmp_path}/*.tar"), tokenizer, patches=16, sequence_length=64
    )
    with pytest.raises(UserError, match=r"7 of 27 samples are bad \(text_empty: 7\)"):
        refuse_too_many([index], 0.05)
    refuse_too_many([index], 0.5)
