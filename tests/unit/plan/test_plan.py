"""The plan: every part adds up, what does not fit is told with what mends it, and what mends it does."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from transfusion.cli.main import app
from transfusion.config import Config, load_config
from transfusion.errors import UserError
from transfusion.plan import Plan, make_plan, report, warnings
from transfusion.plan.advice import applied, suggest_speedups, to_fit
from transfusion.plan.communication import count_reductions
from transfusion.plan.machines import GPUS
from transfusion.plan.workload import DocumentMix
from transfusion.sequence.tokenizer import Tokenizer

CONFIGS = Path(__file__).parents[3] / "configs" / "train"


def config_of(name: str, *overrides: str) -> Config:
    return load_config(CONFIGS / f"{name}.yaml", overrides, reads_codec=False)


@pytest.fixture(scope="module")
def large() -> Plan:
    """7B on 8 GPUs with micro-batches that do not fit."""
    return make_plan(config_of("7b", "data.micro_batch_size=8"), 8, "h100")


def test_a_plan_that_does_not_fit_is_told_with_a_setting_that_mends_it(large: Plan) -> None:
    (warning,) = warnings(large)
    advice = to_fit(large)
    assert not large.fits and advice is not None and str(advice) in warning
    again = make_plan(applied(large.config, advice.settings), 8, "h100")
    assert again.fits and again.memory == advice.plan.memory
    assert f"warning: {warning}" in report(large)


def test_what_one_setting_does_not_mend_several_do_or_more_gpus() -> None:
    plan = make_plan(config_of("7b", "data.micro_batch_size=8", "data.global_batch_size=1024"), 1, "a100")
    advice = to_fit(plan)
    assert advice is not None and advice.plan.fits and len(advice.settings) > 1
    for setting in advice.settings:
        fewer = [other for other in advice.settings if other != setting and "=" in other]
        gpus = advice.plan.division.gpus if not setting.startswith("--gpus") else 1
        assert not make_plan(applied(plan.config, fewer), gpus, "a100").fits, f"{setting} is not needed"


def test_what_would_be_faster_is_faster(large: Plan) -> None:
    plan = make_plan(config_of("0.16b", "train.compile=false"), 8)
    (warning,) = warnings(plan)
    best = suggest_speedups(plan)[0]
    assert str(best) in warning and best.plan.fits
    assert best.plan.tokens_per_second >= 1.05 * plan.tokens_per_second


def test_parts_add_up(large: Plan) -> None:
    told = json.loads(json.dumps(large.as_dict()))
    memory = told["memory_bytes"]
    kinds = ("parameters", "gradients", "optimizer", "activations", "logits", "gathers")
    assert memory["total"] == sum(memory[kind] for kind in kinds)
    parts = dict(told["parameters"])
    assert parts.pop("total") == sum(parts.values()) == large.network.elements
    seconds = dict(told["seconds_of_a_step"])
    total = seconds.pop("total")
    assert total == pytest.approx(sum(seconds.values()))
    assert told["hours"] == pytest.approx(total * 250_000 / 3600)
    assert told["gpu_hours"] == pytest.approx(8 * told["hours"])
    assert told["tokens_per_second"] == pytest.approx(2**21 / total)
    assert told["operations_of_a_step"]["palm"] > told["operations_of_a_step"]["exact"]


def test_half_of_the_tokens_are_pairs() -> None:
    config = config_of("0.16b")
    load = DocumentMix().workload(config, rows=8)
    pair = 256 + 32 + 4
    (images,) = load.images
    assert images.real == round(8 * 4096 / 2 / pair) and images.shape == (8, 32, 32)
    text = 8 * 4096 - images.real * pair
    assert load.pairs == pytest.approx(
        text / 1024 * 1024 * 1025 / 2 + images.real * (pair * (pair + 1) / 2 + 256 * 255 / 2), rel=1e-6
    )


def test_the_vocabulary_is_that_of_the_tokenizer_or_told_to_be_assumed(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    config = config_of("quickstart", "data.tokenizer=", "train.engine=local")
    told = report(make_plan(config, 1))
    assert "with a vocabulary of 32,000, which is assumed: there is no tokenizer yet" in told
    data = config.data.model_copy(update={"tokenizer": str(tokenizer.path)})
    known = make_plan(config.model_copy(update={"data": data}), 1)
    assert known.network.parts["embedding"] == tokenizer.vocabulary * config.model.hidden_size
    assert f"with a vocabulary of {tokenizer.vocabulary:,}\n" in report(known)
    assert known.as_dict()["vocabulary"] == tokenizer.vocabulary
    (tmp_path / "no.model").write_text("no tokenizer")
    with pytest.raises(UserError, match="no\\.model"):
        broken = config.data.model_copy(update={"tokenizer": str(tmp_path / "no.model")})
        make_plan(config.model_copy(update={"data": broken}), 1)


def test_images_of_several_sizes_are_counted_each_as_what_it_is() -> None:
    """As many of each size; patches, pairs that see each other, and memory follow from the shapes."""
    sizes = "codec.image_sizes=[256x256,256x384,384x256]"
    load = DocumentMix().workload(config_of("0.16b", sizes), rows=8)
    assert [each.shape for each in load.images] == [(8, 32, 32), (8, 32, 48), (8, 48, 32)]
    counts = [each.real for each in load.images]
    pairs = [patches + 32 + 4 for patches in (256, 384, 384)]
    assert max(counts) - min(counts) <= 1 and sum(counts) == round(3 * 8 * 4096 / 2 / sum(pairs))
    inside = sum(count * pair for count, pair in zip(counts, pairs, strict=True))
    seen = sum(
        count * (pair * (pair + 1) / 2 + (pair - 36) * (pair - 37) / 2)
        for count, pair in zip(counts, pairs, strict=True)
    )
    assert load.pairs == pytest.approx((8 * 4096 - inside) * 1025 / 2 + seen, rel=1e-6)
    one, several = (
        make_plan(config_of("0.16b", "model.vocabulary=0", *words), 8) for words in ((), (sizes,))
    )
    assert several.config.model.vocabulary == one.config.model.vocabulary + 2
    assert several.memory != one.memory and several.fits


@pytest.mark.parametrize(
    ("setting", "less", "more"),
    [
        ("train.activation_checkpointing=block", "activations", "products"),
        ("train.activation_checkpointing=attention", "activations", "products"),
        ("data.micro_batch_size=1", "activations", "exposed"),
        ("train.zero.offload_optimizer=cpu", "optimizer", "optimizer"),
        ("train.sequence_parallel=2", "activations", "exposed"),
    ],
)
def test_what_saves_memory_costs_time(setting: str, less: str, more: str) -> None:
    plain = make_plan(config_of("1.4b", "data.micro_batch_size=2"), 64)
    saving = make_plan(config_of("1.4b", "data.micro_batch_size=2", setting), 64)
    assert getattr(saving.memory, less) < getattr(plain.memory, less)
    assert getattr(saving.seconds, more) > getattr(plain.seconds, more)
    assert saving.seconds.total > plain.seconds.total


def test_communication_is_that_of_stage_and_keeping() -> None:
    """Under stage 3 weights are gathered once where they are kept, twice where not; hpZ keeps the second near."""
    weights = 2 * 6_756_515_873
    twice = make_plan(config_of("7b"), 64).communication
    once = make_plan(config_of("7b", "train.zero.max_live_parameters=10000000000", *REUSE), 64).communication
    near = make_plan(config_of("7b", "train.zero.hpz_partition_size=8"), 64).communication
    second = make_plan(config_of("7b", "train.zero.stage=2"), 64).communication
    assert twice.gathered == pytest.approx(2 * weights, rel=0.001) and once.gathered * 2 == twice.gathered
    assert twice.reduced == once.reduced == second.reduced == 2 * weights
    assert once.seconds_of_micro_batch < near.seconds_of_micro_batch < twice.seconds_of_micro_batch
    assert second.gathered == 0 and second.after_step == weights
    assert make_plan(config_of("0.16b"), 1).communication.seconds_of_micro_batch == 0


REUSE = ("train.zero.max_reuse_distance=10000000000",)


def test_a_ring_is_as_fast_as_its_slowest_part() -> None:
    gpu = GPUS["h100"]
    inside, outside = gpu.ring_seconds(1e9, 8, 1), gpu.ring_seconds(1e9, 16, 1)
    assert inside == pytest.approx(1e9 * 7 / 8 / 360e9, rel=0.02)
    assert outside == pytest.approx(1e9 / 2 / (8 * 42e9), rel=0.05) or outside > inside
    assert gpu.ring_seconds(1e9, 1, 1) == 0
    slow = dataclasses.replace(gpu, network=1e9)
    assert slow.ring_seconds(1e9, 16, 1) == pytest.approx(1e9 / 2 / 8e9, rel=0.01)


def test_buckets_are_counted_as_they_fill() -> None:
    assert count_reductions([10, 10, 10], bucket=20) == 2
    assert count_reductions([50, 10], bucket=20) == 2
    assert count_reductions([], bucket=20) == 0


def test_rows_that_cannot_be_shared_are_told_with_numbers_that_can() -> None:
    with pytest.raises(UserError, match=r"512 rows .* by 24 GPUs: data.global_batch_size=528 or --gpus 16"):
        make_plan(config_of("0.16b"), 24)
    with pytest.raises(UserError, match="in groups of 2"):
        make_plan(config_of("0.16b", "train.sequence_parallel=2"), 3)
    assert make_plan(config_of("0.16b", "train.sequence_parallel=2"), 1024).division.groups == 512


def test_the_local_engine_sends_nothing(large: Plan) -> None:
    plan: Any = make_plan(config_of("quickstart", "train.engine=local"), 1)
    assert plan.communication.reduced == 0 and "communication" not in report(plan)
    assert "communication" in report(large) and "patch_encoder" in report(large)


def test_the_command_prints_the_plan_or_one_json_object() -> None:
    arguments = ["plan", str(CONFIGS / "0.16b.yaml"), "model.layers=4", "--gpus", "2", "--gpu", "a100"]
    plain, machine = (CliRunner().invoke(app, [*arguments, *more]) for more in ([], ["--json"]))
    assert plain.exit_code == machine.exit_code == 0
    told = json.loads(machine.output)
    assert told["gpus"] == 2 and told["gpu"] == "A100" and told["warnings"] == []
    assert f"{told['parameters']['total']:,}" in plain.output
    for words in ("FLOPs, exact", "memory, activations", "communication", "GPU-hours", "a prediction"):
        assert words in plain.output
