"""Muon for the matrices of the blocks: torch's own, beside AdamW, through checkpoints, and refused under ZeRO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import make_batch, small_config, state_of, train_step

from transfusion.checkpoint.resume import resume
from transfusion.checkpoint.save import save
from transfusion.errors import UserError
from transfusion.parallel.environment import Environment
from transfusion.parallel.local import LocalEngine
from transfusion.parallel.zero import ZeroEngine
from transfusion.schema import TrainState

ALONE = Environment(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"), threads=1)


def engine(**changes: Any) -> LocalEngine:
    return LocalEngine(
        small_config(**({"optimizer__name": "muon", "optimizer__ema_decay": 0.5} | changes)), ALONE
    )


def test_matrices_of_blocks_go_by_muon_and_all_else_by_adamw() -> None:
    mixed, plain = engine(), engine(optimizer__name="adamw")
    before = {name: master.detach().clone() for name, master in mixed.masters.items()}
    for each in (mixed, plain):
        train_step(each, [make_batch("mixed", 0)], learning_rate=1e-2)
    for name, master in mixed.masters.items():
        same = torch.equal(master, plain.masters[name])
        assert same != (name.startswith("blocks.") and master.dim() == 2), name
    # An update is orthogonal but for what Newton and Schulz leave, and as large as one of AdamW.
    name = "blocks.0.attention.query.weight"
    decayed = before[name] * (1 - 1e-2 * mixed.config.optimizer.weight_decay)
    update = (mixed.masters[name].detach() - decayed) / 1e-2
    values = torch.linalg.svdvals(update) / (0.2 * max(update.shape) ** 0.5)
    # A gradient of few rows has few directions.
    assert values.median() > 0.5 and values.max() < 1.3
    assert update.square().mean().sqrt() == pytest.approx(0.2, rel=0.2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_goes_on_to_the_bit(tmp_path: Path, precision: str) -> None:
    first, again = engine(train__precision=precision), engine(train__precision=precision, run__seed=5)
    for step in range(2):
        train_step(first, [make_batch("mixed", step)])
    save(tmp_path, first, TrainState(step=2), keep=1)
    assert resume(tmp_path, again) is not None
    for each in (first, again):
        train_step(each, [make_batch("mixed", 9)])
    state = state_of(first)
    assert not any(name.startswith("exp_avg_sq/blocks.0.attention.query") for name in state)
    for name, value in state.items():
        assert torch.equal(state_of(again)[name], value), name
    with pytest.raises(
        UserError, match=r"has the state of optimizer\.name=muon, which means nothing to adamw"
    ):
        resume(tmp_path, engine(optimizer__name="adamw"))


def test_slices_of_matrices_are_refused() -> None:
    with pytest.raises(UserError, match=r"muon works on whole matrices.*train\.engine=local"):
        ZeroEngine(small_config(optimizer__name="muon"), ALONE)
