"""A third modality beside text and images: declared, read, packed, learned, measured, and never said by mistake."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sounds import SOUND, npy, sound

from transfusion import Pipeline, train
from transfusion.checkpoint.export import export
from transfusion.codec import open_media_codecs
from transfusion.config import Config, ModalityConfig
from transfusion.data.index.source_index import build_indexes
from transfusion.data.loading.loader import Loader
from transfusion.data.loading.validation import EvaluationLoader, documents
from transfusion.data.shards.webdataset import write_shards
from transfusion.evaluate.captioned_images import some_captioned_images
from transfusion.evaluate.suites.settings import ValidationSuite
from transfusion.evaluate.suites.validation import validation
from transfusion.generate import ImageSampling, Request
from transfusion.generate.recipe import Origin, Recipe
from transfusion.observe.flops import FlopModel
from transfusion.observe.metrics import read_metrics
from transfusion.schema import Batch, ImageSegment
from transfusion.sequence.sizes import Size
from transfusion.sequence.tokenizer import Tokenizer

Make = Callable[..., Config]
LONG, SHORT = Size(1, 16, "sound"), Size(1, 8, "sound")


def batches(config: Config, tokenizer: Tokenizer, steps: int = 4) -> list[Batch]:
    with Loader(config, config.data.sources, tokenizer, rank=0, world_size=1) as loader:
        return [batch for _ in range(steps) for batch in loader.next_step()]


def test_its_tokens_are_the_last_and_move_no_others(config: Make, tokenizer: Tokenizer) -> None:
    pieces = tokenizer.vocabulary
    without = config(modalities=[], codec={"image_size": 32, "image_sizes": ["8x8", "8x16"]})
    beside = config(codec={"image_size": 32, "image_sizes": ["8x8", "8x16"]})
    assert without.model.vocabulary == pieces + 1 and beside.model.vocabulary == pieces + 3
    begins = beside.media_sizes.size_by_begin_token
    assert begins[pieces + 1] == LONG and begins[pieces + 2] == SHORT
    assert begins[pieces] == without.media_sizes.size_by_begin_token[pieces] == Size(8, 16)
    assert [beside.media_sizes.patches(size) for size in (LONG, SHORT)] == [4, 2]
    assert beside.media_sizes.is_image(pieces) and not beside.media_sizes.is_image(pieces + 1)


@pytest.mark.parametrize(
    ("modalities", "told"),
    [
        ([SOUND, SOUND], "two have the same name among sound, sound"),
        ([SOUND | {"name": "image"}], "modalities.image: choose another name"),
        ([SOUND | {"kind": "video"}], "modalities.sound.kind=video does not exist; choose latents"),
        ([SOUND | {"shapes": ["1x6"]}], "shapes: 1x6 must be a multiple of modalities.sound.patch 1x4"),
        ([SOUND | {"shapes": []}], "modalities.sound.shapes must name at least one"),
        ([SOUND | {"patch": "four"}], "modalities.sound.patch: 'four' is not a size"),
        (
            [SOUND | {"shapes": ["1x4000"]}],
            "sequence_length 96 is too short for sound 1x4000 of 1000 patches",
        ),
        ([SOUND | {"diffusion": {"timestep_shift": 3.0}}], "modalities.sound.diffusion.timestep_shift=3"),
        (
            [SOUND | {"diffusion": {"context": "clean"}}],
            "modalities.sound.diffusion.context is that of images",
        ),
    ],
)
def test_what_does_not_fit_together_is_told(config: Make, modalities: list[object], told: str) -> None:
    with pytest.raises(ValueError) as error:
        config(modalities=modalities)
    assert told in str(error.value)


def test_other_families_and_shared_rows_take_none(config: Make) -> None:
    for sections in ({"train": {"sequence_parallel": 2}}, {"model": {"family": "chameleon"}}):
        with pytest.raises(ValueError, match="modalities"):
            config(**sections)


def test_arrays_are_normed_and_each_block_is_a_latent() -> None:
    modality = ModalityConfig.model_validate(SOUND | {"shapes": ["4x8"], "patch": "2x4"})
    codec = open_media_codecs([modality])["sound"]
    values = torch.randn(2, 3, 4, 8)
    latents = codec.encode(values)
    assert latents.shape == (2, *modality.latent_shape(Size(4, 8, "sound"))) == (2, 24, 2, 2)
    block = (values[1, 2, 2:4, 4:8] - 0.5) * 2
    assert torch.equal(latents[1, 16:, 1, 1], block.flatten())
    torch.testing.assert_close(codec.decode(latents), values)


@pytest.mark.parametrize(
    ("shape", "picture"), [((3, 1, 16), (6, 16)), ((1, 1, 64), (16, 64)), ((1, 64, 1), (64, 16))]
)
def test_a_picture_shows_the_channels_one_below_another(
    shape: tuple[int, int, int], picture: tuple[int, int]
) -> None:
    """And no line is so thin that nobody sees it."""
    (codec,) = open_media_codecs([ModalityConfig.model_validate(SOUND | {"channels": shape[0]})]).values()
    values = torch.zeros(shape)
    values[-1, -1, -1] = 2.0
    drawn = codec.picture(values)
    assert drawn.shape == (1, *picture) and drawn.dtype == torch.uint8
    assert drawn[0, 0, 0] == 0 and drawn[0, -1, -1] == 255


def test_documents_hold_what_their_shards_do(config: Make, tokenizer: Tokenizer) -> None:
    made = config()
    read = list(documents(made, made.data.sources, tokenizer))
    assert len(read) == 48
    media = [[part for part in each.segments if isinstance(part, ImageSegment)] for each in read]
    sizes = [[made.media_sizes.size_by_begin_token[part.begin] for part in parts] for parts in media]
    assert sizes[:4] == [[SHORT], [Size(8, 8)], [], [Size(8, 8), SHORT, LONG]]
    assert np.array_equal(media[0][0].values_CHW, sound(0, 8)) and media[3][2].values_CHW.shape == (3, 1, 16)


def test_a_batch_has_a_group_of_each_modality(config: Make, tokenizer: Tokenizer) -> None:
    for batch in batches(config(), tokenizer):
        names = [group.modality for group in batch.media]
        assert names == sorted(names) and set(names) == {"image", "sound"}
        assert batch.patches == int((batch.modality_BS == 1).sum())
        for group in batch.media:
            slots = batch.modality_BS.flatten()[group.patch_slot_IP]
            assert group.is_empty or (slots == 1).all()
    alone = config(data={"sequence_length": 96, "sources": [_texts(config())]})
    (batch,) = batches(alone, tokenizer, 1)
    assert [(group.modality, group.is_empty) for group in batch.media] == [("image", True), ("sound", True)]
    assert batch.patches == 0 and batch.media[1].values.shape == (1, 3, 1, 16)


def _texts(config: Config) -> dict[str, str]:
    folder = Path(config.data.tokenizer).parent / "texts"
    write_shards(({"txt": b"a low sound " * 9} for _ in range(9)), folder)
    return {"name": "texts", "shards": f"{folder}/*.tar"}


def test_any_world_size_gives_the_same_rows(config: Make, tokenizer: Tokenizer) -> None:
    made = config()
    alone = batches(made, tokenizer)
    for rank in range(2):
        with Loader(made, made.data.sources, tokenizer, rank=rank, world_size=2) as loader:
            for whole in alone:
                (part,) = loader.next_step()
                assert torch.equal(part.token_ids_BS, whole.token_ids_BS[rank::2])
                keys = {int(key) for group in whole.media for key in group.noise_key_I}
                assert {
                    int(k) for group in part.media if not group.is_empty for k in group.noise_key_I
                } <= keys


def test_without_it_a_plan_is_what_it_was(config: Make, tokenizer: Tokenizer) -> None:
    """The lengths of sources of texts and images have the same digest, declared or not, where sizes are several."""
    folder = Path(config().data.tokenizer).parent
    write_shards(({"txt": b"a low sound " * 9} for _ in range(9)), folder / "plain")
    lengths = [
        build_indexes(made, made.data.sources, tokenizer)[0].lengths
        for made in (config("plain", modalities=[]), config("plain"))
    ]
    assert np.array_equal(lengths[0].text_tokens_C, lengths[1].text_tokens_C)
    assert lengths[0].patches_N is None


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        ({"sound.npy": npy(sound(0)[:2])}, "latent_shape"),
        ({"sound.npy": npy(sound(0).astype(np.int32))}, "latent_dtype"),
        ({"sound.npy": npy(sound(0))[:-8]}, "latent_corrupt"),
        ({"video.npy": npy(sound(0))}, "modality_undeclared"),
        ({"sound.npy": npy(sound(0)), "video.npy": npy(sound(0))}, "ambiguous_media"),
    ],
)
def test_what_is_no_sound_is_left_out_with_its_reason(
    config: Make, tokenizer: Tokenizer, sample: dict[str, bytes], reason: str
) -> None:
    made = config("few")
    folder = Path(made.data.tokenizer).parent / "few"
    write_shards([{**sample, "txt": b"a sound"}, {"sound.npy": npy(sound(1)), "txt": b"another"}], folder)
    (index,) = build_indexes(made, made.data.sources, tokenizer)
    assert len(index) == 1 and [fault.reason for fault in index.faults] == [reason]


def test_an_array_of_another_length_or_not_finite_is_a_fault_of_its_row(
    config: Make, tokenizer: Tokenizer
) -> None:
    made = config("odd")
    folder = Path(made.data.tokenizer).parent / "odd"
    odd = [sound(0, 12), np.where(np.arange(16) == 3, np.nan, sound(1))]
    write_shards([{"sound.npy": npy(each), "txt": b"a sound"} for each in (*odd, sound(2))], folder)
    found = [batch.counts for batch in EvaluationLoader(made, made.data.sources, tokenizer, rows=1)]
    assert sum(count.faults for count in found) == 2 and sum(count.images for count in found) == 1


def test_it_is_learned_measured_and_counted_and_images_are_drawn_as_before(
    config: Make, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    made = config(train={"precision": "fp32", "steps": 60, "threads": 1})
    assert train(made) == 0
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    first, last = lines[0], lines[-1]
    for name in ("text", "image", "sound"):
        begun, ended = (sum(line[f"{name}_loss"] for line in some) for some in (lines[:10], lines[-10:]))
        assert ended < 0.9 * begun
    assert math.isclose(first["loss"], first["text_loss"] + 5 * first["image_loss"] + 5 * first["sound_loss"])
    assert {"validation_sound_loss", "sound_loss_by_timestep"} <= {name for line in lines for name in line}
    assert last["flops"] > 0

    pipeline = Pipeline.from_export(export(tmp_path / "run", tmp_path / "export"))
    metrics = validation(pipeline, tmp_path, ValidationSuite())
    assert {"all_image_loss", "all_sound_loss"} <= metrics.keys()
    assert metrics["all_sound_loss"].value < 1.2 and metrics["all_sound_loss"].unit == ""
    images, captions, known = some_captioned_images(pipeline, 100)
    assert known == len(images) == 12 and all("grey" in caption for caption in captions)
    assert pipeline.sample(["a low grey"], steps=2)[0].pixels.shape == (1, 8, 8)
    # Without a way to draw it yet, an answer never begins one.
    for answer in pipeline.generate(
        [["a low sound"]] * 4, max_tokens=8, max_images=1, temperature=1.5, steps=2
    ):
        assert all(isinstance(part, str) or part.shape == (1, 8, 8) for part in answer)


def test_the_operations_of_its_patches_are_its_own(config: Make, tokenizer: Tokenizer) -> None:
    made = config()
    model = FlopModel(made)
    with_sounds = model.image_operations((12, 1, 4), modality="sound")
    # Two products of 12 values and 32, forward and backward, for 4 patches, and the timestep's two matrices.
    timestep = 6 * (256 * 32 + 32 * 32)
    assert 6 * 4 * 12 * 32 <= with_sounds <= 6 * 2 * 4 * 12 * 32 + timestep
    assert model.of(batches(made, tokenizer, 1)).exact.products > 0


def test_a_patch_wider_than_the_network_is_warned_of(config: Make) -> None:
    wide = SOUND | {"shapes": ["1x48"], "patch": "1x24"}
    (told,) = config(modalities=[wide]).warnings()
    assert "modalities.sound has 72 values, more than model.hidden_size 32 can carry" in told
    assert config(modalities=[wide | {"diffusion": {"prediction": "x"}}]).warnings() == []
    assert config().warnings() == []


def test_recipes_of_texts_and_images_are_as_before(config: Make) -> None:
    made = Recipe.of(
        Request(prompt=["one"], image=ImageSampling(size=Size(8, 16))),
        0,
        torch.zeros(1, 8, 16),
        Origin(),
        "ddim",
    )
    told = json.loads(made.as_json())
    assert told["image"]["size"] == [8, 16] and "modalities" not in told
    beside = replace(made, modalities=("image", "sound"))
    assert json.loads(beside.as_json())["modalities"] == ["image", "sound"]
