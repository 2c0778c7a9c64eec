"""Muon for the matrices of the blocks: as torch's own, on any slices, through checkpoints. Ranks: tests/dist."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import make_batch, small_config, state_of, train_step
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from transfusion.checkpoint.resume import resume
from transfusion.checkpoint.save import save
from transfusion.config import OptimizerConfig
from transfusion.errors import UserError
from transfusion.optim import groups
from transfusion.parallel import muon
from transfusion.parallel.environment import Environment
from transfusion.parallel.local import LocalEngine
from transfusion.parallel.module_norms import FlatSlice
from transfusion.parallel.muon import Muon, muon_operations, orthogonal
from transfusion.schema import TrainState

ALONE = Environment(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"), threads=1)


class HeldBytes(TorchDispatchMode):
    """The most that tensors held at once that were made meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.most, self._held = 0, weakref.WeakSet[Any]()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {each.untyped_storage().data_ptr() for each in args if isinstance(each, torch.Tensor)}
        made = operator(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in given:
            self._held.add(made.untyped_storage())
        self.most = max(self.most, sum(storage.nbytes() for storage in self._held))
        return made


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


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)])
def test_updates_are_those_of_torch(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    start, *gradients = torch.randn(4, *shape, generator=generator)
    config = OptimizerConfig(name="muon")
    ours, theirs = (nn.Parameter(start.clone()) for _ in range(2))
    adamw = groups.adamw([{"params": [ours], "weight_decay": 0.1}], config, fused=False)
    groups.create_moments(adamw, [ours])
    places = {"matrix": FlatSlice(0, 0, 0, ours.numel())}
    Muon(adamw, [ours], [places], {"matrix": shape}, rank=0, dtype=torch.bfloat16)
    muon = torch.optim.Muon([theirs], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    groups.set_learning_rate(adamw, 1e-2)
    for gradient in gradients:
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        adamw.step()
        muon.step()
        assert torch.equal(ours.grad, gradient), "whoever keeps gradients finds them again"
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert (ours - start).abs().max() > 1e-2 and "exp_avg_sq" not in adamw.state[ours]


@pytest.mark.parametrize("skip", [False, True])
def test_what_a_fused_adamw_would_skip_or_scale_is_skipped_and_scaled(skip: bool) -> None:
    start = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    results = []
    for gradient, told in ((start.sin(), None), (start.sin() * 4, 4.0)):
        matrix = nn.Parameter(start.clone())
        adamw = groups.adamw(
            [{"params": [matrix], "weight_decay": 0.1}], OptimizerConfig(), fused=told is not None
        )
        groups.create_moments(adamw, [matrix])
        Muon(adamw, [matrix], [{"m": FlatSlice(0, 0, 0, 24)}], {"m": (4, 6)}, rank=0, dtype=torch.float32)
        matrix.grad = gradient
        if told:
            adamw.found_inf, adamw.grad_scale = torch.tensor(float(skip)), torch.tensor(told)  # type: ignore[attr-defined]
            matrix.grad[0, 0] = float("nan") if skip else matrix.grad[0, 0]
        adamw.step()
        results.append((matrix.detach(), adamw.state[matrix]))
    (plain, _), (other, state) = results
    torch.testing.assert_close(other, start if skip else plain, rtol=0, atol=0 if skip else 1e-6)
    assert float(state["step"]) == (0 if skip else 1)
    assert torch.count_nonzero(state["exp_avg"]) == (0 if skip else 24)


def test_a_fused_step_needs_two_copies_of_the_matrices_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "SHARE", 64)
    flat = nn.Parameter(torch.ones(6400))
    adamw = groups.adamw([{"params": [flat]}], OptimizerConfig(), fused=True)
    groups.create_moments(adamw, [flat])
    places = {f"{number:03}": FlatSlice(0, 64 * number, 0, 64) for number in range(100)}
    shapes = dict.fromkeys(places, (8, 8))
    stepping = Muon(adamw, [flat], [places], shapes, rank=0, dtype=torch.float32)
    flat.grad = torch.ones(6400)
    adamw.found_inf, adamw.grad_scale = torch.tensor(0.0), torch.tensor(2.0)  # type: ignore[attr-defined]
    with HeldBytes() as held:
        stepping._step(adamw)
    copies = held.most / (flat.numel() * flat.element_size())
    assert copies < 2.5


def test_slices_that_leave_a_gap_are_no_matrix() -> None:
    adamw = groups.adamw([{"params": [nn.Parameter(torch.zeros(10))]}], OptimizerConfig(), fused=False)
    slices = [{"m": FlatSlice(0, 0, 0, 10)}, {"m": FlatSlice(0, 0, 12, 12)}]
    with pytest.raises(RuntimeError, match="do not make up its 24 elements"):
        Muon(adamw, [torch.zeros(10)], slices, {"m": (4, 6)}, rank=0, dtype=torch.float32)


def test_large_networks_are_exchanged_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = engine(), engine()
    monkeypatch.setattr(muon, "SHARE", 500)
    small = engine()
    for each in (whole, small):
        train_step(each, [make_batch("mixed", 0)])
    for name, master in whole.masters.items():
        assert torch.equal(master, small.masters[name]) and not torch.equal(master, parts.masters[name]), name
    matrices = [muon._Matrix((20, 20), 0, 400 * number, (400,)) for number in range(4)]
    assert [len(part) for part in muon._chunks(matrices)] == [1, 1, 1, 1]
    monkeypatch.setattr(muon, "SHARE", 900)
    assert [len(part) for part in muon._chunks(matrices)] == [2, 2]


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 40)])
def test_its_products_are_counted(shape: tuple[int, int]) -> None:
    with FlopCounterMode(display=False) as counter:
        orthogonal(torch.randn(shape), torch.float32)
    assert muon_operations(*shape) == counter.get_total_flops()
