"""A short run of the campaign over a mixed load, and that it can tell what it looks for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

sys.path.append(str(Path(__file__).parents[3] / "campaigns"))
import mixed_load
from mixed_load import Campaign
from transfusion.generate import Engine, Pipeline
from transfusion.inference.cache import PagedCache, Row

TICKS, PAUSE_TICKS = 150, 70


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return mixed_load.make_pipeline(tmp_path_factory.mktemp("mixed"))


def missed(campaign: Campaign, ticks: int = TICKS) -> set[str]:
    figures = campaign.run(ticks, PAUSE_TICKS)
    return {bar.name for bar in mixed_load.bars(figures, ticks) if bar.is_missed}


def test_a_short_run(pipeline: Pipeline) -> None:
    campaign = Campaign(pipeline, seed=1)
    assert missed(campaign) == set()
    figures = campaign.figures
    assert figures.counts["requests"] > 100 and figures.counts["images"] > 50
    assert all(figures.counts[f"ended by {reason}"] for reason in ("end", "tokens", "image", "cancelled"))
    assert len(figures.memory) >= 2 and figures.compared >= 2


def test_faults_are_told(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """One wave in an engine that often idles, loses pages and gives an answer the logits of its neighbour."""
    ticks, released = iter(range(10**6)), iter(range(10**6))
    logits, release = pipeline.runner.logits, PagedCache.release

    def every_third(tick: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self: tick(self) if next(ticks) % 3 == 0 else []

    def losing(self: PagedCache, row: Row) -> None:
        if next(released) % 10 == 0:
            del row.pages[:1]
        release(self, row)

    def of_the_neighbour(state_RD: Tensor) -> Tensor:
        return logits(state_RD).roll(1, 0)

    monkeypatch.setattr(mixed_load, "COMPARED", 0.5)
    monkeypatch.setattr(Engine, "tick", every_third(Engine.tick))
    monkeypatch.setattr(PagedCache, "release", losing)
    monkeypatch.setattr(pipeline.runner, "logits", of_the_neighbour)
    assert missed(Campaign(pipeline, seed=1), ticks=1) >= {
        "ticks from a token to the next step",
        "ticks from a step of an image to the next step",
        "pages neither free nor kept",
        "answers that differ from the same alone",
    }
