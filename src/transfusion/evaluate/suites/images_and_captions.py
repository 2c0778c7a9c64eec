"""Suites for any captioned images: what is drawn from validation captions, what is said of validation images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from torch import Tensor

from transfusion.evaluate.captioned_images import captioned_images, evenly, some_captioned_images
from transfusion.evaluate.metrics.caption_scores import cider_d, corpus_bleu
from transfusion.evaluate.metrics.classifier import features_of, load_classifier, recall, words_of
from transfusion.evaluate.metrics.frechet import frechet_distance, gaussian_of
from transfusion.evaluate.metrics.metric import Metric
from transfusion.evaluate.metrics.ptb import ptb_words
from transfusion.evaluate.suites.evidence import describe, draw, save_captions, save_drawn
from transfusion.generate.pipeline import Pipeline

SAMPLES = 1000
IMAGES_KEPT = 64
# Of the suite that compares scales of guidance: images for each.
SCALES, SWEEP = (1.0, 2.0, 3.0, 5.0, 8.0), 250
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
    return _captions(pipeline, out, found, expected, f"{len(found)} of the {total}")[1]


def images(pipeline: Pipeline, out: Path, *, classifier_path: Path) -> dict[str, Metric]:
    """Images drawn from the validation captions against the classifier's training images, in its eyes.

    Leaves the first of them under OUT/evaluation/generated. Raises UserError as the classifier and the data do.
    """
    judge = _Judge(pipeline, classifier_path)
    reached = judge.of_validation()
    return judge.drawn(out, SAMPLES, guidance=None) | reached


def guidance(pipeline: Pipeline, out: Path, *, classifier_path: Path) -> dict[str, Metric]:
    """As `images`, at the scale of guidance whose images come nearest: a few at each scale, then as many as there.

    A model without caption dropout is measured at scale 1 alone. Raises UserError as `images` does.
    """
    judge = _Judge(pipeline, classifier_path)
    reached = judge.of_validation()
    scales = SCALES if pipeline.config.data.caption_dropout > 0 else (1.0,)
    tried = {
        scale: judge.drawn(out, SWEEP, guidance=scale, seed=SAMPLES)["classifier_frechet"] for scale in scales
    }
    best = min(scales, key=lambda scale: tried[scale].value)
    # Seeds of its own, so that luck in choosing is none in the figure.
    chosen = judge.drawn(out, SAMPLES, guidance=best)
    return {
        **{f"classifier_frechet_at_guidance_{scale:g}": metric for scale, metric in tried.items()},
        **{f"{name}_at_best_guidance": metric for name, metric in chosen.items()},
        **reached,
    }


class _Judge:
    """Rates images of the validation captions by a classifier."""

    def __init__(self, pipeline: Pipeline, classifier_path: Path) -> None:
        self.pipeline = pipeline
        self.name = classifier_path.name
        self.classifier = load_classifier(classifier_path)
        self.images, self.captions = captioned_images(pipeline.config, pipeline.tokenizer, validation=True)

    def of_validation(self) -> dict[str, Metric]:
        """The figures of the real validation images. It comes first, as it tells whether the classifier fits them."""
        which = f"the {len(self.images)} real validation images"
        rated = self._rated(self.images, self.captions, which)
        return {f"{name}_of_validation": metric for name, metric in rated.items()}

    def drawn(self, out: Path, count: int, *, guidance: float | None, seed: int = 0) -> dict[str, Metric]:
        """The figures of so many drawn images, the first of which are left under OUT/evaluation/generated."""
        turns = [number % len(self.captions) for number in range(count)]
        samples, settings = draw(
            self.pipeline,
            [self.captions[turn] for turn in turns],
            [self.images[turn] for turn in turns],
            guidance=guidance,
            seed=seed,
        )
        save_drawn(samples[:IMAGES_KEPT], out)
        which = f"{count} images of the validation captions in turn ({settings})"
        return self._rated(
            [sample.pixels for sample in samples], [sample.prompt for sample in samples], which
        )

    def _rated(self, pixels: Sequence[Tensor], captions: Sequence[str], which: str) -> dict[str, Metric]:
        features = gaussian_of(features_of(self.classifier, pixels).numpy())
        return {
            "classifier_frechet": Metric(
                value=frechet_distance(features, self.classifier.reference),
                higher_is_better=False,
                how=f"Fréchet distance between the features of {self.name} (no FID: its own small network) of {which}"
                f" and of the {self.classifier.images} training images",
            ),
            "classifier_word_recall": Metric(
                value=recall(self.classifier, pixels, captions),
                how=f"share of the captions' words that {self.name} ranks first in {which}",
            ),
        }


def captions(pipeline: Pipeline, out: Path) -> dict[str, Metric]:
    """Greedy captions of all validation images against theirs. Of one image alone CIDEr is left out.

    Leaves OUT/evaluation/captions.jsonl, and the first of the images beside it.
    """
    validation, expected = captioned_images(pipeline.config, pipeline.tokenizer, validation=True)
    said, metrics = _captions(pipeline, out, validation, expected, f"the {len(validation)}")
    words = [ptb_words(caption) for caption in said]
    references = [[ptb_words(caption)] for caption in expected]
    how = f"of greedy captions of the {len(validation)} validation images, one reference each, words as COCO's are cut"
    if len(said) > 1:
        value = fmean(cider_d(words, references))
        metrics["caption_cider"] = Metric(
            value=value, how=f"CIDEr-D {how}, document frequencies of these references"
        )
    metrics["caption_bleu4"] = Metric(value=corpus_bleu(words, references)[-1], how=f"BLEU-4 {how}")
    return metrics


def _captions(
    pipeline: Pipeline, out: Path, found: Sequence[Tensor], expected: Sequence[str], which: str
) -> tuple[list[str], dict[str, Metric]]:
    """What is said of each image, and how well."""
    said = describe(pipeline, found)
    scores = [token_f1(one, other) for one, other in zip(said, expected, strict=True)]
    lines = [
        {"caption": one, "expected": other, "f1": round(score, 4)}
        for one, other, score in zip(said, expected, scores, strict=True)
    ]
    save_captions(lines, found[:IMAGES_KEPT], out)
    how = f"F1 of the words of greedy captions of {which} validation images, mean over images"
    return said, {"caption_token_f1": Metric(value=fmean(scores), how=how)}


def token_f1(said: str, expected: str) -> float:
    """Harmonic mean of precision and recall of words, each as often as it stands there (Rajpurkar et al., 2016)."""
    one, other = Counter(words_of(said)), Counter(words_of(expected))
    shared = (one & other).total()
    if not shared:
        return float(one == other)
    return 2 * shared / (one.total() + other.total())
