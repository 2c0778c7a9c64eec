"""Interleaved documents and latents on their whole way: from a shard through plan and row into a batch."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from transfusion.config import Config
from transfusion.data.index.source_index import SourceIndex, build_indexes
from transfusion.data.loading.loader import Loader, plan_settings
from transfusion.data.loading.rows import RowBuilder, RowSettings
from transfusion.data.loading.validation import documents
from transfusion.data.planning.epoch import Variant
from transfusion.data.planning.packing import DocumentSpan, Planner
from transfusion.data.shards.webdataset import write_shards
from transfusion.errors import UserError
from transfusion.schema import ImageSegment, Modality, SpecialToken
from transfusion.sequence.layout import lay_out
from transfusion.sequence.tokenizer import Tokenizer

PATCHES, DOCUMENTS = 16, 40


def png(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (8, 8), shade).save(stream, "PNG")
    return stream.getvalue()


def edit(number: int) -> dict[str, bytes]:
    """Image, instruction, image; every fourth shows its first image again."""
    elements = [
        {"type": "image", "image": "img0.png"},
        {"type": "text", "text": "the digit " * (1 + number % 5)},
        {"type": "image", "image": "img1.png"},
    ]
    elements += elements[:1] if number % 4 == 0 else []
    facts = {"elements": elements}
    return {"img0.png": png(number), "img1.png": png(100 + number), "json": json.dumps(facts).encode()}


def latent(number: int) -> dict[str, bytes]:
    stream = io.BytesIO()
    np.save(stream, np.full((1, 8, 8), number / 8, np.float16))
    return {"latent.npy": stream.getvalue(), "txt": b"the digit"}


@pytest.fixture
def config(tmp_path: Path, data: Path, make_config: object) -> Config:
    write_shards([edit(number) for number in range(DOCUMENTS)], tmp_path / "edits")
    write_shards([latent(number) for number in range(DOCUMENTS)], tmp_path / "latents")
    sources = [
        {"name": "edits", "shards": f"{tmp_path}/edits/*.tar"},
        {"name": "latents", "shards": f"{tmp_path}/latents/*.tar"},
        {"name": "docs", "shards": f"{data}/docs/validation/*.tar"},
    ]
    found: Config = make_config(sources=sources, caption_dropout=0.5)  # type: ignore[operator]
    return found


def test_a_row_of_an_interleaved_document(config: Config, tokenizer: Tokenizer) -> None:
    (index, *_) = build_indexes(config, config.data.sources, tokenizer)
    segments, images = index.segments(4)
    layout = lay_out(segments)
    assert images == [0, 1, 0] and len(layout) == int(index.lengths.text_tokens_C[4]) + 3 * (PATCHES + 2) + 2
    piece = DocumentSpan(0, 0, 4, 0, len(layout), int(Variant.INTERLEAVED))
    row = RowBuilder([index], RowSettings.of(config)).build((piece,))
    assert [int(image.values_CHW.max()) for image in row.images] == [4, 104, 4]
    assert [image.first_patch for image in row.images] == [first for first, _ in layout.images]
    assert (
        len({image.noise_key for image in row.images}) == 3 == len({image.timestep for image in row.images})
    )
    assert np.array_equal(row.token_ids_S[: len(layout)], layout.token_ids_S)


def test_only_the_last_image_of_a_document_is_noised_beyond_recognition(
    config: Config, tokenizer: Tokenizer
) -> None:
    (index, *_) = build_indexes(config, config.data.sources, tokenizer)
    builder, limit = (
        RowBuilder([index], RowSettings.of(config)),
        config.diffusion.max_timestep_before_caption,
    )
    first, last = [], []
    for sample in range(DOCUMENTS):
        for epoch in range(8):
            tokens = len(lay_out(index.segments(sample)[0]))
            piece = DocumentSpan(0, epoch, sample, 0, tokens, int(Variant.INTERLEAVED))
            *before, after = (image.timestep for image in builder.build((piece,)).images)
            # The last image of every fourth is followed by nothing either.
            first += before
            last.append(after)
    assert max(first) < limit <= max(last)


def test_an_image_that_cannot_be_had_silences_its_document(
    config: Config, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (index, *_) = build_indexes(config, config.data.sources, tokenizer)
    read = SourceIndex.read_image
    monkeypatch.setattr(
        SourceIndex,
        "read_image",
        lambda self, sample, image, *shards: b"" if image else read(self, sample, image),
    )
    lengths = [len(lay_out(index.segments(sample)[0])) for sample in range(2)]
    plan = tuple(
        DocumentSpan(0, 0, sample, 0, length, int(Variant.INTERLEAVED))
        for sample, length in enumerate(lengths)
    )
    row = RowBuilder([index], RowSettings.of(config)).build(plan)
    assert not row.images and not row.text_weight_S.any() and (row.modality_S == Modality.PADDING).all()
    assert [fault.reason for fault in row.faults] == ["image_corrupt"] * 2
    assert [fault.key for fault in row.faults] == ["000000000", "000000001"]


def test_batches_hold_every_kind(config: Config, tokenizer: Tokenizer) -> None:
    with Loader(config, config.data.sources, tokenizer, rank=0, world_size=1) as loader:
        whole = {len(lay_out(loader.indexes[0].segments(sample)[0])) for sample in range(DOCUMENTS)}
        seen = set()
        for _ in range(6):
            for batch in loader.next_step():
                batch.mask.validate()
                assert batch.counts.faults == 0
                for group in batch.media:
                    seen.add(group.values.dtype)
                    # Patches stand where the groups say, each once.
                    slots = group.patch_slot_IP.flatten()
                    assert (batch.modality_BS.flatten()[slots] == Modality.IMAGE).all()
                assert sum(group.patch_slot_IP.numel() for group in batch.media) == int(
                    (batch.modality_BS == Modality.IMAGE).sum()
                )
        assert seen == {torch.uint8, torch.float32} and max(whole) > 2 * PATCHES


def test_latents_are_read_as_they_are(config: Config, tokenizer: Tokenizer) -> None:
    found = list(documents(config, config.data.sources[:2], tokenizer))
    assert len(found) == 2 * DOCUMENTS
    values = [
        segment.values_CHW
        for document in found[DOCUMENTS:]
        for segment in document.segments
        if isinstance(segment, ImageSegment)
    ]
    assert [float(value[0, 0, 0]) for value in values] == [number / 8 for number in range(DOCUMENTS)]
    assert {value.dtype for value in values} == {np.dtype(np.float32)}


def test_noised_copies_are_planned_to_the_token(config: Config, tokenizer: Tokenizer) -> None:
    """Every span has the length of its row's part, whose images are read clean and learned behind it."""
    config = Config.model_validate(config.as_dict() | {"diffusion": {"context": "clean"}})
    with Loader(config, config.data.sources, tokenizer, rank=0, world_size=1) as loader:
        indexes, builder = loader.indexes, RowBuilder(loader.indexes, RowSettings.of(config))
        state = loader.state()
        batches = [batch for _ in range(4) for batch in loader.next_step()]
    lengths = [index.lengths for index in indexes]
    planner, seen = Planner(lengths, plan_settings(config)), set()
    for plan in itertools.chain.from_iterable(planner.next_batch() for _ in range(4)):
        row = builder.build(plan)
        used = int((row.modality_S != Modality.PADDING).sum())
        assert used == sum(span.tokens for span in plan) <= config.data.sequence_length
        twins = {twin.first for twin in row.twins}
        assert twins == {image.first_patch for image in row.images if image.first_patch in twins}
        for image in row.images:
            assert (
                row.token_ids_S[image.first_patch : image.first_patch + PATCHES] == SpecialToken.PATCH
            ).all()
            assert not image.is_context or (image.timestep == 0 and image.first_patch not in twins)
        assert len(twins) == sum(image.is_context for image in row.images)
        seen |= {Variant(span.variant) for span in plan if span.variant != Variant.TEXT}
    assert seen >= {Variant.IMAGE_FIRST, Variant.INTERLEAVED, Variant.CAPTION_DROPPED}
    for batch in batches:
        batch.mask.validate()
        assert batch.second is not None
        batch.second[1].validate()
        assert len(batch.second[0].unique(dim=1)[0]) == batch.second[0].shape[1]
    # A plan of noisy contexts is another plan.
    noisy = Config.model_validate(config.as_dict() | {"diffusion": {"context": "noisy"}})
    with pytest.raises(UserError):
        Loader(noisy, noisy.data.sources, tokenizer, rank=0, world_size=1, state=state)


def test_what_does_not_fit_with_its_copies_is_left_out(config: Config, tokenizer: Tokenizer) -> None:
    """Every fourth document has three images, of which two have a copy, the others two and one."""
    index, *_ = build_indexes(config, config.data.sources, tokenizer)

    def length(text: int, images: int) -> int:
        return text + 2 + images * (PATCHES + 2) + (images - 1) * PATCHES

    texts = index.lengths.text_tokens_C.tolist()
    values = config.as_dict()
    values["data"] |= {"sequence_length": length(max(texts), 2)}
    values["diffusion"] |= {"context": "clean"}
    fitting = Config.model_validate(values)
    one, *_ = build_indexes(fitting, fitting.data.sources, tokenizer)
    lengths = [length(text, 2 if number % 4 else 3) for number, text in enumerate(texts)]
    kept = [each for each in lengths if each <= length(max(texts), 2)]
    assert len(one) == len(kept) < len(lengths) == DOCUMENTS
    assert {fault.reason for fault in one.faults} == {"longer_than_row"}


@pytest.mark.parametrize(
    ("world_size", "changes"), [(2, {}), (1, {"micro_batch_size": 3}), (1, {"workers": 2})]
)
def test_noised_copies_are_the_same_at_any_world_size(
    config: Config, tokenizer: Tokenizer, rows_of: Any, same: Any, world_size: int, changes: dict[str, int]
) -> None:
    values = config.as_dict()
    values["diffusion"] |= {"context": "clean"}
    alone = Config.model_validate(values)
    shared = Config.model_validate(values | {"data": values["data"] | changes})

    def steps(config: Config, ranks: int) -> list[Any]:
        with contextlib.ExitStack() as stack:
            loaders = [
                stack.enter_context(
                    Loader(config, config.data.sources, tokenizer, rank=rank, world_size=ranks)
                )
                for rank in range(ranks)
            ]
            parts = [[rows_of(loader.next_step()) for loader in loaders] for _ in range(3)]
        return [[row for rows in zip(*step, strict=True) for row in rows] for step in parts]

    for one, other in zip(steps(alone, 1), steps(shared, world_size), strict=True):
        assert same(one, other)
