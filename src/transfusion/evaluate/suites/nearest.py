"""Whether a model copies: how near its images are to the nearest training image, beside real images of validation.

N images, M others, E values an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from transfusion.errors import UserError
from transfusion.evaluate.captioned_images import captioned_images, evenly, training_images
from transfusion.evaluate.metrics.bootstrap import mean_interval
from transfusion.evaluate.metrics.metric import Metric
from transfusion.evaluate.suites.evidence import Drawing, draw
from transfusion.evaluate.suites.settings import NearestSuite
from transfusion.generate.image_files import write_rows
from transfusion.generate.pipeline import Pipeline

EVIDENCE = "nearest.png"
# Other images that are compared at once.
_BLOCK = 512
_ACROSS = 16


def nearest(pipeline: Pipeline, out: Path, settings: NearestSuite) -> dict[str, Metric]:
    """Distances of drawn images, and of as many validation images, to the nearest training image of their size.

    Stored latents are compared as the codec decodes them. Leaves OUT/evaluation/nearest.png: drawn images, under each
    its nearest training image. Raises UserError where captioned images are missing.
    """
    training = training_images(pipeline)
    validation, captions = captioned_images(pipeline.config, pipeline.tokenizer, validation=True)
    places = evenly(len(validation), settings.count)
    real = [validation[place] for place in places]
    drawing = Drawing.of(settings, pipeline)
    samples = draw(pipeline, [captions[place] for place in places], real, drawing, settings.batch)
    drawn = [sample.pixels for sample in samples]
    found = nearest_of(drawn, training)
    copies = [training[place] for place, _ in found]
    starts = range(0, len(drawn), _ACROSS)
    rows = [row[start : start + _ACROSS] for start in starts for row in (drawn, copies)]
    write_rows(rows, out / "evaluation" / EVIDENCE)
    how = f"mean Euclidean distance, over pixels in [0, 1], of {{}} to the nearest of {len(training)} training images"
    return {
        "distance_to_nearest_training_image": Metric(
            **_mean([distance for _, distance in found]),
            how=how.format(f"{len(drawn)} images of validation captions ({drawing})"),
        ),
        "distance_to_nearest_training_image_of_validation": Metric(
            **_mean([distance for _, distance in nearest_of(real, training)]),
            how=how.format(f"the {len(real)} real images of these captions")
            + "; far below it would be copying",
        ),
    }


def nearest_of(images: Sequence[Tensor], others: Sequence[Tensor]) -> list[tuple[int, float]]:
    """For each uint8 image [C, H, W] the number of the nearest other of its size, and the distance.

    Raises UserError for an image of a size that no other has.
    """
    found = []
    numbers: dict[torch.Size, list[int]] = {}
    for number, other in enumerate(others):
        numbers.setdefault(other.shape, []).append(number)
    for image in images:
        same = numbers.get(image.shape)
        if same is None:
            size = " x ".join(map(str, image.shape))
            raise UserError(f"no training image is {size} as those of validation; choose another suite")
        best = (-1, float("inf"))
        for start in range(0, len(same), _BLOCK):
            block = same[start : start + _BLOCK]
            rest_ME = _scaled([others[number] for number in block]) - _scaled([image])
            distance_M = rest_ME.square().sum(1).sqrt()
            place = int(distance_M.argmin())
            best = min(best, (block[place], float(distance_M[place])), key=lambda pair: pair[1])
        found.append(best)
    return found


def _mean(distances: Sequence[float]) -> dict[str, Any]:
    return {"value": fmean(distances), "count": len(distances), "interval": mean_interval(distances)}


def _scaled(images: Sequence[Tensor]) -> Tensor:
    """[N, E], values from 0 to 1."""
    return torch.stack([image.flatten() for image in images]).float() / 255.0
