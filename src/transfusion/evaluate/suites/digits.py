"""The handwritten digits: does a generated digit look like the one asked for, does a caption name the right one?

I images, E pixels an image.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from transfusion.config import SourceConfig
from transfusion.config.objectives import SAMPLERS
from transfusion.data.prepare.digits import DIGIT_WORDS, digit_in_caption
from transfusion.errors import UserError
from transfusion.evaluate.metrics.classifier import single_images
from transfusion.evaluate.metrics.metric import Metric
from transfusion.generate.image_files import save_samples, to_image
from transfusion.generate.pipeline import Pipeline

Pixels = NDArray[np.float64]
Labels = NDArray[np.int64]

SAMPLES = 20
GUIDANCE = 3.0
SAMPLER_STEPS = 50
GENERATION_BAR, DIVERSITY_BAR, CAPTION_BAR = 0.95, 0.5, 0.90
MAX_CAPTION_TOKENS = 32


def digits(pipeline: Pipeline, out: Path) -> dict[str, Metric]:
    """Generation read by a classifier of real digits, diversity, and captions of the validation images.

    Leaves evidence under OUT/evaluation: generated/ (images, index.jsonl), validation/ (images), captions.jsonl.
    """
    train_pixels, train_labels, _ = _images(pipeline, pipeline.config.data.sources)
    test_pixels, test_labels, test_values = _images(pipeline, pipeline.config.data.validation)
    folder = out / "evaluation"
    return _generation(
        pipeline, folder / "generated", train_pixels, train_labels, test_pixels, test_labels
    ) | _captions(pipeline, folder, test_values, test_labels)


def _generation(
    pipeline: Pipeline, folder: Path, train: Pixels, train_labels: Labels, test: Pixels, test_labels: Labels
) -> dict[str, Metric]:
    from sklearn.svm import SVC

    classifier = SVC(gamma=0.2).fit(train, train_labels)
    prompts = [f"a handwritten {word}" for word in DIGIT_WORDS]
    samples = pipeline.sample(
        prompts,
        per_prompt=SAMPLES,
        guidance=GUIDANCE,
        steps=SAMPLER_STEPS,
        seed=0,
        batch=SAMPLES * 10,
    )
    save_samples(samples, folder)
    drawn = _scaled(torch.stack([sample.pixels for sample in samples]))
    wanted = np.repeat(np.arange(len(prompts)), SAMPLES)
    sampler = SAMPLERS[pipeline.config.diffusion.prediction][0].upper()
    settings = f"{sampler} {SAMPLER_STEPS} steps, guidance {GUIDANCE:g}, seeds from 0"
    ratios = [
        _spread(drawn[wanted == digit]) / _spread(train[train_labels == digit])
        for digit in range(len(prompts))
    ]
    classes = f"each of {len(prompts)} digits"
    return {
        "generation_accuracy": Metric(
            value=float((classifier.predict(drawn) == wanted).mean()),
            threshold=GENERATION_BAR,
            how=f"SVC(gamma=0.2), trained on {len(train)} real images, reads {SAMPLES} samples of {classes}; "
            f"{settings}",
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


def _captions(pipeline: Pipeline, folder: Path, values: torch.Tensor, labels: Labels) -> dict[str, Metric]:
    captions = pipeline.caption(values, max_tokens=MAX_CAPTION_TOKENS)
    images = folder / "validation"
    images.mkdir(parents=True, exist_ok=True)
    lines, correct = [], 0
    for number, (caption, label) in enumerate(zip(captions, labels.tolist(), strict=True)):
        right = digit_in_caption(caption) == label
        correct += right
        path = images / f"{number:04d}.png"
        to_image(values[number]).save(path)
        record = {
            "image": path.relative_to(folder.parent).as_posix(),
            "caption": caption,
            "expected": DIGIT_WORDS[label],
            "correct": right,
        }
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    (folder / "captions.jsonl").write_text("".join(lines), encoding="utf-8")
    return {
        "caption_accuracy": Metric(
            value=correct / len(captions),
            threshold=CAPTION_BAR,
            how=f"greedy captions of the {len(captions)} validation images that name exactly the right digit",
        )
    }


def _images(pipeline: Pipeline, sources: list[SourceConfig]) -> tuple[Pixels, Labels, torch.Tensor]:
    """Pixels in [0, 1] [I, E], digits [I] and uint8 values [I, C, H, W] of the sources' images."""
    values, labels = [], []
    for _, values_CHW, caption in single_images(pipeline.config, sources, pipeline.tokenizer):
        digit = digit_in_caption(caption)
        if digit is not None:
            values.append(values_CHW)
            labels.append(digit)
    if len(set(labels)) < len(DIGIT_WORDS):
        raise UserError(
            f"the digits suite needs captioned images of all ten digits, found {len(set(labels))};"
            " it is for models trained on `transfusion prepare digits`"
        )
    stacked = torch.stack(values)
    return _scaled(stacked), np.array(labels), stacked


def _scaled(values_ICHW: torch.Tensor) -> Pixels:
    return values_ICHW.flatten(1).numpy().astype(np.float64) / 255.0


def _spread(pixels: Pixels) -> float:
    """Mean distance between two different images."""
    return float(torch.pdist(torch.from_numpy(pixels)).mean())


def _nearest(pixels: Pixels, train: Pixels) -> float:
    return float(torch.cdist(torch.from_numpy(pixels), torch.from_numpy(train)).amin(1).mean())
