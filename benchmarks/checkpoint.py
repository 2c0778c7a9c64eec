"""What saving costs training: wall time of steps with one save among them, over the same steps without.

    .venv/bin/python benchmarks/checkpoint.py [--steps 12] [--rounds 3] [--modes none,beside,waiting] [--out FILE]

A model whose checkpoint is about 1 GB (fp32 weights and both moments), steps of made-up documents as in
benchmarks/step.py, all cores. A round times the same steps without a save, with one that is written while training
goes on, and with one that training waits for, in turn, so that a noisy machine hits all three. The clock stops when
the checkpoint is published. Prints a summary, writes JSON.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from limits import find_device, record_head, write_json
from step import synthetic_steps, train_step
from transfusion.checkpoint.layout import find_latest
from transfusion.checkpoint.save import Saver
from transfusion.config import Config, load_config
from transfusion.parallel import environment
from transfusion.parallel.build import build_engine
from transfusion.parallel.engine import Engine
from transfusion.schema import Batch, TrainState

RESULT = Path(__file__).resolve().parent / "results" / "checkpoint.json"
# 10 blocks of width 768 and a vocabulary of 8,192: 84 M parameters, 12 bytes each.
SETTINGS = (
    "run.name=checkpoint",
    "model.layers=10",
    "model.hidden_size=768",
    "model.heads=12",
    "model.vocabulary=8192",
    "codec.channels=3",
    "codec.image_size=32",
    "data.sequence_length=512",
    "data.global_batch_size=4",
    "train.engine=local",
    "train.precision=fp32",
)
MODES = ("none", "beside", "waiting")
BAR = 1.05


def timed(
    mode: str, engine: Engine, data: list[list[Batch]], config: Config, steps: int, folder: Path
) -> tuple[float, float]:
    """Seconds of the steps, and of them the seconds that training stood still for the save."""
    saver = Saver(folder, engine, keep=1)
    waited = 0.0
    begin = time.perf_counter()
    for step in range(steps):
        train_step(engine, data[step % len(data)], config)
        stood = time.perf_counter()
        if step == 0 and mode != "none":
            saver.begin(TrainState(step=step + 1), copy=mode == "beside")
            if mode == "waiting":
                saver.finish()
        elif saver.written:
            saver.finish()
        waited += time.perf_counter() - stood
    stood = time.perf_counter()
    saver.finish()
    end = time.perf_counter()
    return end - begin, waited + end - stood


def measure(config: Config, *, steps: int, rounds: int, modes: Sequence[str] = MODES) -> dict[str, Any]:
    """Times of each mode in each round, and their ratios to the first, which is without a save."""
    here = environment.start(config.train.threads)
    data = synthetic_steps(config, 4, here.rank, here.world_size)
    engine = build_engine(config, here)
    found: dict[str, list[tuple[float, float]]] = {mode: [] for mode in modes}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Once around: the pages of the copy, and of the file, are new only once in a run.
        timed("beside", engine, data, config, 2, folder)
        for number in range(rounds):
            for mode in modes if number % 2 == 0 else reversed(modes):
                found[mode].append(timed(mode, engine, data, config, steps, folder))
        newest = find_latest(folder)
        assert newest is not None
        size = sum(path.stat().st_size for path in newest.iterdir())
    seconds = {mode: [whole for whole, _ in pairs] for mode, pairs in found.items()}
    return {
        "steps": steps,
        "checkpoint_bytes": size,
        "seconds": seconds,
        "seconds_stood_still": {mode: [stood for _, stood in pairs] for mode, pairs in found.items()},
        "seconds_a_step": statistics.median(seconds["none"]) / steps,
        "ratio": {
            mode: statistics.median(
                one / other for one, other in zip(seconds[mode], seconds["none"], strict=True)
            )
            for mode in modes[1:]
        },
        "bar": BAR,
    }


def summary(found: dict[str, Any]) -> str:
    """The figures in a few lines."""
    stood = {mode: statistics.median(values) for mode, values in found["seconds_stood_still"].items()}
    lines = [
        f"{found['steps']} steps of {found['seconds_a_step']:.2f} s, one save of"
        f" {found['checkpoint_bytes'] / 1e9:.2f} GB among them; wall time over that without (bar {found['bar']}):"
    ]
    names = {"beside": "written beside training", "waiting": "training waits"}
    lines += [
        f"  {names[mode]:24} {ratio:.3f}   training stood still {stood[mode]:.2f} s"
        for mode, ratio in found["ratio"].items()
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=12, help="steps timed")
    parser.add_argument("--rounds", type=int, default=3, help="times that each mode is timed")
    parser.add_argument("--modes", default=",".join(MODES), help="what is timed; none comes first")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file")
    given = parser.parse_args()
    device = find_device("auto")
    record: dict[str, Any] = {"environment": record_head(device)}
    config = load_config(None, list(SETTINGS))
    record |= measure(config, steps=given.steps, rounds=given.rounds, modes=given.modes.split(","))
    write_json(record, given.out)
    print(summary(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
