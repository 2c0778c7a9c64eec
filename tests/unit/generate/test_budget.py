"""A time becomes a sampler and its steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from transfusion.errors import UserError
from transfusion.generate import Pipeline, budget
from transfusion.generate.budget import Choice, choose, read_seconds, read_table


@pytest.mark.parametrize(("text", "seconds"), [("5s", 5), ("5", 5), (" 1.5m ", 90), ("0.25s", 0.25)])
def test_times(text: str, seconds: float) -> None:
    assert read_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "0s", "-1s", "5h", "s", "five", "nan"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(UserError, match="is no time; give seconds such as 5s"):
        read_seconds(text)


def test_a_table_is_what_the_evaluation_left(tmp_path: Path) -> None:
    values = {"text_nats": 3.2, "distance_heun_8_steps": 4.5, "distance_dpmpp_2m_25_steps": 1.25}
    (tmp_path / "metrics.json").write_text(json.dumps(values | {"details": {}}))
    assert read_table(tmp_path) == [Choice("heun", 8, 4.5), Choice("dpmpp_2m", 25, 1.25)]
    for text in (
        json.dumps({"text_nats": 3.2}),
        "[]",
        "nothing",
        json.dumps({"distance_heun_8_steps": None}),
    ):
        (tmp_path / "metrics.json").write_text(text)
        with pytest.raises(UserError, match=r"run `transfusion eval .* --suite steps` first"):
            read_table(tmp_path)
    with pytest.raises(UserError, match="--suite steps` first"):
        read_table(tmp_path / "absent")


TABLE = [
    Choice("euler", 4, 9.0),
    Choice("euler", 25, 3.0),
    Choice("heun", 8, 2.0),
    Choice("dpmpp_2m", 12, 2.5),
]


@pytest.mark.parametrize(
    ("seconds", "prompts", "expected"),
    [
        # A call takes a second here, and a drawing two more. One of four calls is timed.
        (6 + 2 + 100, 2, Choice("heun", 8, 2.0)),
        (6 + 2 + 15, 2, Choice("heun", 8, 2.0)),
        (6 + 2 + 14, 2, Choice("dpmpp_2m", 12, 2.5)),
        (6 + 2 + 11, 2, Choice("euler", 4, 9.0)),
        (1, 2, Choice("euler", 4, 9.0, is_in_time=False)),
        # In two batches.
        (6 + 2 * (2 + 15), 3, Choice("heun", 8, 2.0)),
        (6 + 2 * (2 + 14), 4, Choice("dpmpp_2m", 12, 2.5)),
    ],
)
def test_the_best_that_is_fast_enough(
    build_pipeline: Callable[..., Pipeline],
    monkeypatch: pytest.MonkeyPatch,
    seconds: float,
    prompts: int,
    expected: Choice,
) -> None:
    """heun calls the model 15 times in 8 steps."""
    pipeline, clock = build_pipeline(diffusion={"prediction": "flow"}), [0.0]
    asked: list[Any] = []

    def sample(prompts: Any, *, batch: int, steps: int, on_call: Any, **settings: Any) -> None:
        asked.append((prompts, batch, settings))
        clock[0] += 1
        for call in range(steps):
            on_call(call, steps)
            clock[0] += 1
        clock[0] += 1

    monkeypatch.setattr(budget.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(pipeline, "sample", sample)
    wanted, settings = ["one", "two", "three", "four"][:prompts], {"guidance": 2.0, "sampler": "heun"}
    assert choose(TABLE, seconds, pipeline, wanted, settings, 2) == expected  # type: ignore[arg-type]
    assert asked == [(["one", "two"], 2, {"guidance": 2.0, "sampler": "auto"})]


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_model_of_few_steps(build_pipeline: Callable[..., Pipeline], steps: int) -> None:
    pipeline = build_pipeline(diffusion={"steps": steps, "max_timestep_before_caption": 1})
    table = [Choice("ddim", 1, 9.0), Choice("ddim", steps, 1.0)]
    assert choose(table, 100, pipeline, ["one"], {}, 8) == Choice("ddim", steps, 1.0)
