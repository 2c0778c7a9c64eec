"""What a row becomes depends on its prompt, seed and number, not on its neighbours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from transfusion.codec import pixels as codec
from transfusion.config import SampleGridConfig
from transfusion.generate import Pipeline
from transfusion.inference.cache import PAGE_SLOTS


def assert_same_answers(mine: list[str | Tensor], theirs: list[str | Tensor]) -> None:
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        if isinstance(a, str) or isinstance(b, str):
            assert a == b
        else:
            assert (a.int() - b.int()).abs().max() <= 1


def test_prompted_images_come_back_untouched(
    build_pipeline: Callable[..., Pipeline], make_image: Any
) -> None:
    """A5: the images of ragged prompts are the ones that are returned."""
    pipeline = build_pipeline(image=1.0, end=1.0)
    prompts = [
        [torch.from_numpy(make_image(3))],
        ["text", torch.from_numpy(make_image(4)), torch.from_numpy(make_image(5)), "more"],
    ]
    copies = [[part.clone() if isinstance(part, Tensor) else part for part in prompt] for prompt in prompts]
    answers = pipeline.generate(prompts, max_tokens=4, max_images=1, steps=2)
    for prompt, copy, answer in zip(prompts, copies, answers, strict=True):
        for before, original, after in zip(copy, prompt, answer, strict=False):
            assert after is original
            assert torch.equal(before, after) if isinstance(before, Tensor) else before == after


def test_every_row_stops_on_its_own(build_pipeline: Callable[..., Pipeline], make_image: Any) -> None:
    """N13: a row ends when its own text does, not its batch's."""
    pipeline = build_pipeline(end=4.0)
    images = torch.stack([torch.from_numpy(make_image(seed)) for seed in range(12)])
    captions = pipeline.caption(images, max_tokens=20, temperature=1.0, seed=7)
    lengths = {len(caption) for caption in captions}
    assert len(lengths) > 3 and min(lengths) < 20
    for number in (0, 5, 11):
        alone = pipeline.caption(images[number : number + 1], max_tokens=20, temperature=1.0, seed=7 + number)
        assert alone == [captions[number]]


def test_rows_that_have_ended_cost_nothing(build_pipeline: Callable[..., Pipeline], make_image: Any) -> None:
    pipeline = build_pipeline(end=2.0)
    seen: list[int] = []
    run_blocks = pipeline.runner.model.run_blocks

    def counting(hidden_BSD: Tensor, *rest: Any) -> Tensor:
        seen.append(hidden_BSD.shape[0] * hidden_BSD.shape[1])
        return run_blocks(hidden_BSD, *rest)

    pipeline.runner.model.run_blocks = counting  # type: ignore[method-assign]
    images = torch.stack([torch.from_numpy(make_image(seed)) for seed in range(12)])
    captions = pipeline.caption(images, max_tokens=20, temperature=1.0, seed=7)
    # The tokens of a caption are read once each, the last of a full one not at all.
    assert sum(seen[1:]) == sum(min(len(caption), 19) for caption in captions)


# The second begins with more positions of the first than a page of the cache has.
LIKE = ["one two three seven one two three", "one two three seven one two seven", "nine"]


@pytest.mark.parametrize("prompts", [["one", "two two"], LIKE])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_ranks_share_the_grid_with_equal_forwards(
    build_pipeline: Callable[..., Pipeline], ranks: int, prompts: list[str]
) -> None:
    pipeline = build_pipeline()
    grid = SampleGridConfig(prompts=prompts, per_prompt=2, steps=3, seed=4)
    calls: list[int] = []
    run_blocks = pipeline.runner.model.run_blocks

    def counting(*inputs: Any) -> Tensor:
        calls[-1] += 1
        return run_blocks(*inputs)

    pipeline.runner.model.run_blocks = counting  # type: ignore[method-assign]
    shares = []
    for rank in range(ranks):
        calls.append(0)
        shares.append(pipeline.sample_grid(grid, rank=rank, ranks=ranks))
    assert len(set(calls)) == 1
    whole = pipeline.sample(grid.prompts, per_prompt=2, steps=3, sampler="ddim", seed=4)
    joined = sorted((image for share in shares for image in share), key=lambda image: image.seed)
    assert [(image.prompt, image.seed) for image in joined] == [(image.prompt, image.seed) for image in whole]
    assert_same_answers([image.pixels for image in joined], [image.pixels for image in whole])


def test_images_come_in_order_whatever_their_prompts_share(build_pipeline: Callable[..., Pipeline]) -> None:
    pipeline = build_pipeline()
    first, second = (pipeline.tokenizer.encode(prompt) for prompt in LIKE[:2])
    assert first[:PAGE_SLOTS] == second[:PAGE_SLOTS]
    told: list[tuple[int, int]] = []
    seeds: list[list[int]] = []
    pipeline.sample(
        [LIKE[0], LIKE[2], LIKE[1]],
        steps=3,
        batch=3,
        on_call=lambda done, calls: told.append((done, calls)),
        on_images=lambda images: seeds.append([image.seed for image in images]),
    )
    assert told == [(0, 3), (1, 3), (2, 3)] and seeds == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("diffusion", "named", "meant"),
    [
        ({"prediction": "v"}, "auto", "ddim"),
        ({"prediction": "flow"}, "auto", "euler"),
        ({"prediction": "flow"}, "heun", "heun"),
        ({"prediction": "x"}, "auto", "euler"),
        ({"prediction": "flow", "timestep_shift": 4.0}, "auto", "euler"),
    ],
)
def test_the_grid_is_drawn_for_the_objective(
    build_pipeline: Callable[..., Pipeline], diffusion: Any, named: Any, meant: Any
) -> None:
    pipeline = build_pipeline(diffusion=diffusion)
    (drawn,) = pipeline.sample_grid(SampleGridConfig(prompts=["one"], steps=3, seed=4, sampler=named))
    (expected,) = pipeline.sample(["one"], steps=3, seed=4, sampler=meant)
    assert torch.equal(drawn.pixels, expected.pixels)
    plain = build_pipeline(diffusion={"prediction": diffusion["prediction"]})
    (unlike,) = plain.sample(["one"], steps=3, seed=4, sampler="ddpm" if meant == "ddim" else "euler")
    same_settings = diffusion in ({"prediction": "flow"}, {"prediction": "x"}) and meant == "euler"
    assert torch.equal(drawn.pixels, unlike.pixels) == same_settings


def test_a_drawn_image_is_read_as_the_image_that_is_returned(
    build_pipeline: Callable[..., Pipeline],
) -> None:
    """What is said after a drawn image is what would be said had the user given that image.

    The image comes first: letters that were said one by one may be read again as one token.
    """
    pipeline = build_pipeline(image=100.0)
    answer = pipeline.generate([["three"]], max_tokens=8, max_images=1, steps=4)[0]
    place = next(i for i, part in enumerate(answer) if isinstance(part, Tensor))
    before, after = answer[: place + 1], "".join(answer[place + 1 :])
    assert place == 1
    given = pipeline.generate([before], max_tokens=8, max_images=0)[0]
    assert len(after) > 3 and "".join(given[place + 1 :]) == after
    assert codec.decode(codec.encode(answer[place])).equal(answer[place])
