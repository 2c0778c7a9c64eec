"""What a step costs is the mean over batches, and a budget buys whole steps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from transfusion.config import Config
from transfusion.errors import UserError
from transfusion.observe.flops import Operations, Work
from transfusion.parallel.muon import muon_operations
from transfusion.scaling import cost
from transfusion.scaling.cost import Cost, cost_of, within


def test_a_step_costs_the_mean_of_its_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    class Batches:
        """Steps of 1, 2, 3, ... micro-batches."""

        def __init__(self, *_: Any, **__: Any) -> None:
            self.steps = 0

        def __enter__(self) -> Batches:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def next_step(self) -> list[None]:
            self.steps += 1
            return [None] * self.steps

    def of(batches: list[None]) -> Work:
        return Work(exact=Operations(60.0, 40.0).scaled(len(batches)), palm=Operations(1.0))

    monkeypatch.setattr(cost, "Loader", Batches)
    monkeypatch.setattr(cost, "Tokenizer", lambda path: SimpleNamespace(vocabulary=300))
    monkeypatch.setattr(
        cost, "FlopModel", lambda config: SimpleNamespace(of=of, counted=config.model.vocabulary)
    )
    found = cost_of(Config.model_validate({"train": {"steps": 7}}))
    assert found == Cost(steps=7, step_flops=100.0 * (1 + cost.STEPS_COUNTED) / 2, parameters=300)
    assert found.flops == 7 * found.step_flops

    model = {"layers": 3, "hidden_size": 8, "heads": 2, "ffn_size": 24, "modality_weights": "all"}
    own = Config.model_validate({"optimizer": {"name": "muon"}, "model": model, "train": {"steps": 7}})
    # In each block and for both modalities: four matrices of attention, three of the feed-forward.
    shapes = [(8, 8)] * 4 + [(24, 8), (24, 8), (8, 24)]
    products = 3 * 2 * sum(muon_operations(*shape) for shape in shapes)
    assert cost_of(own).step_flops == found.step_flops + products


def test_a_budget_buys_the_nearest_number_of_steps() -> None:
    step = Cost(steps=1, step_flops=100.0, parameters=1)
    assert [within(step, flops).steps for flops in (60.0, 249.0, 251.0)] == [1, 2, 3]
    with pytest.raises(UserError, match="less than one step"):
        within(step, 49.0)
