"""Suites for any captioned images: what is drawn from validation captions, what is said of validation images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from transfusion.errors import UserError
from transfusion.evaluate.captioned_images import captioned_images, evenly, some_captioned_images
from transfusion.evaluate.metrics.bootstrap import interval, mean_interval, ratio_interval
from transfusion.evaluate.metrics.caption_scores import cider_d, corpus_bleu
from transfusion.evaluate.metrics.classifier import (
    features_of,
    load_classifier,
    recall_of_each,
    words_of,
)
from transfusion.evaluate.metrics.frechet import frechet_distance, gaussian_of
from transfusion.evaluate.metrics.metric import Metric
from transfusion.evaluate.metrics.ptb import ptb_words
from transfusion.evaluate.suites.evidence import Drawing, describe, draw, save_captions, save_drawn
from transfusion.evaluate.suites.settings import (
    CaptionsSuite,
    DescribingSuite,
    GuidanceSuite,
    ImagesSuite,
    SamplesSuite,
)
from transfusion.generate.pipeline import Pipeline

IMAGES_KEPT = 64


def samples(pipeline: Pipeline, out: Path, settings: SamplesSuite) -> dict[str, Metric]:
    """A look at any model in short time: a few images of validation captions, captions of a few validation images.

    Leaves OUT/evaluation as `images` and `captions` do. Raises NoCaptionedImagesError.
    """
    found, expected, total = some_captioned_images(pipeline, settings.captions)
    places = evenly(len(found), settings.count)
    prompts, sizes = [expected[place] for place in places], [found[place] for place in places]
    drawing = Drawing.of(settings, pipeline)
    drawn = draw(pipeline, prompts, sizes, drawing, settings.batch)
    save_drawn(drawn, out)
    metrics = {}
    if drawing.guidance != 1:
        unguided = draw(pipeline, prompts, sizes, drawing._replace(guidance=1.0), settings.batch)
        shifts = [
            (one.pixels.float() - other.pixels.float()).square().mean().sqrt().item()
            for one, other in zip(drawn, unguided, strict=True)
        ]
        metrics["distance_of_guidance"] = Metric(
            value=fmean(shifts),
            count=len(shifts),
            interval=mean_interval(shifts),
            unit="of 255",
            how=f"root mean square distance between {len(shifts)} images of validation captions ({drawing}) and those"
            " of the same seeds without guidance, mean over images; 0 where guidance does nothing",
        )
    return metrics | _captions(pipeline, out, settings, found, expected, f"{len(found)} of the {total}")[1]


def images(pipeline: Pipeline, out: Path, settings: ImagesSuite) -> dict[str, Metric]:
    """Images drawn from the validation captions against the classifier's training images, in its eyes.

    Leaves the first of them under OUT/evaluation/generated. Raises UserError as the classifier and the data do.
    """
    judge = _Judge(pipeline, settings)
    reached = judge.of_validation()
    return judge.drawn(out, settings.count, Drawing.of(settings, pipeline)) | reached


def guidance(pipeline: Pipeline, out: Path, settings: GuidanceSuite) -> dict[str, Metric]:
    """As `images`, at the scale of guidance whose images come nearest: a few at each scale, then as many as there.

    A model without caption dropout is measured at scale 1 alone. Raises UserError as `images` does.
    """
    judge = _Judge(pipeline, settings)
    reached = judge.of_validation()
    scales = settings.scales if pipeline.config.data.caption_dropout > 0 else [1.0]
    drawing = Drawing.of(settings, pipeline)
    # Behind the seeds of the figure, so that luck in choosing is none in it.
    later = drawing._replace(seed=drawing.seed + settings.count)
    tried = {
        scale: judge.drawn(out, settings.tried, later._replace(guidance=scale))["classifier_frechet"]
        for scale in scales
    }
    best = min(scales, key=lambda scale: tried[scale].value)
    chosen = judge.drawn(out, settings.count, drawing._replace(guidance=best))
    return {
        **{f"classifier_frechet_at_guidance_{scale:g}": metric for scale, metric in tried.items()},
        **{f"{name}_at_best_guidance": metric for name, metric in chosen.items()},
        **reached,
    }


class _Judge:
    """Rates images of the validation captions by a classifier."""

    def __init__(self, pipeline: Pipeline, settings: ImagesSuite) -> None:
        if not settings.classifier:
            raise UserError(
                "the suites images and guidance need --classifier; `transfusion classifier CONFIG --out FILE` makes one"
            )
        self.pipeline, self.batch = pipeline, settings.batch
        path = Path(settings.classifier)
        self.name, self.classifier = path.name, load_classifier(path)
        self.images, self.captions = captioned_images(pipeline.config, pipeline.tokenizer, validation=True)

    def of_validation(self) -> dict[str, Metric]:
        """The figures of the real validation images. It comes first, as it tells whether the classifier fits them."""
        which = f"the {len(self.images)} real validation images"
        rated = self._rated(self.images, self.captions, which)
        return {f"{name}_of_validation": metric for name, metric in rated.items()}

    def drawn(self, out: Path, count: int, drawing: Drawing) -> dict[str, Metric]:
        """The figures of so many drawn images, the first of which are left under OUT/evaluation/generated."""
        turns = [number % len(self.captions) for number in range(count)]
        prompts, sizes = [self.captions[turn] for turn in turns], [self.images[turn] for turn in turns]
        samples = draw(self.pipeline, prompts, sizes, drawing, self.batch)
        save_drawn(samples[:IMAGES_KEPT], out)
        which = f"{count} images of the validation captions in turn ({drawing})"
        return self._rated(
            [sample.pixels for sample in samples], [sample.prompt for sample in samples], which
        )

    def _rated(self, pixels: Sequence[Tensor], captions: Sequence[str], which: str) -> dict[str, Metric]:
        features_IF = features_of(self.classifier, pixels).numpy()
        found_I, wanted_I = recall_of_each(self.classifier, pixels, captions)

        def distance(chosen_I: NDArray[np.int64]) -> float:
            return frechet_distance(gaussian_of(features_IF[chosen_I]), self.classifier.reference)

        return {
            "classifier_frechet": Metric(
                value=distance(np.arange(len(features_IF))),
                count=len(features_IF),
                interval=interval(len(features_IF), distance),
                higher_is_better=False,
                how=f"Fréchet distance between the features of {self.name} (no FID: its own small network) of {which}"
                f" and of the {self.classifier.images} training images",
            ),
            "classifier_word_recall": Metric(
                value=sum(found_I) / max(sum(wanted_I), 1.0),
                count=len(found_I),
                interval=ratio_interval(found_I, wanted_I),
                how=f"share of the captions' words that {self.name} ranks first in {which}",
            ),
        }


def captions(pipeline: Pipeline, out: Path, settings: CaptionsSuite) -> dict[str, Metric]:
    """Greedy captions of all validation images against theirs. Of one image alone CIDEr is left out.

    Leaves OUT/evaluation/captions.jsonl, and the first of the images beside it.
    """
    validation, expected = captioned_images(pipeline.config, pipeline.tokenizer, validation=True)
    said, metrics = _captions(pipeline, out, settings, validation, expected, f"the {len(validation)}")
    words = [ptb_words(caption) for caption in said]
    references = [[ptb_words(caption)] for caption in expected]
    how = f"of greedy captions of the {len(validation)} validation images, one reference each, words as COCO's are cut"
    if len(said) > 1:
        scores = cider_d(words, references)
        metrics["caption_cider"] = Metric(
            value=fmean(scores),
            count=len(scores),
            interval=mean_interval(scores),
            how=f"CIDEr-D {how}, document frequencies of these references",
        )

    def bleu4(chosen_I: NDArray[np.int64]) -> float:
        return corpus_bleu([words[place] for place in chosen_I], [references[place] for place in chosen_I])[
            -1
        ]

    metrics["caption_bleu4"] = Metric(
        value=bleu4(np.arange(len(said))),
        count=len(said),
        interval=interval(len(said), bleu4),
        how=f"BLEU-4 {how}",
    )
    return metrics


def _captions(
    pipeline: Pipeline,
    out: Path,
    settings: DescribingSuite,
    found: Sequence[Tensor],
    expected: Sequence[str],
    which: str,
) -> tuple[list[str], dict[str, Metric]]:
    """What is said of each image, and how well."""
    said = describe(pipeline, found, settings)
    scores = [token_f1(one, other) for one, other in zip(said, expected, strict=True)]
    lines = [
        {"caption": one, "expected": other, "f1": round(score, 4)}
        for one, other, score in zip(said, expected, scores, strict=True)
    ]
    save_captions(lines, found[:IMAGES_KEPT], out)
    return said, {
        "caption_token_f1": Metric(
            value=fmean(scores),
            count=len(scores),
            interval=mean_interval(scores),
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
