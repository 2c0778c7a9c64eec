"""Parameter groups, learning rate and moving average."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from transfusion.config import CodecConfig, ModelConfig, OptimizerConfig
from transfusion.model import Transfusion
from transfusion.optim import groups
from transfusion.optim.ema import MovingAverage
from transfusion.optim.schedule import learning_rate


def test_matrices_are_decayed_norms_biases_and_gains_are_not() -> None:
    model = Transfusion(
        ModelConfig(vocabulary=16, layers=1, hidden_size=16, heads=2, qk_norm=True), CodecConfig()
    )
    parameters = dict(model.named_parameters())
    decayed, plain = groups.parameter_groups(parameters, parameters, OptimizerConfig())
    names = {parameter: name for name, parameter in parameters.items()}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert len(decayed["params"]) + len(plain["params"]) == len(parameters)
    assert all("norm" in names[p] or names[p].endswith(("bias", "gain")) for p in plain["params"])
    assert not any("norm" in names[p] or names[p].endswith(("bias", "gain")) for p in decayed["params"])
    assert model.embedding.weight in set(decayed["params"])


def test_an_empty_group_is_left_out() -> None:
    linear = dict(nn.Linear(2, 2, bias=False).named_parameters())
    assert len(groups.parameter_groups(linear, linear, OptimizerConfig())) == 1


def test_moments_made_early_change_nothing() -> None:
    config = OptimizerConfig()
    results = []
    for early in (True, False):
        weight = nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))
        optimizer = groups.adamw([{"params": [weight], "weight_decay": 0.1}], config, fused=False)
        if early:
            groups.create_moments(optimizer, [weight])
        for step in range(3):
            weight.grad = torch.full_like(weight, 0.1 * (step + 1))
            optimizer.step()
        results.append(weight.detach())
    assert torch.equal(*results)


def test_updates_are_told_to_adamw() -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = groups.adamw([{"params": [weight]}], OptimizerConfig(), fused=False)
    groups.create_moments(optimizer, [weight])
    groups.set_updates(optimizer, 41)
    groups.set_learning_rate(optimizer, 0.5)
    weight.grad = torch.ones(2)
    optimizer.step()
    assert optimizer.state[weight]["step"] == 42
    assert optimizer.param_groups[0]["lr"] == 0.5


SCHEDULE = OptimizerConfig(learning_rate=1.0, final_learning_rate=0.1, warmup_steps=10)


@pytest.mark.parametrize(
    ("step", "rate"), [(0, 0.1), (4, 0.5), (9, 1.0), (10, 1.0), (60, 0.55), (110, 0.1), (10_000, 0.1)]
)
def test_schedule(step: int, rate: float) -> None:
    assert learning_rate(step, SCHEDULE, 111) == pytest.approx(rate)


def test_schedule_falls_steadily_and_stands_short_runs() -> None:
    rates = [learning_rate(step, SCHEDULE, 111) for step in range(10, 111)]
    assert rates == sorted(rates, reverse=True)
    assert learning_rate(0, SCHEDULE, 1) == pytest.approx(0.1)
    assert learning_rate(0, OptimizerConfig(warmup_steps=0), 1) == pytest.approx(3e-4)


def test_moving_average() -> None:
    tensor = torch.tensor([1.0, 2.0])
    average = MovingAverage([tensor], 0.75)
    tensor += 4.0
    average.update()
    assert average.averages[0].tolist() == [2.0, 3.0]
    assert tensor.tolist() == [5.0, 6.0]


def test_exchange_is_exact_and_its_own_inverse() -> None:
    tensors = [torch.randn(5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    average = MovingAverage(tensors, 0.9)
    for tensor in tensors:
        tensor += 0.1
    before = [t.clone() for t in (*tensors, *average.averages)]
    average.exchange()
    assert all(torch.equal(a, b) for a, b in zip((*average.averages, *tensors), before, strict=True))
    average.exchange()
    assert all(torch.equal(a, b) for a, b in zip((*tensors, *average.averages), before, strict=True))
