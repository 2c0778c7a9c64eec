"""What each recipe's step costs: measured once, on a tiny model."""

from __future__ import annotations

from recipes import RECIPES, measure
from step import TINY


def test_every_recipe_is_measured() -> None:
    found = measure(TINY, rounds=1)
    assert list(found) == list(RECIPES)
    shared = found["shared"]
    assert shared["ratio"] == 1.0
    for name in ("own feed-forward", "own weights"):
        # As much work with more parameters.
        assert found[name]["exact_gflop"] == shared["exact_gflop"]
        assert found[name]["parameters"] > shared["parameters"]
        assert found[name]["seconds"] > 0
    # Noised copies take the place of documents.
    assert found["clean context"]["images"] <= shared["images"]
