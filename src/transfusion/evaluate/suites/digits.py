"""The handwritten digits: does a generated digit look like the one asked for, does a caption name the right one?

I images, E pixels an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from numpy.typing import NDArray

from transfusion.config import SourceConfig
from transfusion.config.objectives import PredictionName
from transfusion.data.prepare.digits import DIGIT_WORDS, digit_in_caption
from transfusion.errors import UserError
from transfusion.evaluate.captioned_images import single_images, sources_of_the_same_name
from transfusion.evaluate.metrics.bootstrap import mean_interval
from transfusion.evaluate.metrics.metric import Metric
from transfusion.evaluate.progress_lines import ProgressLines
from transfusion.evaluate.suites.evidence import Drawing, describe, save_captions, save_drawn
from transfusion.evaluate.suites.settings import DigitsSuite
from transfusion.generate.pipeline import Pipeline
from transfusion.sequence.sizes import Size

Pixels = NDArray[np.float64]
Labels = NDArray[np.int64]

# For flow and x the only one without a second call a step.
SAMPLER: dict[PredictionName, str] = {"epsilon": "ddpm", "v": "ddpm", "flow": "euler", "x": "euler"}
# Of a digit as `transfusion prepare digits` stores it, 8 x 8 and grey.
_STORED_VALUES = 64
GENERATION_BAR, DIVERSITY_BAR, CAPTION_BAR = 0.95, 0.5, 0.90


def digits(pipeline: Pipeline, out: Path, settings: DigitsSuite) -> dict[str, Metric]:
    """Generation read by a classifier of real digits, diversity, and captions of the validation images.

    Leaves evidence under OUT/evaluation: generated/ (images, index.jsonl), validation/ (images), captions.jsonl.
    """
    train_pixels, train_labels, _ = _images(pipeline, sources_of_the_same_name(pipeline.config))
    test_pixels, test_labels, test_values = _images(pipeline, pipeline.config.data.validation)
    size = Size(*test_values.shape[2:])
    drawn = _generation(pipeline, out, settings, size, train_pixels, train_labels, test_pixels, test_labels)
    return drawn | _captions(pipeline, out, settings, test_values, test_labels)


def _generation(
    pipeline: Pipeline,
    out: Path,
    settings: DigitsSuite,
    size: Size,
    train: Pixels,
    train_labels: Labels,
    test: Pixels,
    test_labels: Labels,
) -> dict[str, Metric]:
    from sklearn.svm import SVC

    # In larger digits, or in colour, each value stands several times, and distances are as much larger.
    gamma = 0.2 * _STORED_VALUES / train.shape[1]
    classifier = SVC(gamma=gamma).fit(train, train_labels)
    prompts = [f"a handwritten {word}" for word in DIGIT_WORDS]
    drawing = Drawing.of(settings, pipeline)
    if not settings.sampler:
        drawing = drawing._replace(sampler=SAMPLER[pipeline.config.diffusion.prediction])
    samples = pipeline.sample(
        prompts,
        per_prompt=settings.count,
        guidance=drawing.guidance,
        steps=drawing.steps,
        sampler=drawing.sampler,
        seed=drawing.seed,
        batch=settings.batch,
        size=size,
        on_call=ProgressLines(f"drawing {settings.count} images of each of {len(prompts)} digits"),
    )
    save_drawn(samples, out)
    drawn = _scaled(torch.stack([sample.pixels for sample in samples]))
    wanted = np.repeat(np.arange(len(prompts)), settings.count)
    ratios = [
        _spread(drawn[wanted == digit]) / _spread(train[train_labels == digit])
        for digit in range(len(prompts))
    ]
    right = (classifier.predict(drawn) == wanted).astype(np.float64)
    classes = f"each of {len(prompts)} digits"
    return {
        "generation_accuracy": Metric(
            value=float(right.mean()),
            count=len(right),
            interval=mean_interval(right.tolist()),
            threshold=GENERATION_BAR,
            how=f"SVC(gamma={gamma:.2g}), trained on {len(train)} real images, reads {settings.count} samples of"
            f" {classes}; {drawing}",
        ),
        "classifier_accuracy_on_real": Metric(
            value=float((classifier.predict(test) == test_labels).mean()),
            how=f"the same SVC on the {len(test)} real validation images",
        ),
        "generation_diversity": Metric(
            value=float(np.mean(ratios)),
            threshold=DIVERSITY_BAR,
            how="mean distance between two generated images of a digit over that of real ones, mean over digits",
        ),
        "nearest_training_distance_generated": Metric(
            value=_nearest(drawn, train),
            how="mean distance of a generated image to the nearest training image",
        ),
        "nearest_training_distance_real": Metric(
            value=_nearest(test, train),
            how="the same of real validation images: far below it would be copying",
        ),
    }


def _captions(
    pipeline: Pipeline, out: Path, settings: DigitsSuite, values: torch.Tensor, labels: Labels
) -> dict[str, Metric]:
    captions = describe(pipeline, list(values), settings)
    how = f"greedy captions of the {len(captions)} validation images that name exactly the right digit"
    return {"caption_accuracy": share_named(captions, labels, list(values), out, how)}


def share_named(
    captions: Sequence[str], labels: Labels, images: Sequence[torch.Tensor], out: Path, how: str
) -> Metric:
    """The share of texts that name exactly the right digit. Leaves them with their images, uint8 [C, H, W]."""
    lines = [
        {"caption": caption, "expected": DIGIT_WORDS[label], "correct": digit_in_caption(caption) == label}
        for caption, label in zip(captions, labels.tolist(), strict=True)
    ]
    save_captions(lines, images, out)
    correct = [float(bool(line["correct"])) for line in lines]
    return Metric(
        value=fmean(correct),
        count=len(correct),
        interval=mean_interval(correct),
        threshold=CAPTION_BAR,
        how=how,
    )


def _images(pipeline: Pipeline, sources: list[SourceConfig]) -> tuple[Pixels, Labels, torch.Tensor]:
    """Pixels in [0, 1] [I, E], digits [I] and uint8 values [I, C, H, W] of the sources' images."""
    values, labels = [], []
    tell = ProgressLines("reading the digits of " + " and ".join(source.name for source in sources))
    for _, values_CHW, caption in tell.each(single_images(pipeline.config, sources, pipeline.tokenizer)):
        digit = digit_in_caption(caption)
        if digit is not None:
            values.append(values_CHW)
            labels.append(digit)
    if len(set(labels)) < len(DIGIT_WORDS):
        raise UserError(
            f"the digits suite needs captioned images of all ten digits, found {len(set(labels))};"
            " it is for models trained on `transfusion prepare digits`"
        )
    if len({value.shape for value in values}) > 1:
        raise UserError("the digits suite compares pixels and needs images of one size; choose another suite")
    stacked = torch.stack(values)
    return _scaled(stacked), np.array(labels), stacked


def _scaled(values_ICHW: torch.Tensor) -> Pixels:
    return values_ICHW.flatten(1).numpy().astype(np.float64) / 255.0


def _spread(pixels: Pixels) -> float:
    """Mean distance between two different images."""
    return float(torch.pdist(torch.from_numpy(pixels)).mean())


def _nearest(pixels: Pixels, train: Pixels) -> float:
    return float(torch.cdist(torch.from_numpy(pixels), torch.from_numpy(train)).amin(1).mean())
