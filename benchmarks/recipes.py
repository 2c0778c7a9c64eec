"""What a step costs with each recipe, beside the paper's: the same rows, a step of each in turn.

    .venv/bin/python benchmarks/recipes.py [section.key=value ...] [--rounds 20] [--out FILE]

A Transfusion of 4 layers and width 256 on one CPU thread, or on a GPU that of `benchmarks/step.py`. Half of the tokens
are text, half images. `model.modality_weights` makes no more operations: the ratio of the times is what the grouping of
positions costs. `diffusion.context=clean` has noised copies beside clean images, and so fewer documents in a row: told
is the time for as many documents too. Ratios are medians over rounds, each of steps that follow one another. Exits with
3 where own weights take more than 1.15 of the time of shared ones.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from limits import find_device, record_head, write_json
from step import (
    PAPER_SMALLEST,
    VOCABULARY,
    begin_step,
    finish_step,
    now,
    synthetic_steps,
    total_counts,
    train_step,
)
from transfusion.config import Config, load_config
from transfusion.observe.flops import FlopModel
from transfusion.parallel import environment
from transfusion.parallel.build import build_engine

RESULT = Path(__file__).resolve().parent / "results" / "recipes.json"
MISSED = 3
BAR = 1.15
SMALL = (
    "run.name=small",
    "model.layers=4",
    "model.hidden_size=256",
    "model.heads=4",
    "model.vocabulary=2048",
    "model.patch_size=4",
    "codec.image_size=32",
    "data.sequence_length=1024",
    "data.global_batch_size=2",
    "train.engine=local",
    "train.precision=fp32",
    "train.threads=1",
)
RECIPES = {
    "shared": (),
    "own feed-forward": ("model.modality_weights=ffn",),
    "own weights": ("model.modality_weights=all",),
    "clean image": ("diffusion.prediction=x",),
    "clean context": ("diffusion.context=clean",),
}


def measure(base: tuple[str, ...], rounds: int) -> dict[str, Any]:
    """Seconds of a step of each recipe, and medians of their ratios to the first."""
    configs: dict[str, Config] = {
        name: load_config(None, [*base, *changes]) for name, changes in RECIPES.items()
    }
    here = environment.start(configs["shared"].train.threads)
    try:
        data = {name: synthetic_steps(config, 1)[0] for name, config in configs.items()}
        engines = {name: build_engine(config, here) for name, config in configs.items()}
        for name, engine in engines.items():
            for _ in range(2):
                train_step(engine, data[name], configs[name])
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        for _ in range(rounds):
            for name, engine in engines.items():
                begin = now(here.device)
                finish_step(*begin_step(engine, data[name], configs[name]))
                seconds[name].append(now(here.device) - begin)
    finally:
        environment.stop()
    found = {}
    for name, config in configs.items():
        counts = total_counts(data[name])
        work = FlopModel(config).of(data[name])
        ratios = [mine / shared for mine, shared in zip(seconds[name], seconds["shared"], strict=True)]
        ratio = statistics.median(ratios)
        documents = counts.images / total_counts(data["shared"]).images
        found[name] = {
            "seconds": statistics.median(seconds[name]),
            "ratio": ratio,
            "ratio_per_image": ratio / documents,
            "exact_gflop": work.exact.total / 1e9,
            "parameters": sum(parameter.numel() for parameter in engines[name].model.parameters()),
            "images": counts.images,
            "text_targets": counts.text_targets,
        }
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    device = find_device("auto")
    base = (*PAPER_SMALLEST, f"model.vocabulary={VOCABULARY}") if device.type == "cuda" else SMALL
    found = measure((*base, *options.overrides), options.rounds)
    write_json(record_head(device) | {"rounds": options.rounds, "recipes": found}, options.out)
    for name, each in found.items():
        print(
            f"{name:18} {each['seconds'] * 1000:8.1f} ms  {each['ratio']:.3f} of shared,"
            f" {each['ratio_per_image']:.3f} an image, {each['exact_gflop']:.1f} GFLOP"
        )
    is_missed = any(found[name]["ratio"] > BAR for name in ("own feed-forward", "own weights"))
    return MISSED if is_missed else 0


if __name__ == "__main__":
    sys.exit(main())
