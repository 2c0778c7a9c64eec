"""Sounds in prompts and answers, by the engine that draws images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sounds import SOUND, sound

from transfusion import Pipeline
from transfusion.config import Config
from transfusion.errors import UserError
from transfusion.generate import Media, MediaDone
from transfusion.inference.image_diffusion import predict
from transfusion.model import Transfusion
from transfusion.schema import ImageSegment, TextSegment
from transfusion.sequence.sizes import Size
from transfusion_kernels import IntervalMask

LONG, SHORT = Size(1, 16, "sound"), Size(1, 8, "sound")
HEARD = Media("sound", torch.from_numpy(sound(1, 8)))


@pytest.fixture
def pipeline(config: Callable[..., Config], untrained: Callable[[Config], Pipeline]) -> Pipeline:
    return untrained(config())


@pytest.mark.parametrize(("size", "length"), [(None, 16), (LONG, 16), (SHORT, 8), ((1, 8), 8)])
def test_it_is_drawn_at_the_shapes_it_has(pipeline: Pipeline, size: Any, length: int) -> None:
    drawn = pipeline.sample_media("sound", ["a low sound", "high"], per_prompt=2, size=size, steps=3, seed=5)
    assert [each.values.shape for each in drawn] == [(3, 1, length)] * 4
    again = pipeline.sample_media("sound", ["high"], size=size, steps=3, seed=8)[0]
    torch.testing.assert_close(again.values, drawn[3].values)
    assert not torch.equal(drawn[0].values, drawn[1].values)


def test_behind_cached_rows_the_network_answers_as_without_a_cache(pipeline: Pipeline) -> None:
    """The answer behind cached rows is that of the whole sequence at once."""
    runner = pipeline.runner
    noise = torch.randn(1, 12, 1, 4)
    segments = [TextSegment(tuple(pipeline.tokenizer.encode("low"))), runner.image(LONG)]
    layout = runner.lay_out(segments, finished=False)
    first = layout.images[0][0]
    with torch.no_grad():
        cache = runner.cache(8)
        row = cache.row(first + 4)
        runner.read(cache.view([row]), runner.prompt_block([(layout, 0, first)]))
        found = predict(runner, cache.view([row]), noise, torch.tensor([999.0]), LONG)
        model = runner.model
        assert isinstance(model, Transfusion)
        encoding = model.encode_patches([noise], torch.tensor([999.0]), "sound")
        hidden = model.embedding(torch.from_numpy(layout.token_ids_S))[None]
        hidden = hidden.clone()
        hidden[0, first : first + 4] = encoding.patch_ND
        mask = IntervalMask(
            torch.from_numpy(layout.first_key_S)[None], torch.from_numpy(layout.end_key_S)[None]
        )
        hidden = model.run_blocks(hidden, torch.from_numpy(layout.position_SA)[None], mask)
        alone = model.decode_patches(model.norm(hidden)[0, first : first + 4], encoding)
    torch.testing.assert_close(found, alone.T.reshape(1, 12, 1, 4), atol=2e-5, rtol=1e-4)


def test_prompts_hold_it_and_what_they_hold_counts(pipeline: Pipeline) -> None:
    other = Media("sound", -HEARD.values)
    told = [pipeline.inspect([each, "is low"]).nats for each in (HEARD, other)]
    assert len(told[0]) == len(told[1]) and told[0] != told[1]
    scores = pipeline.score([[HEARD], [other], [torch.zeros(1, 8, 8, dtype=torch.uint8), HEARD]], ["low"] * 3)
    assert scores[0].log_likelihood != scores[1].log_likelihood
    drawn = [pipeline.sample([[each, "grey"]], steps=2, guidance=1.0)[0].pixels for each in (HEARD, other)]
    assert not torch.equal(*drawn)
    # And a sound behind an image.
    shades = [torch.full((1, 8, 8), shade, dtype=torch.uint8) for shade in (10, 200)]
    said = [pipeline.sample_media("sound", [[each]], steps=2, guidance=1.0)[0].values for each in shades]
    assert not torch.equal(*said)


def test_an_answer_begins_it_where_it_may(
    pipeline: Pipeline, begins: Callable[[Pipeline, Size], None]
) -> None:
    begins(pipeline, LONG)
    settings: dict[str, Any] = {"max_tokens": 4, "max_images": 2, "steps": 2}
    (silent,) = pipeline.generate([["a low sound"]], **settings)
    assert all(isinstance(part, str) for part in silent)
    (answer,) = pipeline.generate([["a low sound"]], modalities=["sound"], **settings)
    heard = [part for part in answer if isinstance(part, Media)]
    assert [each.values.shape for each in heard] == [(3, 1, 16)] * 2
    events = list(pipeline.stream("a low sound", modalities=["image", "sound"], **settings))
    made = [event for event in events if isinstance(event, MediaDone)]
    assert [event.index for event in made] == [0, 1] and events[-1].images == 2  # type: ignore[union-attr]
    torch.testing.assert_close(made[0].media.values, heard[0].values)
    # Read again as what it became, as if it had stood in the prompt.
    (longer,) = pipeline.generate(
        [["a low sound", made[0].media]], modalities=["sound"], **settings | {"max_images": 1}
    )
    assert isinstance(longer[1], Media) and isinstance(longer[2], Media)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda p: p.sample_media("video", ["x"]), "has no modality 'video'; choose image or sound"),
        (lambda p: p.generate([["x"]], modalities=["video"]), "has no modality 'video'"),
        (lambda p: p.generate([["x"]], modalities=[]), "for text alone set max_images=0"),
        (lambda p: p.sample_media("sound", ["x"], size=(1, 12)), "size sound 1x12 is none"),
        (lambda p: p.sample_media("sound", ["x"], sampler="ddim"), "choose euler or heun or dpmpp_2m"),
        (
            lambda p: p.inspect([Media("sound", torch.zeros(3, 1, 12))]),
            r"finite floats of shape \[3, 1, 16\] or",
        ),
        (lambda p: p.inspect([Media("sound", torch.full((3, 1, 8), float("nan")))]), "finite floats"),
        (lambda p: p.score([[""]], [HEARD]), "a sound cannot be scored"),
        (
            lambda p: p.generate([["x"]], modalities=["sound"], steps=2000),
            r"steps 2000 must lie in \[1, 1000\]",
        ),
    ],
)
def test_what_cannot_be_is_told(pipeline: Pipeline, call: Callable[[Pipeline], object], told: str) -> None:
    with pytest.raises(UserError, match=told):
        call(pipeline)


def test_documents_of_three_modalities_are_laid_out_as_in_training(pipeline: Pipeline) -> None:
    image = torch.zeros(1, 8, 8, dtype=torch.uint8)
    found = pipeline.inspect([image, "low", HEARD])
    layout = found.layout
    assert found.texts[1] == "<BOI>" and "<sound>" in found.texts
    assert [patches for _, patches in layout.images] == [4, 2]
    first, patches = layout.images[1]
    assert (layout.end_key_S[first : first + patches] == first + patches).all()
    assert isinstance(pipeline.runner.image(SHORT), ImageSegment) and SOUND["name"] == "sound"
