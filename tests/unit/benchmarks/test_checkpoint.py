"""The benchmark of saving, small: each mode saves what it says, and waiting is counted as waiting."""

from __future__ import annotations

import json

import pytest

import checkpoint
from transfusion.config import load_config


@pytest.mark.slow
def test_each_mode_is_timed_on_the_same_steps() -> None:
    small = (
        "model.layers=1",
        "model.hidden_size=64",
        "model.heads=2",
        "model.vocabulary=512",
        "data.global_batch_size=2",
    )
    config = load_config(None, [*checkpoint.SETTINGS, *small, "codec.image_size=8"])
    found = checkpoint.measure(config, steps=2, rounds=2)
    assert json.loads(json.dumps(found)) == found
    assert found["checkpoint_bytes"] > 12 * 64 * 512
    assert found["seconds"].keys() == set(checkpoint.MODES)
    assert all(len(times) == 2 and min(times) > 0 for times in found["seconds"].values())
    assert min(found["seconds_stood_still"]["waiting"]) > max(found["seconds_stood_still"]["none"])
    assert "training waits" in checkpoint.summary(found)
