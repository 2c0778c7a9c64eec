"""The validation suite: what the image loss is the error of."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from transfusion.config import Config, SourceConfig
from transfusion.evaluate.suites import validation
from transfusion.evaluate.suites.settings import ValidationSuite
from transfusion.families import FAMILIES
from transfusion.schema import LossTerms


@pytest.mark.parametrize(
    ("diffusion", "said"),
    [
        ({}, "of the predicted noise, validation p, fixed noise and timesteps"),
        (
            {"prediction": "v", "loss_weight": "min-snr"},
            "of the predicted velocity, validation p, fixed noise and timesteps",
        ),
        (
            {"prediction": "flow", "timestep_sampling": "logit-normal", "timestep_shift": 3.0},
            "of the predicted flow velocity, validation p, fixed noise and timesteps (logit-normal, shift 3)",
        ),
    ],
)
def test_the_image_loss_is_the_plain_error_and_says_of_what(
    diffusion: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of training are left out, and nothing else is."""
    source = SourceConfig(name="p", shards="p.tar")
    config = Config.model_validate({"diffusion": diffusion, "data": {"validation": [source]}})
    used: list[Config] = []

    def losses(model: Any, loader: Any, config: Config, *rest: Any) -> list[LossTerms]:
        used.append(config)
        zero = torch.zeros(())
        return [
            LossTerms(
                {"text": zero, "image": torch.tensor(total)}, {"text": zero, "image": torch.tensor(count)}
            )
            for total, count in ((1.0, 3.0), (2.0, 1.0), (0.0, 0.0))
        ]

    monkeypatch.setattr(validation, "validation_losses", losses)
    monkeypatch.setattr(validation, "EvaluationLoader", lambda *_, **__: [])
    runner = SimpleNamespace(model=None, device=None, codec=None)
    pipeline: Any = SimpleNamespace(
        config=config, runner=runner, tokenizer=None, family=FAMILIES["transfusion"]
    )
    metric = validation.validation(pipeline, Path(), ValidationSuite())["p_image_loss"]
    assert metric.value == 0.75 and metric.count == 2, "a row without an image says nothing of images"
    assert metric.interval is not None and metric.interval[0] < 0.75 < metric.interval[1]
    assert metric.how == f"mean squared error {said}"
    assert used[0].diffusion.as_dict() == {**config.diffusion.as_dict(), "loss_weight": "none"}
