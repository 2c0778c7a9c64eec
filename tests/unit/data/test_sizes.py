"""Images of several sizes on their way from shards through plan and rows into batches."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from transfusion.config import Config
from transfusion.data.index.source_index import build_indexes
from transfusion.data.loading.loader import Loader
from transfusion.data.loading.rows import RowBuilder, RowSettings
from transfusion.data.loading.validation import EvaluationLoader
from transfusion.data.planning.epoch import Variant
from transfusion.data.planning.packing import DocumentSpan
from transfusion.data.shards.webdataset import write_shards
from transfusion.data.viewing.commands import describe_stats, show_rows, stats_config
from transfusion.errors import UserError
from transfusion.schema import ImageSegment, SpecialToken
from transfusion.sequence.tokenizer import Tokenizer

SIZES = ["8x8", "8x16", "16x8"]
# Stored height and width, and the size that such an image takes; the last is stored on its side.
SHAPES = {(20, 21): "8x8", (10, 24): "8x16", (30, 14): "16x8", (9, 12): "8x8", (11, 21): "16x8"}


def stored(number: int) -> tuple[bytes, str]:
    """An image and the size that it takes: top row black where it is upright, all else its number's shade."""
    (height, width), size = list(SHAPES.items())[number % len(SHAPES)]
    image, turned = Image.new("L", (width, height), 60 + number), number % len(SHAPES) == 4
    exif = Image.Exif()
    if turned:
        exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    return buffer.getvalue(), size


def pair(number: int) -> dict[str, bytes]:
    return {"jpg": stored(number)[0], "txt": b"the digit " * (1 + number % 4)}


def edit(number: int) -> dict[str, bytes]:
    """Two images of different sizes, the first one twice."""
    elements: list[dict[str, str]] = [
        {"type": "image", "image": "img0.jpg"},
        {"type": "text", "text": "the digit"},
        {"type": "image", "image": "img1.jpg"},
        {"type": "image", "image": "img0.jpg"},
    ]
    return {
        "img0.jpg": stored(number)[0],
        "img1.jpg": stored(number + 1)[0],
        "json": json.dumps({"elements": elements}).encode(),
    }


@pytest.fixture
def config(tmp_path: Path, tokenizer: Tokenizer, make_config: Callable[..., Config]) -> Config:
    write_shards([pair(number) for number in range(25)], tmp_path / "pairs")
    write_shards([edit(number) for number in range(10)], tmp_path / "edits")
    sources = [{"name": name, "shards": f"{tmp_path}/{name}/*.tar"} for name in ("pairs", "edits")]
    sections: dict[str, Any] = {"codec": {"channels": 1, "image_sizes": SIZES}}
    found = make_config(sections, sources=sources, validation=sources[:1], tokenizer=str(tokenizer.path))
    return found.with_vocabulary(tokenizer.vocabulary)


def test_what_is_planned_is_what_stands_in_a_row(config: Config, tokenizer: Tokenizer) -> None:
    """Of every document: as many patches, the size that its shape takes, the token that says so."""
    pairs, edits = build_indexes(config, config.data.sources, tokenizer)
    assert pairs.images_by_size() == {"8x8": 10, "8x16": 10, "16x8": 5}
    builder = RowBuilder([pairs, edits], RowSettings.of(config))
    sizes = config.media_sizes
    for index, source in ((pairs, 0), (edits, 1)):
        assert index.lengths.patches_N is not None
        for sample in range(len(index)):
            number = int(index.key(sample)) % 100
            wanted = [stored(number)[1]] if not source else [stored(number + turn)[1] for turn in (0, 1, 0)]
            patches = sum(32 if size != "8x8" else 16 for size in wanted)
            assert index.lengths.patches_N[sample] == patches
            tokens = int(index.lengths.text_tokens_C[sample]) + patches + 2 * len(wanted) + 2
            variant = Variant.INTERLEAVED if source else Variant.CAPTION_FIRST
            row = builder.build((DocumentSpan(source, 0, sample, 0, tokens, variant, 0),))
            assert [f"{i.values_CHW.shape[1]}x{i.values_CHW.shape[2]}" for i in row.images] == wanted
            assert sum(image.patches for image in row.images) == patches
            for image in row.images:
                before = int(row.token_ids_S[image.first_patch - 1])
                assert sizes.size_by_begin_token[before].sides == image.values_CHW.shape[1:]
            assert (
                row.token_ids_S[tokens - 1] == SpecialToken.END_DOCUMENT
                and not row.token_ids_S[tokens:].any()
            )


def test_any_world_size_and_workers_give_the_same_rows(
    config: Config, tokenizer: Tokenizer, rows_of: Any, same: Any
) -> None:
    with Loader(config, config.data.sources, tokenizer, rank=0, world_size=1) as loader:
        alone = [rows_of(loader.next_step()) for _ in range(3)]
        assert {len(batch.media) for batch in loader.next_step()} == {3}, "all sizes in one batch"
    for rank in range(2):
        with Loader(config, config.data.sources, tokenizer, rank=rank, world_size=2) as loader:
            for step in alone:
                assert same(rows_of(loader.next_step()), step[rank::2])


def test_a_plan_for_other_sizes_is_refused(config: Config, tokenizer: Tokenizer) -> None:
    """Also where every document keeps its length: what an image of the second size is has changed."""
    with Loader(config, config.data.sources, tokenizer, rank=0, world_size=1) as loader:
        state = loader.state()
    for sizes in (["8x8"], ["8x8", "8x16"], ["8x8", "16x8", "8x16"]):
        codec = config.codec.model_copy(update={"image_sizes": tuple(sizes)})
        other = config.model_copy(update={"codec": codec})
        with pytest.raises(UserError):
            Loader(other, config.data.sources, tokenizer, rank=0, world_size=1, state=state)
    Loader(config, config.data.sources, tokenizer, rank=0, world_size=1, state=state).close()


def test_what_is_longer_than_a_row_depends_on_the_size(config: Config, tokenizer: Tokenizer) -> None:
    short = config.model_copy(update={"data": config.data.model_copy(update={"sequence_length": 36})})
    (pairs, *_) = build_indexes(short, short.data.sources[:1], tokenizer)
    assert {pairs.size(sample) for sample in range(len(pairs))} == {short.media_sizes.first}
    assert {fault.reason for fault in pairs.faults} == {"longer_than_row"} and len(pairs.faults) == 15


def test_validation_documents_have_their_sizes(config: Config, tokenizer: Tokenizer) -> None:
    loader = EvaluationLoader(config, config.data.validation, tokenizer)
    shapes = [
        tuple(group.values.shape[2:]) for batch in loader for group in batch.media for _ in group.values
    ]
    assert {shape: shapes.count(shape) for shape in set(shapes)} == {(8, 8): 10, (8, 16): 5, (16, 8): 10}


def test_rows_are_shown_with_their_sizes(config: Config, tmp_path: Path) -> None:
    for suffix in (".html", ".png"):
        show_rows(config, tmp_path / f"rows{suffix}")
    assert "8 x 16, 32 patches" in (tmp_path / "rows.html").read_text()
    assert "pairs: 10 images of 8x16" in describe_stats(stats_config(config, steps=1))


def test_a_stored_image_keeps_its_middle(config: Config, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Cut to the shape of the size, evenly on both sides, then scaled."""
    image = np.full((10, 40), 200, np.uint8)
    image[:, :10] = image[:, 30:] = 0
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    write_shards([{"png": buffer.getvalue(), "txt": b"the digit"}], tmp_path / "wide")
    source = config.data.sources[0].model_copy(update={"shards": f"{tmp_path}/wide/*.tar"})
    (index,) = build_indexes(config, [source], tokenizer)
    segment = index.image(0)
    assert isinstance(segment, ImageSegment) and (segment.patches, segment.columns) == (32, 8)
    row = RowBuilder([index], RowSettings.of(config)).build(
        (DocumentSpan(0, 0, 0, 0, 60, Variant.CAPTION_FIRST, 0),)
    )
    assert row.images[0].values_CHW.shape == (1, 8, 16) and (row.images[0].values_CHW == 200).all()


def test_what_cropping_takes_away_is_told_with_sizes_that_keep_more(
    config: Config, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """All images three times as wide as high: a square has a third of them."""
    wide = io.BytesIO()
    Image.new("L", (48, 16), 90).save(wide, "PNG")
    write_shards([{"png": wide.getvalue(), "txt": b"the digit"} for _ in range(9)], tmp_path / "wide")
    codec = config.codec.model_copy(update={"image_sizes": (), "image_size": 16})
    sources = [config.data.sources[0].model_copy(update={"shards": f"{tmp_path}/wide/*.tar", "name": "wide"})]
    data = config.data.model_copy(update={"sources": sources})
    square = config.model_copy(update={"codec": codec, "data": data})
    told = stats_config(square)["sources"]["wide"]["cut_away"]
    assert told == (
        "source wide: 67% of the pixels are cut away, since images become 16x16; codec.image_sizes=[10x28] cuts 7%,"
        " codec.resize=pad cuts nothing"
    )
    assert told in describe_stats(stats_config(square))
    for changed in ({"resize": "pad"}, {"resize": "fit"}, {"image_sizes": ("10x28",)}):
        other = square.model_copy(update={"codec": codec.model_copy(update=changed)})
        assert not stats_config(other)["sources"]["wide"]["cut_away"]
