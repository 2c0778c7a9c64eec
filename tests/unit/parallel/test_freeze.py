"""Text that is frozen: the same logits to the bit, no optimiser's state, and checkpoints with and without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import make_batch, small_config, state_of, train_step

from transfusion.checkpoint import layout
from transfusion.checkpoint.resume import SliceReader, resume
from transfusion.checkpoint.save import save
from transfusion.config import load_config
from transfusion.errors import UserError
from transfusion.model.backbone import is_of_text
from transfusion.parallel.environment import Environment
from transfusion.parallel.local import LocalEngine
from transfusion.parallel.parameter_shards import AVERAGE, FIRST_MOMENT, WEIGHT
from transfusion.schema import TrainState

ALONE = Environment(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"), threads=1)


def engine(**changes: Any) -> LocalEngine:
    settings = {"model__modality_weights": "all", "train__freeze": ["text"], "optimizer__ema_decay": 0.5}
    return LocalEngine(small_config(**(settings | changes)), ALONE)


@torch.no_grad()
def logits(engine: LocalEngine) -> torch.Tensor:
    """Of rows of text alone."""
    model, batch = engine.model, make_batch("text", 3)
    hidden = model.embedding(batch.token_ids_BS)
    hidden = model.run_blocks(hidden, batch.position_BSA, batch.mask, grouping=model.grouping_of(batch))
    return model.lm_head(model.norm(hidden))


@pytest.mark.parametrize(("weights", "tied"), [("ffn", False), ("all", False), ("all", True)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_text_stays_as_it_is_and_images_are_learned(weights: str, tied: bool, precision: str) -> None:
    frozen = engine(model__modality_weights=weights, model__tie_embeddings=tied, train__precision=precision)
    before, images = logits(frozen), []
    for step in range(6):
        terms, _ = train_step(frozen, [make_batch("mixed", step % 2)])
        images.append(float(terms.sums["image"] / terms.counts["image"]))
    assert torch.equal(logits(frozen), before)
    assert images[4] < images[0]
    trained = {id(parameter) for group in frozen.optimizer.param_groups for parameter in group["params"]}
    assert len(trained) == len(frozen.optimizer.state) == len(frozen.trained)
    names = {name for name, _ in frozen.model.named_parameters()}
    assert {name for name in names if is_of_text(name)} == names - {*frozen.trained}
    # Text behind an image teaches what the image says of itself.
    assert all(
        parameter.grad is None for name, parameter in frozen.model.named_parameters() if is_of_text(name)
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_goes_on_and_text_may_be_thawed(tmp_path: Path, precision: str) -> None:
    first = engine(train__precision=precision)
    train_step(first, [make_batch("mixed", 0)])
    folder = save(tmp_path, first, TrainState(step=1), keep=1)
    manifest = layout.read_manifest(folder)
    assert "embedding.weight" in manifest.frozen and "patch_encoder.projection.weight" not in manifest.frozen
    reader = SliceReader(folder, manifest)
    weight = reader.read_whole(WEIGHT, "embedding.weight")
    assert torch.equal(reader.read_whole(AVERAGE, "embedding.weight"), weight)
    assert not reader.read_whole(FIRST_MOMENT, "embedding.weight").any()
    again = engine(train__precision=precision, run__seed=9)
    state = resume(tmp_path, again)
    assert state is not None and state.step == 1
    for name, value in state_of(first).items():
        assert torch.equal(state_of(again)[name], value), name
    thawed = engine(train__precision=precision, train__freeze=[])
    resume(tmp_path, thawed)
    assert torch.equal(thawed.masters["embedding.weight"].detach(), weight)
    train_step(thawed, [make_batch("mixed", 1)])
    assert not torch.equal(thawed.masters["embedding.weight"].detach(), weight)
    # And frozen again, with what was learned.
    save(tmp_path, thawed, TrainState(step=2), keep=1)
    resume(tmp_path, again)
    frozen = again.masters["embedding.weight"].detach()
    assert torch.equal(frozen, thawed.masters["embedding.weight"].detach())
    assert torch.equal(again.model.embedding.weight, frozen.to(again.model.embedding.weight.dtype))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], r"train\.freeze=\[text\] leaves patches nothing to learn with; set model\.modality_weights=all"),
        (["model.modality_weights=all", "train.zero.stage=2"], r"needs train\.zero\.stage=3"),
        (
            ["model.modality_weights=all", "train.zero.offload_parameters=cpu"],
            r"needs train\.zero\.offload_parameters=none",
        ),
        (["train.freeze=[image]"], r"train\.freeze"),
        (["model.family=chameleon"], r"is for model\.family=transfusion"),
    ],
)
def test_what_cannot_be_frozen_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(None, ["train.freeze=[text]", *overrides])
