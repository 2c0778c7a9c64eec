"""Runs the Hopper kernels in the simulator on many random masks and schedules, and says how each mutant is caught.

    .venv/bin/python campaigns/simulate_hopper.py [--seeds 200] [--out FILE]

Prints, and writes benchmarks/results/simulated-hopper.json. Ends with status 1 at the first wrong result, or if a
mutant is not caught.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1] / "tests" / "kernels"))

from hopper_cases import (
    BACKWARD_MUTANTS,
    BAR,
    FORWARD_MUTANTS,
    backward_errors,
    caught,
    forward_errors,
    random_mask,
    simulated,
)

from transfusion.observe.environment import describe_environment

RESULT = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "simulated-hopper.json"
KEPT = ("time", "python", "platform", "cpu", "cpu_count", "packages", "git", "transfusion")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seeds", type=int, default=200, help="random masks, each with a schedule of its own"
    )
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.perf_counter()
    worst = 0.0
    for seed in range(options.seeds):
        mask, group = random_mask(seed, size=1 + seed * 37 % 400), (1, 2, 4)[seed % 3]
        with simulated(seed):
            errors = forward_errors(mask, group, seed) | backward_errors(mask, group, seed)
        worst = max(worst, *errors.values())
        if not max(errors.values()) < BAR:
            print(f"seed {seed}: {errors}")
            return 1
    print(f"{options.seeds} masks, forward and backward: greatest error {worst:.1e}")
    found: dict[str, str] = {}
    for mutants, run in ((FORWARD_MUTANTS, forward_errors), (BACKWARD_MUTANTS, backward_errors)):
        for name, change in mutants.items():
            found[name] = caught(change, run)
            print(f"{name}: {found[name] or 'MISSED'}")
    environment = describe_environment()
    record = {
        "command": f"python campaigns/simulate_hopper.py --seeds {options.seeds}",
        "environment": {name: environment[name] for name in KEPT},
        "seconds": round(time.perf_counter() - begin),
        "masks": options.seeds,
        "max_error": worst,
        "bar": BAR,
        "mutants": {name: how or "missed" for name, how in found.items()},
    }
    options.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0 if all(found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
