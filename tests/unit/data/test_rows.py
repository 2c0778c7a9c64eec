"""Rows and batches: documents apart from each other, noise levels, and bad samples that keep their place."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from transfusion.config import Config
from transfusion.data.index.source_index import SourceIndex, build_indexes
from transfusion.data.loading.collate import collate
from transfusion.data.loading.rows import Row, RowBuilder, RowSettings
from transfusion.data.planning.epoch import Variant
from transfusion.data.planning.packing import DocumentSpan
from transfusion.schema import ImageSegment, Modality, SpecialToken
from transfusion.sequence.layout import lay_out
from transfusion.sequence.tokenizer import Tokenizer

MakeConfig = Callable[..., Config]


@pytest.fixture(scope="module")
def config(make_config: MakeConfig) -> Config:
    return make_config()


@pytest.fixture(scope="module")
def indexes(config: Config, tokenizer: Tokenizer) -> list[SourceIndex]:
    return build_indexes(config, config.data.sources, tokenizer)


def pair(index: SourceIndex, sample: int, variant: Variant, epoch: int = 0) -> DocumentSpan:
    caption = 1
    text = 0 if variant == Variant.CAPTION_DROPPED else len(index.text_ids(sample, caption))
    return DocumentSpan(0, epoch, sample, 0, text + 20, variant, caption)


def test_a_row_of_every_variant(config: Config, indexes: list[SourceIndex]) -> None:
    builder = RowBuilder(indexes, RowSettings.of(config))
    plan = (
        pair(indexes[0], 0, Variant.CAPTION_FIRST),
        DocumentSpan(1, 0, 0, 50, 40, Variant.TEXT),
        pair(indexes[0], 1, Variant.IMAGE_FIRST),
        pair(indexes[0], 2, Variant.CAPTION_DROPPED),
    )
    row = builder.build(plan)
    used = sum(span.tokens for span in plan)
    starts = np.cumsum([0, *(span.tokens for span in plan)])
    assert row.samples == 4 and not row.faults and len(row.images) == 3
    assert (row.modality_S[used:] == Modality.PADDING).all() and (
        row.modality_S[:used] < Modality.PADDING
    ).all()
    assert (row.first_key_S[used:] == used).all() and (row.end_key_S[used:] == used).all()
    assert np.array_equal(row.first_key_S[:used], np.repeat(starts[:-1], np.diff(starts)))
    for first, end in itertools.pairwise(starts):
        # Nothing sees or predicts across a border, and positions begin anew.
        assert row.end_key_S[first:end].max() == end
        assert row.position_SA[first:end, 0].tolist() == list(range(end - first))
    document_ends = starts[[1, 3, 4]] - 1
    assert (row.token_ids_S[document_ends] == SpecialToken.END_DOCUMENT).all()
    assert (row.text_weight_S[document_ends] == 0).all()
    # A text that goes on in another row still learns its true next token.
    assert row.text_weight_S[starts[2] - 1] == 1
    assert row.target_ids_S[starts[2] - 1] == indexes[1].text_ids(0)[89]
    caption = indexes[0].text_ids(0, plan[0].caption)
    assert row.token_ids_S[1 : 1 + len(caption)].tolist() == caption.tolist()
    dropped = row.token_ids_S[starts[3] : starts[4]]
    assert dropped.tolist() == lay_out([ImageSegment(None, 16)]).token_ids_S.tolist()
    assert not row.text_weight_S[starts[3] : starts[4]].any()
    for image in row.images:
        assert (row.token_ids_S[image.first_patch : image.first_patch + 16] == SpecialToken.PATCH).all()
        assert row.token_ids_S[image.first_patch - 1] == SpecialToken.BEGIN_IMAGE


def test_noise_levels(config: Config, indexes: list[SourceIndex]) -> None:
    builder = RowBuilder(indexes, RowSettings.of(config))
    levels: dict[Variant, list[int]] = {}
    keys = set()
    for variant in (Variant.CAPTION_FIRST, Variant.IMAGE_FIRST, Variant.CAPTION_DROPPED):
        rows = [
            builder.build((pair(indexes[0], sample, variant, epoch),))
            for sample in range(290)
            for epoch in (0, 1)
        ]
        levels[variant] = [row.images[0].timestep for row in rows]
        keys |= {row.images[0].noise_key for row in rows}
    assert min(levels[Variant.IMAGE_FIRST]) >= 0 and 450 < max(levels[Variant.IMAGE_FIRST]) < 500
    for variant in (Variant.CAPTION_FIRST, Variant.CAPTION_DROPPED):
        assert min(levels[variant]) < 20 and 980 < max(levels[variant]) < 1000
        assert abs(np.mean(levels[variant]) - 500) < 50
    # A key for each sample and epoch; the variant is no part of it.
    assert len(keys) == 580 and all(0 <= key < 2**63 for key in keys)


def test_no_limit_when_it_is_zero(make_config: MakeConfig, indexes: list[SourceIndex]) -> None:
    config = make_config({"diffusion": {"max_timestep_before_caption": 0}})
    builder = RowBuilder(indexes, RowSettings.of(config))
    rows = [builder.build((pair(indexes[0], sample, Variant.IMAGE_FIRST),)) for sample in range(200)]
    assert max(row.images[0].timestep for row in rows) > 900


@pytest.mark.parametrize("prediction", ["v", "flow", "x"])
def test_a_law_of_timesteps_and_its_limit(
    make_config: MakeConfig, indexes: list[SourceIndex], prediction: str
) -> None:
    """The law is a function of the hash of the sample: the row and its company do not matter."""
    fields = {"prediction": prediction, "timestep_sampling": "logit-normal"}
    builder = RowBuilder(indexes, RowSettings.of(make_config({"diffusion": fields})))

    def timesteps(variant: Variant) -> list[int]:
        plans = [(pair(indexes[0], sample, variant),) for sample in range(290)]
        return [builder.build(plan).images[0].timestep for plan in plans]

    levels = np.array(timesteps(Variant.CAPTION_FIRST)) / 1000
    # Of the logistic of a normal number 68 % lie in the middle; of a uniform one 46 %.
    assert 0.6 < ((levels > 0.269) & (levels < 0.731)).mean() < 0.77
    capped = np.array(timesteps(Variant.IMAGE_FIRST))
    assert capped.max() < 500 and np.median(capped) > 280
    together = builder.build(tuple(pair(indexes[0], sample, Variant.IMAGE_FIRST) for sample in range(5)))
    assert [image.timestep for image in together.images] == capped[:5].tolist()


def test_a_sample_that_cannot_be_read_keeps_its_place(
    config: Config, indexes: list[SourceIndex], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = RowSettings.of(config)
    plan = tuple(pair(indexes[0], sample, Variant.CAPTION_FIRST) for sample in range(3))
    good = RowBuilder(indexes, settings).build(plan)
    read = SourceIndex.read_image
    monkeypatch.setattr(
        SourceIndex,
        "read_image",
        lambda self, sample, *rest: b"torn" if sample == 1 else read(self, sample),
    )
    row = RowBuilder(indexes, settings).build(plan)
    start, end = plan[0].tokens, plan[0].tokens + plan[1].tokens
    assert [fault.reason for fault in row.faults] == ["image_corrupt"]
    assert (row.modality_S[start:end] == Modality.PADDING).all() and not row.text_weight_S[start:end].any()
    assert np.array_equal(row.first_key_S, good.first_key_S) and np.array_equal(row.end_key_S, good.end_key_S)
    for name in ("token_ids_S", "modality_S", "target_ids_S", "text_weight_S", "position_SA"):
        for part in (slice(0, start), slice(end, None)):
            assert np.array_equal(getattr(row, name)[part], getattr(good, name)[part])
    assert [image.noise_key for image in row.images] == [good.images[n].noise_key for n in (0, 2)]
    batch = collate([row], settings)
    batch.mask.validate()
    assert batch.counts.faults == 1 and batch.counts.images == 2
    assert batch.counts.padding == (row.modality_S == Modality.PADDING).sum()


def test_a_batch_counts_what_it_holds(config: Config, indexes: list[SourceIndex]) -> None:
    settings = RowSettings.of(config)
    builder = RowBuilder(indexes, settings)
    rows = [builder.build((pair(indexes[0], n, Variant.CAPTION_FIRST),)) for n in range(3)]
    batch = collate(rows, settings)
    (group,) = batch.media
    assert group.values.shape == (3, 1, 8, 8) and group.values.dtype == torch.uint8
    assert batch.counts.images == 3 and batch.counts.image_elements == 3 * 64
    assert batch.counts.tokens + batch.counts.padding == 3 * 256
    assert batch.counts.text_targets == int(batch.text_weight_BS.sum())
    patches = batch.token_ids_BS.flatten()[group.patch_slot_IP]
    assert (patches == SpecialToken.PATCH).all()
    assert (batch.modality_BS == Modality.IMAGE).sum() == group.patch_slot_IP.numel()
    assert group.patch_slot_IP.unique().numel() == 48


@pytest.mark.parametrize("kind", ["text", "nothing"])
def test_a_batch_without_images_carries_one_of_weight_zero(
    config: Config, indexes: list[SourceIndex], kind: str
) -> None:
    settings = RowSettings.of(config)
    builder = RowBuilder(indexes, settings)
    row: Row = (
        builder.build((DocumentSpan(1, 0, 0, 0, 100, Variant.TEXT),)) if kind == "text" else builder.build(())
    )
    batch = collate([row], settings)
    (group,) = batch.media
    assert group.image_weight_I.tolist() == [0.0] and group.patch_slot_IP.tolist() == [list(range(16))]
    assert group.values.shape == (1, 1, 8, 8) and batch.counts.images == 0
    batch.mask.validate()


def test_colour_and_positions_in_two_dimensions(make_config: MakeConfig, indexes: list[SourceIndex]) -> None:
    config = make_config(
        {"codec": {"channels": 3, "image_size": 16}, "model": {"position": "2d", "patch_size": 4}}
    )
    settings = RowSettings.of(config)
    row = RowBuilder(indexes, settings).build((pair(indexes[0], 0, Variant.CAPTION_FIRST),))
    assert row.images[0].values_CHW.shape == (3, 16, 16) and row.position_SA.shape == (256, 3)


def test_faults_stand_in_the_order_of_the_row(
    config: Config, indexes: list[SourceIndex], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those found in reading and those found in decoding; of a document the first image's."""
    wrong: dict[tuple[int, int], bytes | OSError] = {
        (0, 0): b"torn", (1, 0): OSError(5, "gone"), (2, 0): b"torn", (3, 0): b"torn", (3, 1): OSError(5, "gone"),
    }  # fmt: skip
    read = SourceIndex.read_image

    def damaged(self: SourceIndex, sample: int, image: int = 0, *rest: object) -> bytes:
        found = wrong.get((sample, image))
        if isinstance(found, OSError):
            raise found
        return found or read(self, sample)

    monkeypatch.setattr(SourceIndex, "read_image", damaged)
    builder = RowBuilder(indexes, RowSettings.of(config))
    monkeypatch.setattr(builder, "_numbers", lambda span: (0, 1) if span.sample == 3 else (0,))
    images, faults = builder._decode(tuple(pair(indexes[0], n, Variant.CAPTION_FIRST) for n in range(5)))
    assert [fault.reason for fault in faults] == [
        "image_corrupt", "unreadable shard (gone)", "image_corrupt", "image_corrupt",
    ]  # fmt: skip
    assert [fault.key for fault in faults] == [indexes[0].key(sample) for sample in range(4)]
    assert images.keys() == {4}


def test_a_vanished_shard_is_a_fault(
    config: Config, indexes: list[SourceIndex], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def missing(self: SourceIndex, sample: int, *rest: object) -> bytes:
        return (tmp_path / "gone.tar").read_bytes()

    monkeypatch.setattr(SourceIndex, "read_image", missing)
    row = RowBuilder(indexes, RowSettings.of(config)).build((pair(indexes[0], 0, Variant.CAPTION_FIRST),))
    assert row.faults[0].reason.startswith("unreadable shard") and not row.images
