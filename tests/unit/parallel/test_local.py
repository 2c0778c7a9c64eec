"""The plain engine: what it computes, what it refuses, and that evaluation leaves no trace."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from handmade import (
    HostReads,
    counts_of,
    join_rows,
    make_batch,
    same_state,
    small_config,
    state_of,
    train_step,
    with_broken_image,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from transfusion.errors import UserError
from transfusion.families.build import build_model
from transfusion.losses.loss import training_loss
from transfusion.losses.transfusion import TransfusionLoss
from transfusion.model.initialise import initialise
from transfusion.optim import groups
from transfusion.parallel.build import build_engine
from transfusion.parallel.collectives import global_counts
from transfusion.parallel.environment import Environment
from transfusion.parallel.local import LocalEngine
from transfusion_kernels import dispatch

ALONE = Environment(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"), threads=1)
ON_GPU = Environment(rank=0, local_rank=0, world_size=1, device=torch.device("cuda", 0), threads=1)


def test_three_steps_equal_a_loop_written_out() -> None:
    """Decay of matrices only, clipping, the rate of each step: AdamW by hand on the summed loss."""
    config = small_config(optimizer__gradient_clip=0.5, optimizer__weight_decay=0.3)
    engine = LocalEngine(config, ALONE)
    model = build_model(config)
    initialise(model, seed=config.run.seed, layers=config.model.layers)
    loss = TransfusionLoss(config.diffusion)
    moments = {name: [torch.zeros_like(p), torch.zeros_like(p)] for name, p in model.named_parameters()}
    for step, rate in enumerate((1e-3, 3e-3, 2e-3), start=1):
        batches = [make_batch("mixed", step), make_batch("text", 10 + step)]
        _, result = train_step(engine, batches, rate)
        counts = counts_of(batches)
        terms = [loss.terms(model, batch) for batch in batches]
        model.zero_grad()
        (loss.combine(terms[0], counts) + loss.combine(terms[1], counts)).backward()
        norm = torch.sqrt(sum(p.grad.square().sum() for p in model.parameters()))
        assert result.gradient_norm == pytest.approx(norm.item(), rel=1e-6)
        assert norm > 0.5
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                gradient = parameter.grad * (0.5 / norm)
                first, second = moments[name]
                first.lerp_(gradient, 0.1)
                second.lerp_(gradient.square(), 0.05)
                update = (first / (1 - 0.9**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
                decay = 0.3 if parameter.dim() > 1 else 0.0
                parameter.sub_(rate * (update + decay * parameter))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(engine.masters[name], parameter, rtol=1e-4, atol=1e-6)


def test_micro_batches_give_the_gradient_of_the_joined_batch() -> None:
    apart, joined = (LocalEngine(small_config(), ALONE) for _ in range(2))
    rows = [make_batch("image", 1, 1), make_batch("text", 2, 1)]
    train_step(apart, rows)
    train_step(joined, [join_rows(*rows)])
    for name, master in apart.masters.items():
        torch.testing.assert_close(master, joined.masters[name], rtol=1e-5, atol=1e-7)


def test_counts_are_those_of_the_batches() -> None:
    batches = [make_batch("mixed", 1), make_batch("text", 2), make_batch("image", 3)]
    loss = LocalEngine(small_config(), ALONE).loss
    assert [count.item() for count in global_counts(batches, loss).values()] == [
        count.item() for count in counts_of(batches).values()
    ]
    assert global_counts(batches, loss)["text"].item() > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_broken_image_skips_the_step(precision: str) -> None:
    engine = LocalEngine(small_config(train__precision=precision, optimizer__ema_decay=0.5), ALONE)
    train_step(engine, [make_batch("mixed", 0)])
    before = state_of(engine)
    _, result = train_step(engine, [make_batch("mixed", 1), with_broken_image(make_batch("mixed", 2))])
    assert result.skipped
    assert result.gradient_norm == float("inf")
    assert same_state(before, state_of(engine))
    assert engine.updates == 1
    _, result = train_step(engine, [make_batch("mixed", 3)])
    assert not result.skipped


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_fused_optimiser_asks_the_host_nothing(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU has it, which clips, skips and averages by itself: it learns what the other learns, to rounding."""
    config = small_config(train__precision=precision, optimizer__ema_decay=0.5, optimizer__gradient_clip=0.5)
    asking = LocalEngine(config, ALONE)
    monkeypatch.setattr(groups, "runs_fused", lambda device: True)
    fused = LocalEngine(config, ALONE)
    places: list[str] = []
    for step in range(4):
        batch = make_batch("mixed", step)
        with HostReads() as reads:
            fused.forward_backward(batch, global_counts([batch], fused.loss))
            pending = fused.step(1e-3)
        places += reads.places
        _, wanted = train_step(asking, [batch])
        assert pending.read().gradient_norm == pytest.approx(wanted.gradient_norm, rel=2e-3)
        assert pending.read().gradient_norm > 0.5
    assert places == []
    before, expected = state_of(fused), state_of(asking)
    largest = 1e-6 if precision == "fp32" else 2e-3
    assert max(float((before[key] - expected[key]).abs().max()) for key in before) < largest
    with HostReads() as reads:
        train_step(asking, [batch])
    assert reads.places != []
    _, broken = train_step(fused, [with_broken_image(make_batch("mixed", 2))])
    fused.forward_backward(batch, global_counts([batch], fused.loss))
    too_large = fused.step(1e-3, max_norm=0.5).read()
    assert broken.skipped and broken.gradient_norm == float("inf")
    assert too_large.skipped and too_large.gradient_norm > 0.5
    assert same_state(before, state_of(fused))
    assert fused.updates == 4


def test_a_loss_that_overflows_makes_its_gradient_nan() -> None:
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    training_loss(weight.sum()).backward()
    assert weight.grad is not None and weight.grad.tolist() == [1.0, 1.0]
    weight.grad = None
    overflowing = weight.sum() + torch.tensor(torch.inf)
    training_loss(overflowing).backward()
    assert weight.grad is not None and weight.grad.isnan().all()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_evaluation_swaps_the_average_in_and_out(precision: str) -> None:
    engine = LocalEngine(small_config(train__precision=precision, optimizer__ema_decay=0.5), ALONE)
    for step in range(2):
        train_step(engine, [make_batch("mixed", step)], 1e-2)
    before = state_of(engine)
    weights = {name: parameter.clone() for name, parameter in engine.model.named_parameters()}
    with engine.evaluation("ema") as model:
        assert not model.training
        assert not torch.is_grad_enabled()
        for name, parameter in model.named_parameters():
            average = before[f"ema/{name}"].view_as(parameter)
            assert torch.equal(parameter, average.to(parameter.dtype))
    assert engine.model.training
    assert same_state(before, state_of(engine))
    assert all(torch.equal(parameter, weights[name]) for name, parameter in engine.model.named_parameters())


def test_the_average_comes_back_after_an_error() -> None:
    engine = LocalEngine(small_config(optimizer__ema_decay=0.5), ALONE)
    train_step(engine, [make_batch("mixed", 0)])
    before = state_of(engine)
    with pytest.raises(ZeroDivisionError), engine.evaluation("ema"):
        raise ZeroDivisionError
    assert same_state(before, state_of(engine))


def test_without_an_average_there_is_none_to_evaluate() -> None:
    engine = LocalEngine(small_config(), ALONE)
    with pytest.raises(UserError, match=r"set optimizer\.ema_decay"), engine.evaluation("ema"):
        pass


def test_weights_depend_on_the_seed_alone() -> None:
    first, second, other = (LocalEngine(small_config(run__seed=seed), ALONE) for seed in (1, 1, 2))
    assert same_state(state_of(first), state_of(second))
    assert not same_state(state_of(first), state_of(other))


def test_bf16_keeps_unrounded_weights() -> None:
    engine = LocalEngine(small_config(train__precision="bf16"), ALONE)
    train_step(engine, [make_batch("mixed", 0)])
    for name, parameter in engine.model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert engine.masters[name].dtype == torch.float32
        assert torch.equal(parameter, engine.masters[name].bfloat16())
    assert any(not torch.equal(m, m.bfloat16().float()) for m in engine.masters.values())


def test_which_engine_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(build_engine(small_config(), ALONE), LocalEngine)
    two = Environment(rank=0, local_rank=0, world_size=2, device=torch.device("cpu"), threads=1)
    with pytest.raises(UserError, match=r"train\.engine=local runs in one process, but 2 were started"):
        build_engine(small_config(train__engine="local"), two)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=r"train\.engine=zero needs DeepSpeed .* pip install"):
        build_engine(small_config(train__engine="zero"), ALONE)


@pytest.mark.parametrize("backend", ["triton", "cpu"])
def test_an_attention_that_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
    here = ALONE if backend == "triton" else ON_GPU
    with (
        FakeTensorMode(),
        pytest.raises(UserError, match=rf"train\.attention={backend} cannot run on .*=auto"),
    ):
        build_engine(small_config(train__attention=backend), here)


def test_triton_needs_a_gpu() -> None:
    pytest.importorskip("triton")
    with pytest.raises(UserError, match=r"train\.attention=triton cannot run on cpu"):
        build_engine(small_config(train__attention="triton"), ALONE)


def test_a_gpu_never_falls_back_to_the_dense_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Head width 48 has no kernel; only a reference that was asked for may run."""
    monkeypatch.setattr(dispatch, "_has_triton", lambda: True)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    widths = re.escape(str(dispatch.TRITON_HEAD_DIMS))
    with FakeTensorMode():
        with pytest.raises(
            UserError, match=rf"head_dim is 48, they take {widths}; .*model\.hidden_size 96 / model\.heads 2"
        ):
            build_engine(small_config(model__hidden_size=96), ON_GPU)
        # Refused only for want of DeepSpeed, which comes after.
        for changes in (
            {"model__hidden_size": 96, "train__attention": "reference"},
            {"model__hidden_size": 64},
        ):
            with pytest.raises(UserError, match="needs DeepSpeed"):
                build_engine(small_config(**changes), ON_GPU)
        monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "reference")
        with pytest.raises(UserError, match="needs DeepSpeed"):
            build_engine(small_config(model__hidden_size=96), ON_GPU)


def test_the_vocabulary_must_be_known() -> None:
    with pytest.raises(ValueError, match=r"model\.vocabulary"):
        build_model(small_config(model__vocabulary=0))
