"""Configuration: files, bases, overrides, and mistakes told all at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from transfusion.config import Config, load_config
from transfusion.config.checking import check_as
from transfusion.config.yaml_files import dump, explain
from transfusion.errors import UserError

CONFIGS = sorted(
    path
    for folder in ("train", "benchmark")
    for path in Path(__file__).parents[3].glob(f"configs/{folder}/*.yaml")
)


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_are_the_papers() -> None:
    config = load_config(None)
    assert config.optimizer.betas == (0.9, 0.95)
    assert (config.optimizer.learning_rate, config.optimizer.final_learning_rate) == (3e-4, 1.5e-5)
    assert (config.optimizer.weight_decay, config.optimizer.gradient_clip) == (0.1, 1.0)
    assert config.optimizer.warmup_steps == 4000
    assert config.optimizer.ema_decay == 0.0
    assert config.diffusion.steps == 1000
    assert config.diffusion.image_loss_weight == 5.0
    assert config.diffusion.max_timestep_before_caption == 500
    assert (config.data.caption_first, config.data.caption_dropout) == (0.8, 0.1)
    assert config.data.sequence_length == 4096


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_shipped_config_loads_and_says_what_it_is_for(path: Path) -> None:
    # An autoencoder that a configuration names is not shipped with it.
    load_config(path, reads_codec=False)
    head = path.read_text(encoding="utf-8").split("\n\n")[0]
    for word in ("# Purpose:", "# Command:", "# Time:", "# Result:"):
        assert word in head, f"{path.name} does not say its {word}"


def test_overrides_and_numbers_in_scientific_notation(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "optimizer: {learning_rate: 1e-4}\nmodel: {hidden_size: 64, heads: 4}\n")
    config = load_config(path, ["model.hidden_size=96", "--train.steps=7", "run.name=x"])
    assert config.optimizer.learning_rate == 1e-4
    assert (config.model.hidden_size, config.train.steps, config.run.folder) == (96, 7, "runs/x")


def test_base_files_are_merged_and_circles_refused(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", "model: {hidden_size: 64, heads: 4}\ntrain: {steps: 5}\n")
    path = write(tmp_path, "own.yaml", "base: base.yaml\ntrain: {steps: 9}\n")
    config = load_config(path)
    assert (config.model.hidden_size, config.train.steps) == (64, 9)
    circle = write(tmp_path, "circle.yaml", "base: circle.yaml\n")
    with pytest.raises(UserError, match="circle"):
        load_config(circle)


def test_all_mistakes_at_once_with_the_nearest_known_name() -> None:
    with pytest.raises(UserError) as caught:
        load_config(
            None, ["model.hiden_size=64", "train.steps=-1", "optimizer.betas=[2, 0.9]", "nonsense", "run=3"]
        )
    message = str(caught.value)
    assert message.startswith("5 problems")
    assert "did you mean model.hidden_size?" in message
    assert "train.steps" in message and "-1" in message
    assert "optimizer.betas" in message
    assert "'nonsense' is not an override" in message
    assert "run: " in message


def test_parts_that_do_not_fit_each_other() -> None:
    with pytest.raises(UserError, match=r"image_size 9 must be a multiple of model.patch_size"):
        load_config(None, ["codec.image_size=9"])
    with pytest.raises(UserError, match="too short for an image"):
        load_config(None, ["codec.image_size=64", "data.sequence_length=256"])
    with pytest.raises(UserError, match="needs an unconditional branch"):
        load_config(None, ["sample_grid.prompts=[a]", "data.caption_dropout=0"])
    with pytest.raises(UserError, match=r"model.hidden_size 100 must be an even multiple"):
        load_config(None, ["model.hidden_size=100", "model.heads=12"])
    with pytest.raises(UserError, match=r"multiple of model\.num_kv_heads"):
        load_config(None, ["model.num_kv_heads=5"])


def test_evaluations_of_a_training_need_checkpoints_and_data() -> None:
    with pytest.raises(UserError, match=r"eval\.every 3 is no multiple of checkpoint\.every 2"):
        load_config(None, ["eval.every=3", "checkpoint.every=2", "eval.suites=suites.yaml"])
    with pytest.raises(UserError, match=r"eval\.every needs data\.validation, or eval\.suites"):
        load_config(None, ["eval.every=4", "checkpoint.every=2"])


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (
            ["prediction=epsilon", "timestep_sampling=logit-normal"],
            ["rarely draws the highest timesteps"],
        ),
        (["prediction=v", "timestep_shift=3"], ["timestep_shift=3 is for diffusion.prediction=flow"]),
        (["prediction=flow", "loss_weight=min-snr"], ["loss_weight=min-snr is for"]),
        (["prediction=x", "loss_weight=min-snr"], ["x weighs by"]),
        (["prediction=x", "logit_mean=0.8"], ["logit_mean=0.8 does nothing"]),
        (["logit_std=0.8"], ["logit_std=0.8 does nothing"]),
        (["min_snr_gamma=3"], ["min_snr_gamma=3 does nothing"]),
        (
            ["steps=100", "timestep_sampling=logit-normal"],
            ["must not exceed diffusion.steps", "logit-normal"],
        ),
        (["timestep_shift=0"], ["diffusion.timestep_shift"]),
    ],
)
def test_laws_and_weights_that_cannot_serve_an_objective(overrides: list[str], messages: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_config(None, [f"diffusion.{override}" for override in overrides])
    assert all(message in str(caught.value) for message in messages)
    assert len(str(caught.value).splitlines()) == (1 if len(messages) == 1 else 1 + len(messages))


@pytest.mark.parametrize(
    ("prediction", "sampler", "choice"),
    [
        ("epsilon", "euler", "ddim or ddpm"),
        ("v", "heun", "ddim or ddpm"),
        ("flow", "ddim", "euler or heun"),
        ("x", "ddpm", "euler or heun"),
    ],
)
def test_a_sampler_that_does_not_fit_the_objective(prediction: str, sampler: str, choice: str) -> None:
    with pytest.raises(
        UserError, match=rf"sample_grid\.sampler={sampler} cannot draw with .*{prediction}; choose {choice}"
    ):
        load_config(None, [f"diffusion.prediction={prediction}", f"sample_grid.sampler={sampler}"])
    for fitting in ("auto", *choice.split(" or ")):
        load_config(None, [f"diffusion.prediction={prediction}", f"sample_grid.sampler={fitting}"])


def test_all_that_does_not_fit_an_objective_is_told_at_once() -> None:
    wrong = [
        "diffusion.prediction=v",
        "diffusion.timestep_shift=2",
        "sample_grid.sampler=heun",
        "train.steps=-1",
    ]
    with pytest.raises(UserError) as caught:
        load_config(None, wrong)
    assert str(caught.value).startswith("3 problems")


def test_parts_are_compared_even_where_values_are_wrong() -> None:
    with pytest.raises(UserError) as caught:
        load_config(None, ["codec.image_size=7", "train.steps=-1", "model.heads=5", "model.num_kv_heads=3"])
    message = str(caught.value)
    for word in ("train.steps", "model.heads 5", "model.num_kv_heads 3"):
        assert word in message
    with pytest.raises(UserError, match=r"image_size 7 must be a multiple"):
        load_config(None, ["codec.image_size=7", "train.steps=-1"])


def test_the_keys_of_a_source_are_known_too() -> None:
    with pytest.raises(UserError, match=r"did you mean data\.sources\.0\.weight\?"):
        load_config(None, ["data.sources=[{name: a, shards: x, wieght: 2}]"])


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read config"):
        load_config(tmp_path / "missing.yaml")
    with pytest.raises(UserError, match=r"torn\.yaml cannot be read: line 1"):
        load_config(write(tmp_path, "torn.yaml", "model: {hidden_size: 64"))
    with pytest.raises(UserError, match="must hold sections"):
        load_config(write(tmp_path, "list.yaml", "- 1\n- 2\n"))


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    config = load_config(None, ["model.hidden_size=96", "model.heads=4", "optimizer.epsilon=1e-9"])
    path = tmp_path / "config.yaml"
    dump(config, path)
    assert load_config(path) == config
    assert Config.model_validate(yaml.safe_load(explain(config))) == config


def test_every_key_is_explained() -> None:
    lines = explain(Config()).splitlines()
    unexplained = [line for line in lines if not line.endswith(":") and "# " not in line]
    assert unexplained == []


SOURCES = "data.sources=[{name: a, shards: x, weight: 0.5}, {name: b, shards: y}]"


def test_shares_are_numbers_or_schedules() -> None:
    schedule = "data.sources.1.weight=[{from_step: 0, weight: 0}, {from_step: 100, weight: 0.25}]"
    config = load_config(None, [SOURCES, "data.sources.0.weight=0.75", schedule])
    assert [source.schedule for source in config.data.sources] == [((0, 0.75),), ((0, 0.0), (100, 0.25))]
    assert check_as(Config, config.as_dict(), where="test") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.sources.0.weight=-1", r"data\.sources\.0\.weight: input should be greater than 0, got -1"),
        ("data.sources.0.weight=[]", "must begin with 0 and rise, got"),
        ("data.sources.0.weight=[{from_step: 5, weight: 1}]", r"must begin with 0 and rise, got \[5\]"),
        ("data.sources.0.weight=[{from_step: 0, weight: x}]", r"data\.sources\.0\.weight\.0\.weight: "),
        ("data.sources.2.weight=1", "2 is not an entry of a list of 2"),
        (
            "data.sources=[{name: a, shards: x, weight: [{from_step: 0, weight: 0}]}]",
            "from step 0 on all sources",
        ),
    ],
)
def test_shares_that_cannot_be(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(None, [SOURCES, override])


def test_all_that_sequence_parallelism_cannot_divide_is_told_at_once() -> None:
    with pytest.raises(UserError) as caught:
        load_config(None, ["train.sequence_parallel=8", "model.num_kv_heads=4", "data.sequence_length=4092"])
    told = "train.sequence_parallel 8 must divide model.heads 12, model.num_kv_heads 4, data.sequence_length 4092"
    assert told in str(caught.value)
    load_config(None, ["train.sequence_parallel=4"])


def test_what_a_stage_cannot_offload_is_told_at_once() -> None:
    places = ["offload_parameters=nvme", "hpz_partition_size=2", "stage=2"]
    with pytest.raises(UserError) as caught:
        load_config(None, [f"train.zero.{place}" for place in places])
    for name in ("offload_parameters", "hpz_partition_size"):
        assert f"train.zero.{name} needs train.zero.stage=3, got 2" in str(caught.value)
    assert "train.zero.nvme_path must name a folder" in str(caught.value)
