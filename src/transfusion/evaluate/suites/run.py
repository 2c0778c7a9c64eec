"""What `transfusion eval` runs: named suites, each a few metrics with how they were measured."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from transfusion.config import SourceConfig
from transfusion.data.shards.webdataset import expand_all
from transfusion.errors import UserError
from transfusion.evaluate.captioned_images import NoCaptionedImagesError
from transfusion.evaluate.metrics.metric import Metric
from transfusion.evaluate.progress_lines import say
from transfusion.evaluate.suites.digits import digits
from transfusion.evaluate.suites.edit import edit
from transfusion.evaluate.suites.images_and_captions import captions, guidance, images, samples
from transfusion.evaluate.suites.nearest import nearest
from transfusion.evaluate.suites.steps import steps
from transfusion.evaluate.suites.validation import validation
from transfusion.files import atomic_write_text
from transfusion.generate.budget import TABLE
from transfusion.generate.load import Dtype, Weights
from transfusion.generate.pipeline import Pipeline

METRICS = TABLE

# From a model, and the folder where evidence is left.
Suite = Callable[[Pipeline, Path], dict[str, Metric]]

# By name.
SUITES: dict[str, Suite] = {
    "validation": validation,
    "samples": samples,
    "digits": digits,
    "captions": captions,
    "nearest": nearest,
    "edit": edit,
    "steps": steps,
}
# Those that need a classifier.
RATED = {"images": images, "guidance": guidance}
# What runs where none is named. Of these, what the data do not allow is left out.
DEFAULT = ("validation", "samples")


def run_suites(
    model: Path,
    names: Sequence[str],
    out: Path,
    *,
    weights: Weights = "auto",
    device: str = "auto",
    dtype: Dtype = "auto",
    classifier: Path | None = None,
) -> dict[str, Metric]:
    """Run suites on an exported model; writes OUT/metrics.json (added to what is there) and OUT/evaluation/.

    names: none are the default ones, as far as the data allow. classifier: for the suites of RATED. Raises UserError
    for an unknown suite, or when the model's validation data is not to be found.
    """
    suites = dict(SUITES)
    for name, suite in RATED.items():
        if classifier is not None:
            suites[name] = functools.partial(suite, classifier_path=classifier)
        elif name in names:
            raise UserError(
                f"the suite {name} needs --classifier; `transfusion classifier CONFIG --out FILE` makes one"
            )
    unknown = [name for name in names if name not in suites]
    if unknown:
        raise UserError(f"no suite named {unknown[0]!r}; there are {', '.join([*SUITES, *RATED])}")
    pipeline = Pipeline.from_export(model, weights=weights, device=device, dtype=dtype)
    _refuse_missing_shards(pipeline.config.data.validation)
    if pipeline.config.train.threads:
        torch.set_num_threads(pipeline.config.train.threads)
    out.mkdir(parents=True, exist_ok=True)
    known = _known(out / METRICS)
    metrics: dict[str, Metric] = {}
    for name in names or DEFAULT:
        say(f"suite {name}")
        try:
            metrics |= suites[name](pipeline, out)
        except NoCaptionedImagesError as reason:
            if names:
                raise
            say(f"suite {name} is left out: {reason}")
    # Names and numbers on top, for whoever compares; how each was measured under `details`.
    details = known | {name: metric.as_dict() for name, metric in metrics.items()}
    values = {name: detail["value"] for name, detail in details.items()}
    atomic_write_text(out / METRICS, json.dumps(values | {"details": details}, indent=2) + "\n")
    return metrics


def _refuse_missing_shards(sources: Sequence[SourceConfig]) -> None:
    """Raises UserError that says where shards were sought, since a model may be used in another folder than its run."""
    for source in sources:
        try:
            expand_all(source.shards)
        except UserError as error:
            raise UserError(
                f"{error}; the model names its data as seen from the folder where its training was started, and this"
                f" is {Path.cwd()}: change to that folder"
            ) from None


def _known(path: Path) -> dict[str, Any]:
    """Details of the metrics that stand in `path` already. Raises UserError for a file that is not ours."""
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["details"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged; delete it, or name another folder with --out") from None
