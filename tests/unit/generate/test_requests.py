"""What a pipeline answers to a request that cannot be carried out: one line that names the argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from transfusion.errors import UserError
from transfusion.generate import Pipeline
from transfusion.tokens import MAX_SAMPLING_SEED

SAMPLE = [
    ({"batch": 0}, "batch 0 must be at least 1"),
    ({"batch": -3}, "batch -3 must be at least 1"),
    ({"per_prompt": 0}, "per_prompt 0 must be at least 1"),
    ({"steps": 0}, "steps 0 must lie in"),
    ({"seed": -1}, "seed -1 must lie in"),
    ({"seed": MAX_SAMPLING_SEED + 1}, "must lie in"),
    ({"seed": MAX_SAMPLING_SEED, "per_prompt": 2}, f"seeds {MAX_SAMPLING_SEED} to {MAX_SAMPLING_SEED + 1}"),
    ({"size": (3, 5)}, "size 3x5 is none of this model's images"),
    ({"size": (8,)}, "size must be height and width"),
    ({"guidance": float("nan")}, "guidance nan"),
    ({"guidance_interval": 0.5}, "guidance_interval must be two shares of the timesteps, got 0.5"),
]
EDIT = [
    ({"batch": 0}, "batch 0 must be at least 1"),
    ({"seed": -1}, "seed -1 must lie in"),
    ({"size": 8}, "size must be height and width, got 8"),
    ({"size": [3, 5]}, "size 3x5 is none of this model's images"),
]
GENERATE = [
    ({"batch": 0}, "batch 0 must be at least 1"),
    ({"max_tokens": 0}, "max_tokens 0 must be at least 1"),
    ({"max_images": -1}, "max_images -1 must be at least 0"),
    ({"temperature": -1.0}, "temperature -1.0"),
    ({"top_p": 0.0}, "top_p 0.0"),
    ({"seed": MAX_SAMPLING_SEED}, f"seeds {MAX_SAMPLING_SEED} to"),
    ({"max_images": 0, "size": (3, 5)}, "size 3x5 is none of this model's images"),
]


@pytest.mark.parametrize(("arguments", "message"), SAMPLE)
def test_sample(build_pipeline: Callable[..., Pipeline], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_pipeline().sample(["three"], **arguments)


@pytest.mark.parametrize(("arguments", "message"), EDIT)
def test_edit(
    build_pipeline: Callable[..., Pipeline], make_image: Any, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        build_pipeline().edit([torch.from_numpy(make_image(1))], ["three"], **arguments)


@pytest.mark.parametrize(("arguments", "message"), GENERATE)
def test_generate(build_pipeline: Callable[..., Pipeline], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_pipeline().generate([["three"], ["two"]], **arguments)


def test_a_size_may_be_a_plain_pair(build_pipeline: Callable[..., Pipeline]) -> None:
    pipeline = build_pipeline()
    size = pipeline.runner.sizes.first
    pair, named = (pipeline.sample(["three"], steps=2, size=s)[0].pixels for s in (size.sides, size))
    assert torch.equal(pair, named)
    assert pair.shape[1:] == size.sides


def test_no_prompts_give_no_answers(build_pipeline: Callable[..., Pipeline]) -> None:
    pipeline = build_pipeline()
    assert pipeline.sample([]) == []
    assert pipeline.generate([]) == []
