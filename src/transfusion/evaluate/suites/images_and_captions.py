"""Suites for any captioned images: what is drawn from validation captions, what is said of validation images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from torch import Tensor

from transfusion.evaluate.captioned_images import captioned_images, evenly, some_captioned_images
from transfusion.evaluate.metrics.classifier import features_of, load_classifier, recall, words_of
from transfusion.evaluate.metrics.frechet import frechet_distance, gaussian_of
from transfusion.evaluate.metrics.metric import Metric
from transfusion.evaluate.suites.evidence import describe, draw, save_captions, save_drawn
from transfusion.generate.pipeline import Pipeline

SAMPLES = 1000
IMAGES_KEPT = 64
# Of the suite that is no measurement but a look.
FEW_IMAGES, FEW_CAPTIONS = 8, 32


def samples(pipeline: Pipeline, out: Path) -> dict[str, Metric]:
    """A look at any model in short time: a few images of validation captions, captions of a few validation images.

    Leaves OUT/evaluation as `images` and `captions` do. Raises NoCaptionedImagesError.
    """
    found, expected, total = some_captioned_images(pipeline, FEW_CAPTIONS)
    places = evenly(len(found), FEW_IMAGES)
    drawn, _ = draw(pipeline, [expected[place] for place in places], [found[place] for place in places])
    save_drawn(drawn, out)
    return _captions(pipeline, out, found, expected, f"{len(found)} of the {total}")


def images(pipeline: Pipeline, out: Path, *, classifier_path: Path) -> dict[str, Metric]:
    """Images drawn from the validation captions against the classifier's training images, in its eyes.

    Leaves the first of them under OUT/evaluation/generated. Raises UserError as the classifier and the data do.
    """
    classifier = load_classifier(classifier_path)
    validation, captions = captioned_images(pipeline.config, pipeline.tokenizer, validation=True)

    def distance(pixels: Sequence[Tensor]) -> float:
        return frechet_distance(gaussian_of(features_of(classifier, pixels).numpy()), classifier.reference)

    # First, since it tells whether the classifier fits the images.
    reached = distance(validation)
    turns = [number % len(captions) for number in range(SAMPLES)]
    drawn, settings = draw(pipeline, [captions[turn] for turn in turns], [validation[turn] for turn in turns])
    save_drawn(drawn[:IMAGES_KEPT], out)
    settings = f"{SAMPLES} images of the validation captions in turn ({settings})"
    features = f"the features of {classifier_path.name} (no FID: its own small network)"
    real_ones = f"the {len(validation)} real validation images"
    between = f"{features} of {{}} and of the {classifier.images} training images"
    pixels, prompts = [sample.pixels for sample in drawn], [sample.prompt for sample in drawn]
    return {
        "classifier_frechet": Metric(
            value=distance(pixels),
            higher_is_better=False,
            how=f"Fréchet distance between {between.format(settings)}",
        ),
        "classifier_frechet_of_validation": Metric(
            value=reached,
            higher_is_better=False,
            how=f"the same between {between.format(real_ones)}: what can be reached",
        ),
        "classifier_word_recall": Metric(
            value=recall(classifier, pixels, prompts),
            how=f"share of the captions' words that {classifier_path.name} ranks first in {settings}",
        ),
        "classifier_word_recall_of_validation": Metric(
            value=recall(classifier, validation, captions),
            how=f"the same on {real_ones}",
        ),
    }


def captions(pipeline: Pipeline, out: Path) -> dict[str, Metric]:
    """Greedy captions of all validation images against theirs.

    Leaves OUT/evaluation/captions.jsonl, and the first of the images beside it.
    """
    validation, expected = captioned_images(pipeline.config, pipeline.tokenizer, validation=True)
    return _captions(pipeline, out, validation, expected, f"the {len(validation)}")


def _captions(
    pipeline: Pipeline, out: Path, found: Sequence[Tensor], expected: Sequence[str], which: str
) -> dict[str, Metric]:
    said = describe(pipeline, found)
    scores = [token_f1(one, other) for one, other in zip(said, expected, strict=True)]
    lines = [
        {"caption": one, "expected": other, "f1": round(score, 4)}
        for one, other, score in zip(said, expected, scores, strict=True)
    ]
    save_captions(lines, found[:IMAGES_KEPT], out)
    return {
        "caption_token_f1": Metric(
            value=fmean(scores),
            how=f"F1 of the words of greedy captions of {which} validation images, mean over images",
        )
    }


def token_f1(said: str, expected: str) -> float:
    """Harmonic mean of precision and recall of words, each as often as it stands there (Rajpurkar et al., 2016)."""
    one, other = Counter(words_of(said)), Counter(words_of(expected))
    shared = (one & other).total()
    if not shared:
        return float(one == other)
    return 2 * shared / (one.total() + other.total())
