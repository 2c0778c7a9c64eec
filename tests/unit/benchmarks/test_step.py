"""The step benchmark on the CPU: valid batches, honest counts, and no figure of a step that did not train."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import step
from limits import DTYPES
from transfusion.config import Config, load_config
from transfusion.families.build import build_model
from transfusion.model.initialise import initialise

CPU = torch.device("cpu")


def tiny(*overrides: str) -> Config:
    return step.config_of(list(overrides), CPU)


def test_a_tiny_step() -> None:
    result = step.measure_step(tiny("data.micro_batch_size=2"), steps=3, warm_up=1, seconds=1.0)
    assert json.loads(json.dumps(result)) == result
    assert result["engine"] == "LocalEngine" and result["micro_batches"] == 2
    assert result["steps_timed"] == 3 and result["step_ms"] > 0 and result["peak_gib"] > 0
    assert result["tokens_per_second"] == pytest.approx(result["tokens"] / result["step_ms"] * 1e3)
    assert result["rates"].keys() == {"exact", "hardware", "palm"} <= step.FORMULAS.keys()
    peak = result["limits"]["gemm_tflops"]["fp32"]
    for rate in result["rates"].values():
        assert rate["tflops"] == pytest.approx(rate["tflop"] / result["step_ms"] * 1e3)
        assert rate["share"] == pytest.approx(rate["tflops"] / peak)
        assert rate["mfu"] is None, "nobody publishes a peak of this machine"
    assert "tokens/s" in step.summary(result)


def test_a_step_that_did_not_train_is_not_timed() -> None:
    with pytest.raises(step.BadStep):
        step.measure_step(tiny("optimizer.learning_rate=1e30"), steps=3, warm_up=2, seconds=1.0)


def test_weights_drawn_on_the_device_are_as_large_as_those_of_a_training() -> None:
    config = tiny("model.hidden_size=128")
    drawn, trained = build_model(config), build_model(config)
    step.draw_weights(drawn, seed=0, layers=2)
    initialise(trained, seed=0, layers=2)
    for (name, ours), theirs in zip(drawn.named_parameters(), trained.parameters(), strict=True):
        if ours.numel() > 100:
            sizes = [float(weight.detach().square().mean().sqrt()) for weight in (ours, theirs)]
            assert sizes[0] == pytest.approx(sizes[1], rel=0.1), name


def test_a_network_made_on_the_device_trains() -> None:
    with step.weights_drawn_on(CPU):
        result = step.measure_step(tiny(), steps=1, warm_up=1, seconds=0.1)
    assert result["steps_timed"] >= 1


@pytest.mark.parametrize("name", ["0.76b", "1.4b"])
def test_the_presets_are_the_papers_sizes_and_need_no_codec(name: str) -> None:
    configs = Path(__file__).parents[3] / "configs"
    preset = step.config_of([str(configs / f"benchmark/{name}.yaml")], CPU)
    paper = load_config(configs / f"train/{name}.yaml", reads_codec=False)
    assert preset.model == paper.model and preset.patches_per_image == paper.patches_per_image
    assert preset.data.sequence_length == paper.data.sequence_length
    assert (preset.train.engine, preset.train.compile, preset.train.precision) == ("local", True, "bf16")


def test_batches_are_valid_and_mixed() -> None:
    config = tiny("data.sequence_length=512", "model.position=2d")
    batches = [batch for micro_batches in step.synthetic_steps(config, 3) for batch in micro_batches]
    assert len(batches) == 3
    for batch in batches:
        batch.mask.validate()
        assert batch.token_ids_BS.shape == (4, 512) and batch.position_BSA.shape == (4, 512, 3)
        assert int(batch.token_ids_BS.max()) < config.model.vocabulary
        assert batch.counts.faults == 0 and batch.counts.images > 0 and batch.counts.text_targets > 0
        assert batch.counts.padding < 0.1 * batch.counts.tokens


def test_ranks_share_a_step() -> None:
    config = tiny()
    (whole,) = step.synthetic_steps(config, 1)[0]
    (first,), (second,) = (step.synthetic_steps(config, 1, rank, 2)[0] for rank in range(2))
    assert torch.equal(first.token_ids_BS, whole.token_ids_BS[::2])
    assert torch.equal(second.token_ids_BS, whole.token_ids_BS[1::2])


def test_the_gpu_default_is_the_papers_smallest() -> None:
    config = step.config_of([], torch.device("cuda"))
    assert (config.model.layers, config.model.hidden_size, config.model.vocabulary) == (16, 768, 32_000)
    assert config.train.precision in DTYPES and config.patches_per_image == 256
    assert step.config_of(["model.vocabulary=1000"], torch.device("cuda")).model.vocabulary == 1000
