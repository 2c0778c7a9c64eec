"""From a time that images may take to a sampler and its steps, by what an evaluation of the model has found."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from transfusion.errors import UserError
from transfusion.generate.pipeline import Pipeline, Prompt
from transfusion.generate.settings import ImageSettings
from transfusion.inference import image_diffusion
from transfusion.inference.image_diffusion import ImageSampling

# Where `transfusion eval MODEL --suite steps` leaves its figures, and their names.
TABLE = "metrics.json"
NAME = "distance_{}_{}_steps"
_NAME = re.compile(NAME.format(r"(\w+)", r"(\d+)"))
# Steps of the drawing that is timed.
_TIMED_STEPS = 4


class Choice(NamedTuple):
    """A sampler and its steps.

    Attributes:
        sampler: Its name.
        steps: Of it.
        distance: Of its images from those of many steps, in levels of 255.
        is_in_time: Whether it is fast enough for what was asked.
    """

    sampler: str
    steps: int
    distance: float
    is_in_time: bool = True


def read_table(folder: Path) -> list[Choice]:
    """What an evaluation has found for a model.

    Raises:
        UserError: Where the suite `steps` has not run.
    """
    try:
        values = json.loads((folder / TABLE).read_text(encoding="utf-8"))
        found = [(_NAME.fullmatch(name), value) for name, value in values.items()]
        table = [Choice(name[1], int(name[2]), float(value)) for name, value in found if name]
    except (OSError, ValueError, TypeError, AttributeError):
        table = []
    if not table:
        raise UserError(
            f"--budget goes by {folder / TABLE}, which has no figures of samplers; run `transfusion eval {folder}"
            " --suite steps` first"
        )
    return table


def read_seconds(text: str) -> float:
    """A time such as "5s", "1.5m" or "20", in seconds.

    Raises:
        UserError: For anything else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|)", text.strip())
    if found is None or not float(found[1]):
        raise UserError(f"--budget {text!r} is no time; give seconds such as 5s, or minutes such as 2m")
    return float(found[1]) * (60 if found[2] == "m" else 1)


def choose(
    table: Sequence[Choice],
    seconds: float,
    pipeline: Pipeline,
    prompts: Sequence[Prompt],
    settings: ImageSettings,
    batch: int,
) -> Choice:
    """The sampler and steps whose images are best of those that are drawn in time.

    A batch is drawn once in a few steps, to learn how long a call of the model takes here. That counts too. Where
    nothing is fast enough it is what takes the fewest calls.

    Args:
        table: What there is to choose from.
        seconds: For all images.
        pipeline: The model.
        prompts: All that will be drawn, an image of each.
        settings: Of the images, but for sampler and steps.
        batch: How many are drawn together.
    """
    begin, starts = time.monotonic(), list[float]()
    steps = min(_TIMED_STEPS, pipeline.config.diffusion.steps)
    timed: ImageSettings = {**settings, "sampler": "auto", "steps": steps}
    pipeline.sample(prompts[:batch], batch=batch, on_call=lambda *_: starts.append(time.monotonic()), **timed)
    spent = time.monotonic() - begin
    # From the second call on, since the first of a process is slower.
    count = len(starts)
    a_call = (starts[-1] - starts[1]) / (count - 2) if count > 2 else spent / count
    batches = -(-len(prompts) // batch)
    beside = max(spent - count * a_call, 0.0)
    left = (seconds - spent) / batches - beside

    def calls(choice: Choice) -> int:
        sampling = replace(ImageSampling(), sampler=choice.sampler, steps=choice.steps)
        return image_diffusion.calls(sampling, pipeline.config.diffusion)

    fast = [choice for choice in table if calls(choice) * a_call <= left]
    if fast:
        return min(fast, key=lambda choice: (choice.distance, calls(choice)))
    return min(table, key=lambda choice: (calls(choice), choice.distance))._replace(is_in_time=False)
