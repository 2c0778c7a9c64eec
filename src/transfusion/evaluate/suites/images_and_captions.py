"""Suites for any captioned images: what is drawn from validation captions, what is said of validation images."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from statistics import fmean

import torch

from transfusion.config.objectives import GRID_SAMPLER
from transfusion.evaluate.metrics.classifier import (
    captioned_images,
    features_of,
    load_classifier,
    recall,
    words_of,
)
from transfusion.evaluate.metrics.frechet import frechet_distance, gaussian_of
from transfusion.evaluate.metrics.metric import Metric
from transfusion.files import remove_leftover
from transfusion.generate.image_files import save_samples
from transfusion.generate.pipeline import Pipeline

SAMPLES = 1000
SAMPLES_KEPT = 64
GUIDANCE = 3.0
SAMPLER_STEPS = 25
BATCH = 128
MAX_CAPTION_TOKENS = 32


def images(pipeline: Pipeline, out: Path, *, classifier_path: Path) -> dict[str, Metric]:
    """Images drawn from the validation captions against the classifier's training images, in its eyes.

    Leaves the first of them under OUT/evaluation/generated. Raises UserError as the classifier and the data do.
    """
    classifier = load_classifier(classifier_path)
    validation, captions = captioned_images(pipeline.config, pipeline.tokenizer, validation=True)
    prompts = [captions[number % len(captions)] for number in range(SAMPLES)]
    config = pipeline.config
    sampler = GRID_SAMPLER[config.diffusion.prediction]
    guided = config.data.caption_dropout > 0
    guidance = GUIDANCE if guided else 1.0
    samples = pipeline.sample(
        prompts, guidance=guidance, steps=SAMPLER_STEPS, sampler=sampler, seed=0, batch=BATCH
    )
    # Without what another suite has left there.
    remove_leftover(out / "evaluation" / "generated")
    save_samples(samples[:SAMPLES_KEPT], out / "evaluation" / "generated")
    drawn = torch.stack([sample.pixels for sample in samples])
    settings = (
        f"{SAMPLES} images of the validation captions in turn ({sampler} {SAMPLER_STEPS} steps, guidance"
        f" {guidance:g}, seeds from 0)"
    )
    features = f"the features of {classifier_path.name} (no FID: its own small network)"
    real_ones = f"the {len(validation)} real validation images"
    between = f"{features} of {{}} and of the {classifier.images} training images"

    def distance(pixels_ICHW: torch.Tensor) -> float:
        return frechet_distance(
            gaussian_of(features_of(classifier, pixels_ICHW).numpy()), classifier.reference
        )

    return {
        "classifier_frechet": Metric(
            value=distance(drawn),
            higher_is_better=False,
            how=f"Fréchet distance between {between.format(settings)}",
        ),
        "classifier_frechet_of_validation": Metric(
            value=distance(validation),
            higher_is_better=False,
            how=f"the same between {between.format(real_ones)}: what can be reached",
        ),
        "classifier_word_recall": Metric(
            value=recall(classifier, drawn, prompts),
            how=f"share of the captions' words that {classifier_path.name} ranks first in {settings}",
        ),
        "classifier_word_recall_of_validation": Metric(
            value=recall(classifier, validation, captions),
            how=f"the same on {real_ones}",
        ),
    }


def captions(pipeline: Pipeline, out: Path) -> dict[str, Metric]:
    """Greedy captions of the validation images against theirs; leaves OUT/evaluation/captions.jsonl."""
    validation, expected = captioned_images(pipeline.config, pipeline.tokenizer, validation=True)
    said = pipeline.caption(validation, max_tokens=MAX_CAPTION_TOKENS)
    scores = [token_f1(one, other) for one, other in zip(said, expected, strict=True)]
    folder = out / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"caption": one, "expected": other, "f1": round(score, 4)}, ensure_ascii=False) + "\n"
        for one, other, score in zip(said, expected, scores, strict=True)
    ]
    (folder / "captions.jsonl").write_text("".join(lines), encoding="utf-8")
    return {
        "caption_token_f1": Metric(
            value=fmean(scores),
            how=f"F1 of the words of greedy captions of the {len(said)} validation images, mean over images",
        )
    }


def token_f1(said: str, expected: str) -> float:
    """Harmonic mean of precision and recall of words, each as often as it stands there (Rajpurkar et al., 2016)."""
    one, other = Counter(words_of(said)), Counter(words_of(expected))
    shared = (one & other).total()
    if not shared:
        return float(one == other)
    return 2 * shared / (one.total() + other.total())
