"""What a model makes of the images before an image: the last of interleaved validation documents, scored and drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from transfusion.data.loading.validation import documents
from transfusion.errors import UserError
from transfusion.evaluate.metrics.metric import Metric
from transfusion.evaluate.progress_lines import ProgressLines
from transfusion.evaluate.suites.evidence import Drawing
from transfusion.evaluate.suites.settings import EditSuite
from transfusion.generate.image_files import write_rows
from transfusion.generate.pipeline import Pipeline
from transfusion.schema import ImageSegment, TextSegment

EVIDENCE = "edits.png"
_SHOWN = 16


def edit(pipeline: Pipeline, out: Path, settings: EditSuite) -> dict[str, Metric]:
    """How well the last image of a document follows from its first image and the text between them.

    For documents of an image, a text and an image. Leaves OUT/evaluation/edits.png: first images, what was drawn, and
    the true ones. Raises UserError where there are none, for latents in their place, and for a model without a bound.
    """
    found = list(islice(_triples(pipeline), settings.count))
    if not found:
        raise UserError(
            "the suite edit needs documents of an image, a text and an image in data.validation; choose another"
        )
    firsts, texts, lasts = (list(part) for part in zip(*found, strict=True))
    count = f"{len(found)} documents of an image, a text and an image"
    tell = ProgressLines(f"scoring the last images of {count}")
    scores = {}
    for name, contexts in (
        ("", [[first, text] for first, text in zip(firsts, texts, strict=True)]),
        ("_without_the_image", texts),
    ):
        pairs = list(zip(contexts, lasts, strict=True))
        each = [
            pipeline.score([before], [last], samples=settings.draws)[0] for before, last in tell.each(pairs)
        ]
        scores[name] = fmean(-score.log_likelihood / score.count for score in each)
    drawing = Drawing.of(settings, pipeline)
    tell = ProgressLines(f"drawing {len(found)} edits")
    samples = pipeline.edit(firsts, texts, **drawing._asdict(), batch=settings.batch, on_call=tell)
    drawn = [sample.pixels for sample in samples]
    write_rows([row[:_SHOWN] for row in (firsts, drawn, lasts)], out / "evaluation" / EVIDENCE)
    draws = f"{settings.draws} draws of timestep and noise"
    bound = f"variational bound of the last images of {count}, nats over values, {draws}"
    return {
        "edit_nats_per_value": Metric(value=scores[""], unit="nats/value", higher_is_better=False, how=bound),
        "edit_nats_per_value_without_the_image": Metric(
            value=scores["_without_the_image"],
            unit="nats/value",
            higher_is_better=False,
            how="the same behind the text alone",
        ),
        "edit_distance": Metric(
            value=_distance(drawn, lasts),
            unit="of 255",
            higher_is_better=False,
            how=f"root mean square distance of images drawn behind {count} before the last ({drawing}) from the last",
        ),
        "edit_distance_of_no_change": Metric(
            value=_distance(firsts, lasts),
            unit="of 255",
            higher_is_better=False,
            how="the same of the first images: what copying reaches",
        ),
    }


def _triples(pipeline: Pipeline) -> Iterator[tuple[Tensor, str, Tensor]]:
    """First image, text and last image of the documents that have just these, the images of one size."""
    sizes = pipeline.config.media_sizes
    for document in documents(pipeline.config, pipeline.config.data.validation, pipeline.tokenizer):
        kinds = [type(part) for part in document.segments]
        if kinds != [ImageSegment, TextSegment, ImageSegment]:
            continue
        first, text, last = document.segments
        assert (
            isinstance(first, ImageSegment)
            and isinstance(text, TextSegment)
            and isinstance(last, ImageSegment)
        )
        if not (sizes.is_image(first.begin) and sizes.is_image(last.begin)):
            continue
        images = [torch.as_tensor(part.values_CHW) for part in (first, last)]
        if any(image.dtype != torch.uint8 for image in images):
            raise UserError(f"data.validation has latents at {document.key}, and the suite edit needs images")
        if images[0].shape == images[1].shape:
            yield images[0], pipeline.tokenizer.decode(list(text.token_ids)), images[1]


def _distance(images: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    rests = [(one.float() - other.float()).square().mean() for one, other in zip(images, others, strict=True)]
    return float(torch.stack(rests).mean().sqrt())
