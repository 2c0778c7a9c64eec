"""Runs the Hopper kernels in the simulator on many random masks and schedules, and says how each mutant is caught.

    python benchmarks/campaigns/simulate_hopper.py --seeds 200

Ends with status 1 at the first wrong result, or if a mutant is not caught.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[2] / "tests" / "kernels"))

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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--seeds", type=int, default=200, help="random masks, each with a schedule of its own"
    )
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    worst = 0.0
    for seed in range(seeds):
        mask, group = random_mask(seed, size=1 + seed * 37 % 400), (1, 2, 4)[seed % 3]
        with simulated(seed):
            errors = forward_errors(mask, group, seed) | backward_errors(mask, group, seed)
        worst = max(worst, *errors.values())
        if not max(errors.values()) < BAR:
            print(f"seed {seed}: {errors}")
            return 1
    print(f"{seeds} masks, forward and backward: greatest error {worst:.1e}")
    missed = 0
    for mutants, run in ((FORWARD_MUTANTS, forward_errors), (BACKWARD_MUTANTS, backward_errors)):
        for name, change in mutants.items():
            how = caught(change, run)
            missed += not how
            print(f"{name}: {how or 'MISSED'}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
