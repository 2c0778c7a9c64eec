"""How well a model sees the clean image in a noisy one, by level of noise, whatever it predicts.

I images.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from transfusion.codec import Codec, encoded
from transfusion.data.loading.validation import EvaluationLoader
from transfusion.diffusion.schedule import Schedule
from transfusion.errors import UserError
from transfusion.evaluate.metrics.bootstrap import ratio_interval
from transfusion.evaluate.metrics.metric import Metric
from transfusion.evaluate.progress_lines import ProgressLines
from transfusion.evaluate.suites.settings import DenoiseSuite
from transfusion.generate.pipeline import Pipeline
from transfusion.losses.transfusion import TransfusionLoss
from transfusion.schema import Batch
from transfusion.sequence.sizes import IMAGE


@torch.no_grad()
def denoise(pipeline: Pipeline, out: Path, settings: DenoiseSuite) -> dict[str, Metric]:
    """Error of the clean latents that the model's answers mean, for each level of noise.

    The noise of an image depends on the seed and its place in the data alone, so two models are asked the same, also
    those that predict different things. Leaves no evidence. Raises UserError for a model that draws token by token, and
    where there are no images.
    """
    config = pipeline.config
    if config.model.family == "chameleon":
        raise UserError("the suite denoise is for models that diffuse images; this one draws token by token")
    run = config.run.model_copy(update={"seed": settings.seed})
    config = config.model_copy(update={"run": run})
    codec = pipeline.runner.codec
    loss = TransfusionLoss(config.diffusion, codec, config.codec, config.modalities)
    timesteps = [timestep_at(level, loss.objectives[IMAGE].schedule) for level in settings.levels]
    metrics: dict[str, Metric] = {}
    for source in config.data.validation:
        loader = EvaluationLoader(config, [source], pipeline.tokenizer, rows=1, limit=settings.limit)
        tell = ProgressLines(f"denoising images of validation {source.name}, {len(loader)} rows")
        sums: list[list[float]] = []
        counts: list[float] = []
        for number, batch in enumerate(loader):
            tell(number, len(loader))
            if all(group.is_empty for group in batch.media if group.modality == IMAGE):
                continue
            here = _encoded(batch.to(pipeline.runner.device), codec)
            found = [loss.clean_error(pipeline.runner.model, _at(here, timestep)) for timestep in timesteps]
            sums.append([float(total) for total, _ in found])
            counts.append(float(found[0][1]))
        for place, level in enumerate(settings.levels if counts else ()):
            errors, timestep = [row[place] for row in sums], timesteps[place]
            metrics[f"{source.name}_denoise_error_at_{level:g}"] = Metric(
                value=sum(errors) / sum(counts),
                count=len(counts),
                interval=ratio_interval(errors, counts),
                higher_is_better=False,
                how=f"mean squared error of the clean latents of validation {source.name} at noise level {level:g},"
                f" timestep {timestep}, noise of seed {settings.seed}",
            )
    if not metrics:
        raise UserError("the suite denoise needs images in data.validation; choose another suite")
    return metrics


def timestep_at(level: float, schedule: Schedule) -> int:
    """The timestep whose noise, over the root of its square plus that of the signal, is nearest to the level."""
    signal_T, noise_T = schedule.signal_and_noise(torch.arange(schedule.steps))
    return int((noise_T / (signal_T.square() + noise_T.square()).sqrt() - level).abs().argmin())


def _encoded(batch: Batch, codec: Codec) -> Batch:
    """The same batch, whose images are encoded once for all levels."""
    media = tuple(
        replace(group, kind="latents", values=encoded(group, codec), value_I=None)
        if group.modality == IMAGE
        else group
        for group in batch.media
    )
    return replace(batch, media=media)


def _at(batch: Batch, timestep: int) -> Batch:
    """The same batch, with all its images at this timestep."""
    media = tuple(
        replace(group, timestep_I=torch.full_like(group.timestep_I, timestep))
        if group.modality == IMAGE
        else group
        for group in batch.media
    )
    return replace(batch, media=media)
