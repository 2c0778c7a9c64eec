"""The campaign of broken models: each break changes what the default suites find, and a move is told in intervals."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pairs import source, write_pairs

from transfusion.evaluate.metrics.metric import Metric
from transfusion.evaluate.suites.run import run_suites

sys.path.append(str(Path(__file__).parents[3] / "campaigns"))
from broken_models import BREAKS, moved

Open = Callable[..., Path]


def test_every_break_changes_a_figure_and_is_undone(open_model: Open, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"text": "someone wrote a word, and another one"}) + "\n")
    pairs = source(write_pairs(tmp_path / "pairs", ["one", "two", "a handwritten three"]))
    model = open_model({"validation": [pairs, source(str(texts), "texts")]}, layers=2)
    quick = ["samples.steps=2", "samples.max_tokens=3"]

    def measured() -> dict[str, float]:
        found = run_suites(model, [], tmp_path / "out", overrides=quick)
        return {name: metric.value for name, metric in found.items()}

    whole = measured()
    changed = {}
    for name, broken_by in BREAKS.items():
        with broken_by():
            broken = measured()
        changed[name] = {metric for metric in whole if broken[metric] != whole[metric]}
    # What an untrained model says of an image has no word of any caption.
    assert "distance_of_guidance" in changed["captions shuffled"]
    assert changed.pop("guidance off") == {"distance_of_guidance"}
    assert "pairs_image_loss" in changed["mask made causal"]
    assert "text_loss_nats_per_token" not in changed["mask made causal"], "texts are causal as they are"
    assert "pairs_image_loss" in changed["timestep ignored"]
    assert "text_loss_nats_per_token" in changed["text positions 0"]
    assert measured() == whole


def test_a_move_is_counted_in_halves_of_the_interval() -> None:
    whole = Metric(value=2.0, interval=(1.5, 2.3), how="")
    assert moved(whole, Metric(value=4.0, how="")) == pytest.approx(2 / 0.4)
    assert moved(whole, whole) == 0
    assert moved(Metric(value=2.0, how=""), Metric(value=4.0, how="")) == 0
