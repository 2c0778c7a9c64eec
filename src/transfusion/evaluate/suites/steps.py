"""How far images of few steps are from those of many: what `sample --budget` chooses by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from transfusion.config.objectives import SAMPLERS
from transfusion.errors import UserError
from transfusion.evaluate.captioned_images import some_captioned_images
from transfusion.evaluate.metrics.metric import Metric
from transfusion.evaluate.progress_lines import ProgressLines
from transfusion.evaluate.suites.evidence import Drawing
from transfusion.evaluate.suites.settings import StepsSuite
from transfusion.generate.budget import NAME
from transfusion.generate.pipeline import Pipeline

# What adds noise on the way leads elsewhere.
RANDOM = ("ddpm",)


def steps(pipeline: Pipeline, out: Path, settings: StepsSuite) -> dict[str, Metric]:
    """Root mean square distance of images by each sampler and number of steps from those of many steps, same seeds.

    All samplers without noise of their own follow one path, and more steps keep closer to it. Leaves no evidence.
    Raises UserError for a model that draws token by token, and where there are no captions.
    """
    config = pipeline.config
    if config.model.family == "chameleon":
        raise UserError("the suite steps is for models that diffuse images; this one draws token by token")
    _, captions, _ = some_captioned_images(pipeline, settings.count)
    drawing = Drawing.of(settings, pipeline)

    def drawn(sampler: str, count: int) -> torch.Tensor:
        tell = ProgressLines(f"drawing {len(captions)} images by {sampler} in {count} steps")
        how: dict[str, Any] = drawing._replace(sampler=sampler, steps=count)._asdict()
        images = pipeline.sample(captions, batch=settings.batch, on_call=tell, **how)
        return torch.stack([image.pixels for image in images]).float()

    many = drawing.steps
    goal = drawn(drawing.sampler, many)
    metrics = {}
    for sampler in SAMPLERS[config.diffusion.prediction]:
        for count in settings.tried:
            if sampler not in RANDOM and count < many:
                metrics[NAME.format(sampler, count)] = Metric(
                    value=(drawn(sampler, count) - goal).square().mean().sqrt().item(),
                    unit="of 255",
                    higher_is_better=False,
                    how=f"root mean square distance of {len(captions)} images of validation captions by {sampler} in"
                    f" {count} steps from those by {drawing}",
                )
    return metrics
