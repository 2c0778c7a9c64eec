"""Images drawn from validation captions against real ones, in the features of published networks.

I images, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from transfusion import __version__
from transfusion.errors import UserError
from transfusion.evaluate.captioned_images import CaptionedSamples
from transfusion.evaluate.chunks import Arrays, Chunks
from transfusion.evaluate.features.readers import (
    CLIP,
    DINOV2,
    INCEPTION,
    STAND_IN,
    Reader,
    identity,
    open_readers,
)
from transfusion.evaluate.metrics.bootstrap import (
    COSTLY_RESAMPLES,
    FEW_RESAMPLES,
    interval,
    mean_interval,
)
from transfusion.evaluate.metrics.frechet import distance_from, gaussian_of
from transfusion.evaluate.metrics.kernel_distance import SEED, kernel_distance
from transfusion.evaluate.metrics.metric import Metric
from transfusion.evaluate.metrics.precision_recall import NEIGHBOURS, precision_recall
from transfusion.evaluate.suites.evidence import Drawing, draw, show_kept
from transfusion.evaluate.suites.settings import TextToImageSuite
from transfusion.files import remove_leftover
from transfusion.generate.image_files import save_samples
from transfusion.generate.pipeline import Pipeline
from transfusion.parallel.environment import own_place

FOLDER = "text_to_image"
IMAGES_KEPT = 64
# Above this many features a distance takes seconds, and is resampled a few times only.
_MANY_FEATURES = 512


def text_to_image(pipeline: Pipeline, out: Path, settings: TextToImageSuite) -> dict[str, Metric]:
    """Fréchet and kernel distance, precision and recall, and the CLIP score of drawn images.

    Under a launcher every process draws its chunks, and all but the first return no metrics. Leaves features and
    prompts under OUT/evaluation/text_to_image, where another call goes on, and the first images under
    OUT/evaluation/generated. Raises UserError for weights that do not fit, and for too few images.
    """
    place = own_place()
    known = CaptionedSamples(pipeline)
    _refuse_too_few(settings, settings.count, len(known))
    drawing = Drawing.of(settings, pipeline)
    device = torch.device(pipeline.runner.device)
    readers = open_readers(
        device,
        inception=settings.inception,
        dinov2=settings.dinov2,
        clip=settings.clip,
        download=settings.download,
    )
    made_of = {
        "release": __version__,
        "model": astuple(pipeline.origin),
        "data": known.digests,
        "drawing": drawing._asdict(),
        "count": settings.count,
        "batch": settings.batch,
        "networks": identity(readers),
    }
    chunks = Chunks(
        out / "evaluation" / FOLDER, made_of, size=settings.chunk, rank=place.rank, ranks=place.world_size
    )
    kept = chunks.folder / "generated"

    def of_real(items: range) -> Arrays:
        return _measured(readers, *_read(known, items))

    def of_drawn(items: range) -> Arrays:
        images, prompts = _read(known, [_turn(item, settings.count, len(known)) for item in items])
        here = drawing._replace(seed=drawing.seed + items.start)
        samples = draw(pipeline, prompts, images, here, settings.batch)
        if not items.start:
            remove_leftover(kept)
            save_samples(samples[:IMAGES_KEPT], kept)
        return _measured(
            readers, [sample.pixels for sample in samples], [sample.prompt for sample in samples]
        )

    chunks.fill("real", len(known), of_real)
    chunks.fill("drawn", settings.count, of_drawn)
    if place.rank:
        return {}
    real, drawn = chunks.join("real", len(known)), chunks.join("drawn", settings.count)
    _refuse_too_few(settings, len(drawn["prompts"]), len(real["prompts"]))
    show_kept(kept, out)
    chunks.keep_only()
    which = (
        f"{len(drawn['prompts'])} images of validation captions ({drawing}) and of the {len(real['prompts'])}"
        " real validation images, at the model's sizes"
    )
    metrics: dict[str, Metric] = {}
    for reader in readers:
        there, here = drawn[reader.name], real[reader.name]
        if reader.name == CLIP:
            metrics |= _clip_scores(reader, there, here, drawing)
        elif reader.name == DINOV2:
            metrics["fd_dinov2"] = _frechet(reader, there, here, which)
        else:
            metrics |= _distances(reader, there, here, which, settings)
    return metrics


def _turn(item: int, count: int, known: int) -> int:
    """Which caption an image is drawn of: those of few images are evenly spread, those of many come in turn."""
    return item * known // count if count < known else item % known


def _refuse_too_few(settings: TextToImageSuite, drawn: int, real: int) -> None:
    fewest = min(drawn, real)
    if fewest <= NEIGHBOURS:
        raise UserError(
            f"the suite text_to_image has {drawn} drawn and {real} real images and needs {NEIGHBOURS + 1} of each;"
            " raise text_to_image.count, or name more data in text_to_image.data"
        )
    if fewest < settings.kid_subset_size:
        raise UserError(
            f"the suite text_to_image has {drawn} drawn and {real} real images, and subsets of"
            f" {settings.kid_subset_size} cannot be drawn from them; set text_to_image.kid_subset_size={fewest} or"
            " less, and compare with no figure of another size"
        )


def _read(known: CaptionedSamples, places: Sequence[int]) -> tuple[list[Tensor], list[str]]:
    """uint8 images [C, H, W] and captions. Raises UserError for latents, since what they decode to is not real."""
    found = list(known.read(places))
    if any(values.dtype != torch.uint8 for values, _ in found):
        raise UserError(
            "the suite text_to_image compares with real images, and the validation data are encoded; name shards of"
            " images in text_to_image.data"
        )
    return [image for image, _ in found], [caption for _, caption in found]


def _measured(readers: Sequence[Reader], images: Sequence[Tensor], captions: Sequence[str]) -> Arrays:
    """What each network reads, and of which prompts."""
    return {"prompts": np.array(captions, str)} | {
        reader.name: reader(images, captions) for reader in readers
    }


def _distances(
    reader: Reader,
    drawn_IF: NDArray[np.floating],
    real_IF: NDArray[np.floating],
    which: str,
    settings: TextToImageSuite,
) -> dict[str, Metric]:
    """The figures of Inception, under names of their own where the stand-in takes its place."""
    before = {INCEPTION: "", STAND_IN: "standin_"}[reader.name]
    kernel = kernel_distance(drawn_IF, real_IF, subsets=settings.kid_subsets, size=settings.kid_subset_size)
    found = precision_recall(drawn_IF, real_IF)
    balls = f"reach to neighbour {NEIGHBOURS} in the features of {reader.source}, of {which}"
    return {
        f"{before}frechet" if before else "fid": _frechet(reader, drawn_IF, real_IF, which),
        f"{before}kid": Metric(
            value=kernel.mean,
            count=len(drawn_IF),
            higher_is_better=False,
            how=f"kernel distance (polynomial, degree 3, unbiased) in the features of {reader.source}, of {which}: mean"
            f" of {settings.kid_subsets} subsets of {settings.kid_subset_size} drawn with seed {SEED}, whose deviation"
            f" is {kernel.deviation:.6f}",
        ),
        f"{before}precision": Metric(
            value=float(found.precise_N.mean()),
            count=len(drawn_IF),
            interval=mean_interval(found.precise_N.tolist()),
            how=f"share of drawn images within the balls of real ones, which {balls}",
        ),
        f"{before}recall": Metric(
            value=float(found.recalled_M.mean()),
            count=len(real_IF),
            interval=mean_interval(found.recalled_M.tolist()),
            how=f"share of real images within the balls of drawn ones, which {balls}",
        ),
    }


def _frechet(
    reader: Reader, drawn_IF: NDArray[np.floating], real_IF: NDArray[np.floating], which: str
) -> Metric:
    distance = distance_from(gaussian_of(real_IF))

    def of_some(chosen_I: NDArray[np.int64]) -> float:
        return distance(gaussian_of(drawn_IF[chosen_I]))

    resamples = COSTLY_RESAMPLES if drawn_IF.shape[1] <= _MANY_FEATURES else FEW_RESAMPLES
    return Metric(
        value=of_some(np.arange(len(drawn_IF))),
        count=len(drawn_IF),
        interval=interval(len(drawn_IF), of_some, resamples=resamples),
        higher_is_better=False,
        how=f"Fréchet distance between the features of {reader.source}, of {which}; interval of {resamples} resamples"
        " of the drawn images",
    )


def _clip_scores(
    reader: Reader, drawn_I: NDArray[np.floating], real_I: NDArray[np.floating], drawing: Drawing
) -> dict[str, Metric]:
    """100 max(cosine, 0) of image and caption, mean over the images, beside that of the real ones."""
    described: dict[str, Any] = {
        "clip_score": (drawn_I, f"images drawn of validation captions ({drawing}) and these captions"),
        "clip_score_of_validation": (real_I, "real validation images and their captions"),
    }
    metrics = {}
    for name, (cosine_I, which) in described.items():
        score_I = 100.0 * cosine_I.astype(np.float64).clip(min=0.0)
        metrics[name] = Metric(
            value=float(score_I.mean()),
            count=len(score_I),
            interval=mean_interval(score_I.tolist()),
            how=f"100 max(cosine, 0) in the eyes of {reader.source}, mean over the {len(score_I)} {which}",
        )
    return metrics
