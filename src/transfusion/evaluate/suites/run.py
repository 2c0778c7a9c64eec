"""What `transfusion eval` runs: named suites, each a few metrics with how they were measured."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from transfusion.errors import UserError
from transfusion.evaluate.metrics.metric import Metric
from transfusion.evaluate.suites.digits import digits
from transfusion.evaluate.suites.images_and_captions import captions, images
from transfusion.evaluate.suites.validation import validation
from transfusion.files import atomic_write_text
from transfusion.generate.pipeline import Pipeline, Weights

METRICS = "metrics.json"

# From a model, and the folder where evidence is left.
Suite = Callable[[Pipeline, Path], dict[str, Metric]]

# By name. `images` needs a classifier beside them.
SUITES: dict[str, Suite] = {"validation": validation, "digits": digits, "captions": captions}


def run_suites(
    model: Path,
    names: Sequence[str],
    out: Path,
    *,
    weights: Weights = "auto",
    device: str = "auto",
    classifier: Path | None = None,
) -> dict[str, Metric]:
    """Run suites on an exported model; writes OUT/metrics.json (added to what is there) and OUT/evaluation/.

    classifier: for the suite `images`. Raises UserError for an unknown suite, or when the model's validation data is
    not to be found.
    """
    suites = dict(SUITES)
    if classifier is not None:
        suites["images"] = functools.partial(images, classifier_path=classifier)
    elif "images" in names:
        raise UserError(
            "the suite images needs --classifier; `transfusion classifier CONFIG --out FILE` makes one"
        )
    unknown = [name for name in names if name not in suites]
    if unknown:
        raise UserError(f"no suite named {unknown[0]!r}; there are {', '.join(suites)}")
    pipeline = Pipeline.from_export(model, weights=weights, device=device)
    if pipeline.config.train.threads:
        torch.set_num_threads(pipeline.config.train.threads)
    out.mkdir(parents=True, exist_ok=True)
    known = _known(out / METRICS)
    metrics: dict[str, Metric] = {}
    for name in names:
        metrics |= suites[name](pipeline, out)
    # Names and numbers on top, for whoever compares; how each was measured under `details`.
    details = known | {name: metric.as_dict() for name, metric in metrics.items()}
    values = {name: detail["value"] for name, detail in details.items()}
    atomic_write_text(out / METRICS, json.dumps(values | {"details": details}, indent=2) + "\n")
    return metrics


def _known(path: Path) -> dict[str, Any]:
    """Details of the metrics that stand in `path` already. Raises UserError for a file that is not ours."""
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["details"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged; delete it, or name another folder with --out") from None
