"""Two scenarios of campaigns/kill_points.py, which has the others: a torn save, and a frozen rank."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

CAMPAIGN = Path(__file__).parents[2] / "campaigns" / "kill_points.py"

pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.fixture(scope="module")
def campaign() -> ModuleType:
    described = importlib.util.spec_from_file_location("kill_points", CAMPAIGN)
    assert described and described.loader
    module = importlib.util.module_from_spec(described)
    sys.modules["kill_points"] = module
    described.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def place(campaign: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    place = campaign.Place(tmp_path_factory.mktemp("kill-points"))
    place.prepare()
    return place


def test_killed_with_half_a_file_written(campaign: ModuleType, place: Any) -> None:
    campaign.half_a_file(place)


def test_a_frozen_rank_ends_the_other(campaign: ModuleType, place: Any) -> None:
    campaign.frozen_rank(place, "train.stall_seconds=2", "train.lost_rank_timeout=4")
