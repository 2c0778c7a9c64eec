"""Guidance: away from a negative prompt, in an interval of the noise, with its deviation brought back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from transfusion.diffusion.noise import counter_normal
from transfusion.diffusion.sampler import rescale, sample
from transfusion.errors import UserError
from transfusion.generate import ImageSampling, Pipeline, Request
from transfusion.inference import image_diffusion
from transfusion.inference.image_diffusion import build_sampler
from transfusion.schema import Batch, ImageSegment, TextSegment

from .conftest import Truth

Build = Callable[..., Pipeline]


def drawn_by_hand(
    pipeline: Pipeline, pack: Callable[..., Batch], predict: Callable[[Callable[..., Tensor], int], Tensor]
) -> Tensor:
    """Pixels of an image of "one", seed 7, by three steps of ddim. predict: from the plain forward and the timestep."""
    truth, tokenizer = Truth(pipeline, pack), pipeline.tokenizer
    key_I = torch.tensor([7])

    def network(latent: Tensor, timestep: float) -> Tensor:
        def plain(text: str | None) -> Tensor:
            ids = tuple(tokenizer.encode(text)) if text else ()
            before = [TextSegment(ids)] if ids else []
            segments = [*before, ImageSegment(None, 16)]
            return truth.noise(segments, [latent[0]], [int(timestep)], 2 + len(ids))

        return predict(plain, int(timestep))

    plan = build_sampler(
        ImageSampling(steps=3, sampler="ddim"), pipeline.config.diffusion, clip=pipeline.runner.codec.bound
    )
    with torch.no_grad():
        latent = sample(plan, counter_normal(key_I, (1, 8, 8)), network, key_I)
    return pipeline.runner.codec.decode(latent)[0]


def assert_same_image(mine: Tensor, theirs: Tensor) -> None:
    assert (mine.int() - theirs.int()).abs().max() <= 1


def test_guidance_leads_away_from_a_negative_prompt(
    build_pipeline: Build, pack: Callable[..., Batch]
) -> None:
    pipeline = build_pipeline()
    expected = drawn_by_hand(
        pipeline, pack, lambda plain, _: plain("two three") + 3 * (plain("one") - plain("two three"))
    )
    settings: Any = {"steps": 3, "guidance": 3.0, "seed": 7}
    image = pipeline.sample(["one"], negative_prompt="two three", **settings)[0]
    assert_same_image(image.pixels, expected)
    assert not torch.equal(image.pixels, pipeline.sample(["one"], **settings)[0].pixels)


def test_guidance_keeps_to_its_interval(
    build_pipeline: Build, pack: Callable[..., Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outside of it the model is not asked for the other branch."""
    pipeline = build_pipeline()
    predict, rows = image_diffusion.predict, []

    def counted(
        runner: Any, view: Any, latent: Tensor, timestep: Tensor, size: Any, copies: Any = ()
    ) -> Tensor:
        rows.append((timestep[0].item(), len(view.lengths)))
        return predict(runner, view, latent, timestep, size, copies)

    monkeypatch.setattr(image_diffusion, "predict", counted)
    image = pipeline.sample(["one"], steps=3, guidance=3.0, seed=7, guidance_interval=(0.5, 0.9))[0]
    assert rows == [(999, 1), (666, 2), (332, 1)]

    def by_hand(plain: Callable[..., Tensor], timestep: int) -> Tensor:
        return plain("one") if timestep != 666 else plain(None) + 3 * (plain("one") - plain(None))

    assert_same_image(image.pixels, drawn_by_hand(pipeline, pack, by_hand))


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_guidance_takes_back_the_deviation(
    build_pipeline: Build, pack: Callable[..., Batch], share: float
) -> None:
    pipeline = build_pipeline()

    def by_hand(plain: Callable[..., Tensor], _: int) -> Tensor:
        conditional, other = plain("one"), plain(None)
        guided = other + 3 * (conditional - other)
        return (1 - share) * guided + share * guided * conditional.std() / guided.std()

    image = pipeline.sample(["one"], steps=3, guidance=3.0, seed=7, guidance_rescale=share)[0]
    assert_same_image(image.pixels, drawn_by_hand(pipeline, pack, by_hand))


def test_rescaling_gives_each_image_its_own_deviation() -> None:
    conditional, guided = (
        torch.randn(2, 3, 8, 8),
        torch.randn(2, 3, 8, 8) * torch.tensor([2.0, 9.0]).view(2, 1, 1, 1),
    )
    rescaled = rescale(guided, conditional, 1.0)
    torch.testing.assert_close(rescaled.std((1, 2, 3)), conditional.std((1, 2, 3)))
    assert torch.equal(rescale(guided, conditional, 0.0), guided)


def test_images_with_their_own_guidance_share_a_batch(build_pipeline: Build) -> None:
    pipeline = build_pipeline()
    settings: list[dict[str, Any]] = [
        {"guidance": 1.0},
        {"guidance": 2.0, "negative_prompt": "two three seven"},
        {"guidance": 3.0, "guidance_interval": (0.3, 0.7)},
        {"guidance": 4.0, "guidance_rescale": 0.7},
    ]
    alone = [pipeline.sample(["one"], steps=4, **each)[0].pixels for each in settings]
    size = pipeline.runner.sizes.first
    engine = pipeline.engine()
    for each in settings:
        engine.submit(Request(prompt=["one"], image=ImageSampling(steps=4, size=size, **each), draws=True))
    together = {}
    while not engine.is_idle:
        together |= {number: event for number, event in engine.tick() if hasattr(event, "pixels")}
    for number, image in enumerate(alone):
        assert_same_image(together[number].pixels, image)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"guidance": 1.0, "negative_prompt": "two"},
            "negative_prompt shapes guidance, and guidance 1 is none",
        ),
        ({"guidance": 1.0, "guidance_interval": (0, 0.5)}, "guidance_interval shapes guidance"),
        ({"guidance": 1.0, "guidance_rescale": 0.5}, "guidance_rescale shapes guidance"),
        ({"guidance_interval": (0.5, 0.5)}, "guidance_interval 0.5 to 0.5 must rise within"),
        ({"guidance_interval": (float("nan"), 1)}, "guidance_interval nan to 1"),
        ({"guidance_interval": (1,)}, "guidance_interval must be two shares"),
        ({"guidance_rescale": 1.5}, "guidance_rescale 1.5 must lie in"),
        ({"negative_prompt": "\ud800"}, "is not Unicode text"),
        ({"negative_prompt": "two " * 300}, "a negative prompt and its image take .* positions"),
    ],
)
def test_what_guidance_cannot_do_is_refused(build_pipeline: Build, settings: Any, message: str) -> None:
    pipeline = build_pipeline()
    with pytest.raises(UserError, match=message):
        pipeline.sample(["one"], **settings)
    with pytest.raises(UserError, match=message):
        pipeline.generate(["one"], **settings)
