"""Images of several sizes: drawn as asked for, or as the model itself begins them, and read again as they are."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from transfusion.diffusion.noise import counter_normal
from transfusion.diffusion.sampler import Denoising, Question
from transfusion.errors import UserError
from transfusion.generate import Pipeline
from transfusion.inference import image_diffusion
from transfusion.inference.image_diffusion import ImageSampling
from transfusion.model.patches import unpatchify_groups
from transfusion.schema import Batch, TextSegment
from transfusion.sequence.layout import image_segment
from transfusion.sequence.sizes import Size
from transfusion.sequence.tokenizer import Tokenizer

SIZES = ("8x8", "4x12", "12x4")
WIDE = Size(4, 12)
UNET: dict[str, Any] = {"patch_embed": "unet", "unet": {"widths": [8, 16], "layers": 1, "head_dim": 8}}


def talkative(build_pipeline: Callable[..., Pipeline], *, begin: float = 4.0, **fields: Any) -> Pipeline:
    """It leans by `begin` towards images, of all sizes alike."""
    pipeline = build_pipeline(end=1.0, image_sizes=SIZES, **fields)
    pipeline.runner.model.lm_head.bias_V[list(pipeline.runner.sizes.size_by_begin_token)] = begin  # type: ignore[index,operator]
    return pipeline


@pytest.mark.parametrize("fields", [{}, {"position": "2d"}, UNET])
@torch.no_grad()
def test_an_image_is_drawn_as_it_was_trained(
    build_pipeline: Callable[..., Pipeline],
    pack: Callable[..., Batch],
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any],
) -> None:
    """Behind a caption and without one, by the training forward alone: the token before it, its shape, its places."""
    pipeline = talkative(build_pipeline, **fields)
    config, model = pipeline.config, pipeline.runner.model
    noise = counter_normal(torch.tensor([7]), (1, *WIDE.sides))

    def trained(caption: str | None) -> Tensor:
        image = image_segment(config.media_sizes, WIDE, np.zeros((1, *WIDE.sides), np.uint8))
        texts = [TextSegment(tuple(pipeline.tokenizer.encode(caption)))] if caption else []
        batch = pack(config, [[[*texts, image]]], timesteps=[500])
        encoding = model.encode_patches([noise], torch.tensor([500]))
        hidden_BSD = model.run_blocks(model.embed(batch, encoding.patch_ND), batch.position_BSA, batch.mask)
        state_PD = model.norm(hidden_BSD[0])[batch.media[0].patch_slot_IP[0]]
        return unpatchify_groups(model.decode_patches(state_PD, encoding), [noise])[0]

    caption = "a handwritten three"
    wanted = trained(None) + 3 * (trained(caption) - trained(None))
    found: list[Tensor] = []

    def once(start: Tensor, _: Tensor) -> Denoising:
        found.append((yield Question(start, 500.0, None)))
        return start

    monkeypatch.setattr(image_diffusion, "build_sampler", lambda *_, **__: SimpleNamespace(denoise=once))
    pipeline.sample([caption], guidance=3.0, seed=7, size=WIDE)
    torch.testing.assert_close(found[0], wanted, rtol=1e-4, atol=1e-3)


def test_the_size_that_is_asked_for(build_pipeline: Callable[..., Pipeline]) -> None:
    pipeline = talkative(build_pipeline, begin=100.0)
    for text in SIZES:
        size = Size.parse(text)
        (sample,) = pipeline.sample(["seven"], steps=2, size=size)
        assert sample.pixels.shape == (1, *size.sides)
        answer = pipeline.generate([["seven"]], max_tokens=6, max_images=2, steps=2, size=size)[0]
        drawn = [part.shape for part in answer if isinstance(part, Tensor)]
        assert drawn == [(1, *size.sides)] * 2
    assert pipeline.sample(["seven"], steps=2)[0].pixels.shape == (1, 8, 8)
    with pytest.raises(
        UserError, match="size 8x16 is none of this model's images; choose 8x8 or 4x12 or 12x4"
    ):
        pipeline.sample(["seven"], size=Size(8, 16))


def test_the_model_chooses_sizes_and_a_batch_of_them_is_answered_as_each_alone(
    build_pipeline: Callable[..., Pipeline],
) -> None:
    pipeline = talkative(build_pipeline, position="2d")
    random = np.random.default_rng(0)
    one, two, three = (
        torch.from_numpy(random.integers(0, 256, (1, *Size.parse(text).sides), dtype=np.uint8))
        for text in SIZES
    )
    prompts: list[list[str | Tensor]] = [
        ["three"],
        [two, "and", one],
        ["a"],
        [three],
        ["one", three, two],
        ["two"],
    ]
    settings: dict[str, Any] = {"max_tokens": 4, "max_images": 2, "steps": 2, "temperature": 1.0}
    together = pipeline.generate(prompts, seed=40, **settings)
    shapes = set()
    for number, prompt in enumerate(prompts):
        alone = pipeline.generate([prompt], seed=40 + number, **settings)[0]
        assert len(alone) == len(together[number])
        for mine, theirs in zip(together[number], alone, strict=True):
            if isinstance(mine, str) or isinstance(theirs, str):
                assert mine == theirs
            else:
                assert mine.shape == theirs.shape and (mine.int() - theirs.int()).abs().max() <= 1
    # Which seeds choose which sizes differs by the version of torch, which draws the weights.
    for seed in range(40, 50):
        answers = pipeline.generate(prompts, seed=seed, **settings)
        for prompt, answer in zip(prompts, answers, strict=True):
            shapes |= {tuple(part.shape[1:]) for part in answer[len(prompt) :] if isinstance(part, Tensor)}
        if len(shapes) == 3:
            break
    assert len(shapes) == 3, "want all sizes"


def test_an_image_too_large_for_the_rest_of_the_row_is_not_begun(
    build_pipeline: Callable[..., Pipeline], tokenizer: Tokenizer
) -> None:
    """A smaller one is: 12 patches where 16 would not fit."""
    prompt = "three kittens washed their hands"
    length = 1 + len(tokenizer.encode(prompt))
    pipeline = talkative(build_pipeline, begin=100.0, sequence_length=length + 14)
    answer = pipeline.generate([[prompt]], max_tokens=2, max_images=1, steps=2)[0]
    drawn = [tuple(part.shape[1:]) for part in answer if isinstance(part, Tensor)]
    assert drawn in ([(4, 12)], [(12, 4)])


def test_settings_for_a_grid_of_sizes(build_pipeline: Callable[..., Pipeline]) -> None:
    pipeline = talkative(build_pipeline)
    grid = pipeline.config.sample_grid.model_copy(
        update={"prompts": ["one", "two"], "sizes": ("4x12", "8x8"), "steps": 2, "guidance": 1.0}
    )
    drawn = pipeline.sample_grid(grid)
    assert [tuple(sample.pixels.shape[1:]) for sample in drawn] == [(4, 12)] * 2 + [(8, 8)] * 2
    assert [sample.seed for sample in drawn] == [0, 1, 2, 3]
    assert ImageSampling().size is None
