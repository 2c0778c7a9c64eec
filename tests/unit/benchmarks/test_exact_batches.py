"""A seeded sample of the campaign, and that it can tell a difference."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[3] / "campaigns"))
import exact_batches
from exact_batches import Tally, Truth
from transfusion.config import Config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exact")


@pytest.fixture(scope="module")
def config(folder: Path) -> Config:
    return exact_batches.make_config(folder)


@pytest.fixture(scope="module")
def truth(config: Config) -> Truth:
    return exact_batches.find_truth(config, 26)


def test_world_sizes_and_workers(config: Config, truth: Truth) -> None:
    tally = Tally()
    exact_batches.grid(config, truth, tally, random.Random(1), world_sizes=(3, 8), workers=(0,))
    exact_batches.grid(config, truth, tally, random.Random(2), world_sizes=(2,), workers=(2,))
    assert not tally.differences
    assert tally.global_batches == 9 and tally.states == 3 * (3 + 8 + 2) and tally.kills == 2


@pytest.mark.slow
def test_two_processes_killed_and_taken_up_elsewhere(config: Config, truth: Truth, folder: Path) -> None:
    tally = Tally()
    done = exact_batches.killed_processes(config, truth, tally, random.Random(4), folder)
    assert done and tally.kills == 2 and not tally.differences


def test_a_difference_is_told(config: Config, truth: Truth) -> None:
    assert len({row for step in truth.steps for row in step}) > 0.8 * 26 * exact_batches.ROWS
    wrong = Truth([truth.steps[1], *truth.steps[1:]], [*truth.states[:2], "", *truth.states[3:]])
    tally = Tally()
    exact_batches.run_ranks(
        config, wrong, tally, random.Random(0), first=0, steps=2, world_size=1, workers=0, state=truth.states[0]
    )  # fmt: skip
    where = "world size 1, workers 0"
    assert sorted(tally.differences) == [f"{where}: rows of step 0", f"{where}: state before step 2"]
