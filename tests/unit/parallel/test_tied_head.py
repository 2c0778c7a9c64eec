"""A text head that is the embedding's own weight: one parameter everywhere, with the gradient of both uses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import make_batch, small_config, state_of, train_step
from safetensors.torch import load_file

from transfusion.checkpoint.export import WEIGHT_FILES
from transfusion.checkpoint.resume import load
from transfusion.checkpoint.save import save
from transfusion.config import Config
from transfusion.families.build import build_model, count_parameters
from transfusion.generate import Pipeline
from transfusion.model import Transfusion
from transfusion.observe.flops import FlopModel
from transfusion.parallel.environment import Environment
from transfusion.parallel.local import LocalEngine
from transfusion.plan.prediction import make_plan
from transfusion.schema import TrainState
from transfusion.sequence.tokenizer import Tokenizer

from ..conftest import write_export

ALONE = Environment(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"), threads=1)
CHAMELEON = {
    "model__family": "chameleon", "model__patch_size": 1, "codec__kind": "vq", "codec__folder": "codec",
    "codec__channels": 3, "codec__image_size": 4, "codec__latent_channels": 2, "codec__downscale": 2,
    "codec__codebook_size": 16, "codec__scale": [1.0], "codec__shift": [0.0],
}  # fmt: skip


@pytest.mark.parametrize("family", [{}, CHAMELEON])
def test_it_is_one_parameter(family: dict[str, Any]) -> None:
    tied, apart = (build_model(small_config(model__tie_embeddings=tied, **family)) for tied in (True, False))
    assert tied.lm_head.weight is tied.embedding.weight
    assert (
        {*dict(apart.named_parameters())} - {*dict(tied.named_parameters())}
        == {*apart.state_dict()} - {*tied.state_dict()}
        == {"lm_head.weight"}
    )
    tied.load_state_dict(tied.state_dict())
    tied.to(torch.bfloat16)
    assert tied.lm_head.weight is tied.embedding.weight


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_its_gradient_is_that_of_both_uses(precision: str) -> None:
    batch = make_batch("mixed", 0)
    gradients = []
    for tied in (True, False):
        engine = LocalEngine(small_config(model__tie_embeddings=tied, train__precision=precision), ALONE)
        with torch.no_grad():
            engine.model.lm_head.weight.copy_(engine.model.embedding.weight)
        terms = engine.loss.terms(engine.model, batch)
        engine.loss.combine(terms, terms.counts).backward()
        gradients.append(
            sum(
                engine.model.get_parameter(f"{name}.weight").grad.float()
                for name in (("embedding",) if tied else ("embedding", "lm_head"))
            )
        )
    tolerance = 1e-6 if precision == "fp32" else 1e-2
    assert (gradients[0] - gradients[1]).norm() <= tolerance * gradients[1].norm()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_is_saved_and_loaded_once(tmp_path: Path, precision: str) -> None:
    config = small_config(model__tie_embeddings=True, train__precision=precision, optimizer__ema_decay=0.5)
    engine, again = LocalEngine(config, ALONE), LocalEngine(config, ALONE)
    train_step(engine, [make_batch("mixed", 0)])
    assert engine.model.lm_head.weight is engine.model.embedding.weight
    load(save(tmp_path, engine, TrainState(step=1), keep=1), again)
    outcome = [train_step(each, [make_batch("text", 1)])[1].gradient_norm for each in (engine, again)]
    assert outcome[0] == outcome[1]
    assert all(torch.equal(value, state_of(again)[name]) for name, value in state_of(engine).items())
    assert "lm_head.weight" not in engine.masters


def test_it_is_counted_once_and_multiplies_as_often() -> None:
    tied, apart = (small_config(model__tie_embeddings=tied) for tied in (True, False))
    parts, others = (count_parameters(each.model, each.codec) for each in (tied, apart))
    assert parts["lm_head"] == 0 and others["total"] - parts["total"] == others["lm_head"]
    assert sum(parts.values()) == 2 * parts["total"]
    batch = make_batch("mixed", 0)
    assert FlopModel(tied).of([batch]) == FlopModel(apart).of([batch])


@pytest.mark.parametrize("gpus", [1, 8])
def test_a_plan_has_it_once_in_memory(gpus: int) -> None:
    more = {
        "model__vocabulary": 4096,
        "data__global_batch_size": 8,
        "train__zero": {"persistence_threshold": 0},
    }
    tied, apart = (
        make_plan(small_config(model__tie_embeddings=tied, **more), gpus) for tied in (True, False)
    )
    head = 4096 * 32
    assert apart.network.elements - tied.network.elements == head == apart.network.parts["lm_head"]
    assert tied.memory.parameters < apart.memory.parameters
    assert tied.memory.optimizer < apart.memory.optimizer
    # Gathered for both uses, and reduced once.
    assert tied.communication.gathered == apart.communication.gathered
    assert gpus == 1 or tied.communication.reduced < apart.communication.reduced


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_an_export_opens_in_each_precision(
    tmp_path: Path,
    dtype: Any,
    build_model: Callable[..., tuple[Config, Transfusion]],
    tokenizer: Tokenizer,
) -> None:
    config, model = build_model(hidden_size=64, tie_embeddings=True)
    write_export(tmp_path, config.as_dict(), tokenizer, model)
    assert "lm_head.weight" not in load_file(tmp_path / WEIGHT_FILES["weight"])
    pipeline = Pipeline.from_export(tmp_path, device="cpu", dtype=dtype)
    loaded = pipeline.runner.model
    names = {name for name, _ in (*loaded.named_parameters(), *loaded.named_buffers())}
    assert not any(name.startswith("lm_head") for name in names)
    state_RD = torch.randn(3, 64)
    found = pipeline.runner.logits(state_RD.to(torch.bfloat16 if dtype == "bfloat16" else torch.float32))
    exact = state_RD @ model.embedding.weight.detach().T
    assert (found - exact).norm() <= {"float32": 1e-6, "bfloat16": 2e-2, "int8": 2e-2}[dtype] * exact.norm()
    assert pipeline.sample(["a handwritten three"], steps=2, guidance=1.0)
    nats = loaded.lm_head(state_RD.to(found.dtype), torch.tensor([1, 2, 3])) if dtype != "bfloat16" else None
    assert nats is None or nats.isfinite()
