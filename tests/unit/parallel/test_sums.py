"""Sums over many batches stay exact where float32 would stop counting."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce

import pytest
import torch
from handmade import make_batch, small_config

from transfusion.evaluate.validation_losses import validation_losses
from transfusion.families.build import family_of
from transfusion.losses.transfusion import TransfusionLoss
from transfusion.observe.losses import MeanLosses
from transfusion.schema import TIMESTEP_BUCKETS, LossTerms

# The first whole number after which float32 knows no odd one.
LARGE = 2.0**24


def terms(value: float) -> LossTerms:
    given = {name: torch.tensor(value) for name in ("text", "image")}
    given["image_by_timestep"] = torch.full((TIMESTEP_BUCKETS,), value)
    return LossTerms(dict(given), dict(given))


def test_an_interval_of_steps() -> None:
    parts = [terms(LARGE), *(terms(1.0) for _ in range(8))]
    config = small_config()
    loss = family_of(config).loss(config, None)
    images = int(LARGE) + 1
    parts = [replace(part, counts={**part.counts, "text": torch.tensor(1.0)}) for part in parts]
    found = MeanLosses.over_ranks(parts, loss, [0.5], images=images)
    assert found.means["text"] == (LARGE + 8) / 9
    assert (found.images, found.extra_sums) == (images, [0.5])


def test_validation_data(monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([LARGE, 1.0, 1.0])
    monkeypatch.setattr(TransfusionLoss, "terms", lambda *_: terms(next(values)))
    batches = [make_batch("text", seed) for seed in range(3)]
    parts = list(validation_losses(torch.nn.Identity(), batches, small_config(), torch.device("cpu")))  # type: ignore[arg-type]
    assert float(reduce(LossTerms.plus, parts).sums["text"]) == LARGE + 2
