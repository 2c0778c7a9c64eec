"""Generation with the cache equals reading the whole document again at every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from transfusion.codec import pixels as codec
from transfusion.generate import ImageSampling, Pipeline
from transfusion.schema import ImageSegment, TextSegment
from transfusion.sequence.layout import lay_out

from .conftest import draw_latents, read_prompts

DRAWING = {"guidance": 3.0, "steps": 4, "sampler": "ddpm"}


def split(answer: list[str | Tensor], prompt_parts: int) -> tuple[str, list[Tensor]]:
    new = answer[prompt_parts:]
    return "".join(p for p in new if isinstance(p, str)), [p for p in new if isinstance(p, Tensor)]


def assert_same_images(mine: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        # One level of 255: rounding to whole levels of latents that agree to 1e-4.
        assert (a.int() - b.int()).abs().max() <= 1


@pytest.mark.parametrize("prompt", [[""], ["a handwritten three"]])
@pytest.mark.parametrize("fields", [{}, {"position": "2d"}, {"qk_norm": True, "num_kv_heads": 4}])
def test_text_alone(
    build_pipeline: Callable[..., Pipeline], truth: Any, prompt: list[str], fields: dict[str, Any]
) -> None:
    """A1: ids of a text from nothing. A2: and from a prompt, both exactly."""
    pipeline = build_pipeline(**fields)
    ids, _ = truth(pipeline).generate(prompt, max_tokens=16, max_images=0)
    answer = pipeline.generate([prompt], max_tokens=16, max_images=0)[0]
    assert answer[:1] == prompt
    assert "".join(answer[1:]) == pipeline.tokenizer.decode(ids)
    assert len(answer[1]) == len(ids) == 16 and len(set(ids)) > 2


@pytest.mark.parametrize(
    ("guidance", "fields"),
    [
        *((guidance, {"position": position}) for guidance in (1.0, 3.0) for position in ("1d", "2d")),
        (3.0, {"image_attention": "causal"}),
    ],
)
def test_interleaved(
    build_pipeline: Callable[..., Pipeline],
    truth: Any,
    make_image: Any,
    guidance: float,
    fields: dict[str, Any],
) -> None:
    """A3: text, image, text, image, text, then generation of both: ids exact, images the same."""
    pipeline = build_pipeline(image=10.0, **fields)
    images = [torch.from_numpy(make_image(seed)) for seed in (1, 2)]
    prompt = ["one", images[0], "two", images[1], "three"]
    drawing = {**DRAWING, "guidance": guidance}
    ids, expected = truth(pipeline).generate(prompt, max_tokens=8, max_images=2, seed=5, **drawing)
    answer = pipeline.generate([prompt], max_tokens=8, max_images=2, seed=5, **drawing)[0]
    text, drawn = split(answer, 5)
    assert len(drawn) == 2
    assert text == pipeline.tokenizer.decode(ids)
    assert_same_images(drawn, expected)
    assert answer[1] is images[0] and answer[3] is images[1]


UNET = {"patch_embed": "unet", "unet": {"widths": [8, 16], "layers": 1, "head_dim": 8}}


VELOCITY, FLOW, CLEAN = ({"diffusion": {"prediction": prediction}} for prediction in ("v", "flow", "x"))


@pytest.mark.parametrize(
    ("sampler", "fields"),
    [
        *(("ddpm", {}), ("ddim", {}), ("ddim", UNET), ("ddpm", VELOCITY), ("euler", FLOW), ("heun", FLOW)),
        ("heun", CLEAN),
        *(("ddim", {"patch_position": kind}) for kind in ("none", "learned")),
        *(("ddim", {"modality_weights": weights, "qk_norm": True}) for weights in ("ffn", "all")),
    ],
    ids=[
        "ddpm",
        "ddim",
        "unet",
        "v",
        "euler",
        "heun",
        "x",
        "no places",
        "learned places",
        "own feed-forward",
        "own weights",
    ],
)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@torch.no_grad()
def test_latents_behind_a_mixed_prompt(
    build_pipeline: Callable[..., Pipeline],
    truth: Any,
    make_image: Any,
    sampler: Any,
    fields: dict[str, Any],
    guidance: float,
) -> None:
    """A3: latents to 1e-4."""
    pipeline = build_pipeline(**fields)
    given = torch.from_numpy(make_image(6))
    segments = [TextSegment((9, 10)), ImageSegment(None, 16), TextSegment((11, 12, 13))]
    layout = lay_out([*segments, ImageSegment(None, 16)])
    count = layout.images[1][0]
    sampling = ImageSampling(guidance=guidance, steps=4, sampler=sampler)
    cache, rows = read_prompts(pipeline, [(layout, count, [given])])
    (latent,) = draw_latents(pipeline, cache, rows, [21], sampling)
    settings = {"guidance": guidance, "steps": 4, "sampler": sampler}
    expected = truth(pipeline).draw(segments, [codec.encode(given)], 21, **settings)
    torch.testing.assert_close(latent, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.0])
def test_captioned_images(
    build_pipeline: Callable[..., Pipeline], truth: Any, sampler: str, guidance: float
) -> None:
    pipeline = build_pipeline()
    drawing = {"guidance": guidance, "steps": 6, "sampler": sampler}
    prompts = ["a handwritten three", "seven"]
    drawn = pipeline.sample(prompts, seed=3, **drawing)
    for number, image in enumerate(drawn):
        segment = TextSegment(tuple(pipeline.tokenizer.encode(prompts[number])))
        expected = truth(pipeline).draw([segment], [], 3 + number, **drawing)
        assert (image.prompt, image.seed) == (prompts[number], 3 + number)
        assert_same_images([image.pixels], [codec.decode(expected)])
