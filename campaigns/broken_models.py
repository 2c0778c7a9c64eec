"""Breaks a trained model in five ways and asks the default suites whether they notice.

    .venv/bin/python campaigns/broken_models.py MODEL [--out FILE]

MODEL is what `transfusion export` made of a run with captioned images and texts, such as that of the quickstart. Start
it in the folder where the training was started, whose paths the model names. Each break is one that a refactoring could
make. It is noticed where a figure of `transfusion eval MODEL` moves by more than five times its interval, which is half
of the way from its low to its high end. Writes a table of all figures. Exits with 3 when a break goes unnoticed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from transfusion.data.loading import validation
from transfusion.data.loading.collate import collate
from transfusion.evaluate.metrics.metric import Metric
from transfusion.evaluate.suites import images_and_captions
from transfusion.evaluate.suites.run import run_suites
from transfusion.inference import image_diffusion
from transfusion.model.embedding import TimestepEmbedding
from transfusion.observe.environment import describe_environment
from transfusion.schema import Batch
from transfusion_kernels import IntervalMask

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "broken-models.json"
INTERVALS = 5.0
KEPT = ("time", "python", "platform", "cpu", "cpu_count", "packages", "git", "transfusion")


def causal(batch: Batch) -> Batch:
    """Patches see no later patch of their image."""
    place_M = torch.arange(batch.token_ids_BS.shape[1], dtype=torch.int32)
    first_BM = batch.mask.first_key
    end_BM = torch.minimum(batch.mask.end_key, (place_M + 1).expand_as(first_BM))
    return replace(batch, mask=IntervalMask(first_BM, end_BM, num_keys=batch.mask.num_keys))


def without_places(batch: Batch) -> Batch:
    """All tokens and patches stand at position 0."""
    return replace(batch, position_BSA=torch.zeros_like(batch.position_BSA))


@contextlib.contextmanager
def collated(change: Callable[[Batch], Batch]) -> Iterator[None]:
    """Batches of validation losses are changed."""
    with mock.patch.object(validation, "collate", lambda *given: change(collate(*given))):
        yield


@contextlib.contextmanager
def timestep_ignored() -> Iterator[None]:
    """The network takes every image for a clean one."""
    embed = TimestepEmbedding.forward
    with mock.patch.object(
        TimestepEmbedding, "forward", lambda layer, step_I: embed(layer, torch.zeros_like(step_I))
    ):
        yield


@contextlib.contextmanager
def guidance_off() -> Iterator[None]:
    """Guidance gives the conditional answer."""
    with mock.patch.object(image_diffusion, "guide", lambda conditional, unconditional, scale: conditional):
        yield


@contextlib.contextmanager
def captions_shuffled() -> Iterator[None]:
    """Each image stands beside the caption of the one before it."""
    read = images_and_captions.some_captioned_images

    def shuffled(*given: Any) -> tuple[list[torch.Tensor], list[str], int]:
        images, captions, total = read(*given)
        return images, captions[-1:] + captions[:-1], total

    with mock.patch.object(images_and_captions, "some_captioned_images", shuffled):
        yield


BREAKS: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "mask made causal": lambda: collated(causal),
    "timestep ignored": timestep_ignored,
    "guidance off": guidance_off,
    "captions shuffled": captions_shuffled,
    "text positions 0": lambda: collated(without_places),
}


def moved(whole: Metric, broken: Metric) -> float:
    """How many intervals a figure has moved by; 0 where it has none."""
    if whole.interval is None:
        return 0.0
    low, high = whole.interval
    distance = abs(broken.value - whole.value)
    return distance / max((high - low) / 2, 1e-12) if distance else 0.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        whole = run_suites(options.model, [], Path(folder) / "whole")
        broken = {}
        for name, broken_by in BREAKS.items():
            with broken_by():
                broken[name] = run_suites(options.model, [], Path(folder) / name.replace(" ", "-"))
    environment = describe_environment()
    record = {
        "environment": {name: environment[name] for name in KEPT},
        "model": json.loads((options.model / "config.json").read_text())["config"]["run"]["name"],
        "whole": {name: {"value": each.value, "interval": each.interval} for name, each in whole.items()},
        "broken": {
            name: {
                metric: {
                    "value": figures[metric].value,
                    "intervals": round(moved(whole[metric], figures[metric]), 2),
                }
                for metric in figures
            }
            for name, figures in broken.items()
        },
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    unnoticed = []
    for name, figures in record["broken"].items():
        best = max(figures, key=lambda metric: figures[metric]["intervals"])
        found = figures[best]
        print(
            f"{name:20} {best} {record['whole'][best]['value']:.4g} -> {found['value']:.4g}:"
            f" {found['intervals']:.1f} intervals"
        )
        if found["intervals"] <= INTERVALS:
            unnoticed.append(name)
    if unnoticed:
        print(f"unnoticed: {', '.join(unnoticed)}")
    return 3 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
