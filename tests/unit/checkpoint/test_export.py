"""Model folders: complete, readable by anyone, and never written over something else."""

from __future__ import annotations

import inspect
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from handmade import make_batch, small_config, train_step
from safetensors.torch import load_file, save_file

from transfusion.checkpoint.export import export, read_export
from transfusion.checkpoint.hub_files import image_generation
from transfusion.checkpoint.layout import read_manifest
from transfusion.checkpoint.save import save
from transfusion.cli import generation
from transfusion.errors import UserError
from transfusion.families.build import build_model
from transfusion.inference.image_diffusion import ImageSampling
from transfusion.parallel.environment import Environment
from transfusion.parallel.local import LocalEngine
from transfusion.schema import TrainState
from transfusion.sequence.tokenizer import Tokenizer
from transfusion.sequence.tokenizer_json import tokenizer_json

ALONE = Environment(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"), threads=1)


def make_run(folder: Path, *, decay: float = 0.5, seed: int = 0) -> LocalEngine:
    engine = LocalEngine(small_config(optimizer__ema_decay=decay), ALONE)
    train_step(engine, [make_batch("mixed", seed)])
    save(folder, engine, TrainState(step=7), keep=1)
    (folder / "tokenizer.model").write_bytes(b"pieces")
    return engine


@pytest.fixture
def run(tmp_path: Path) -> Path:
    make_run(tmp_path / "run")
    return tmp_path / "run"


def test_both_kinds_of_weights_load_into_the_network(tmp_path: Path) -> None:
    engine = make_run(tmp_path / "run")
    out = export(tmp_path / "run", tmp_path / "model")
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.ema.safetensors",
        "model.safetensors",
        "tokenizer.model",
    ]
    found = read_export(out)
    assert found.config == engine.config
    assert found.step == 7
    assert found.tokenizer.read_bytes() == b"pieces"
    assert found.average is not None and found.preferred == found.average
    model = build_model(found.config)
    averages = dict(zip(engine.masters, engine.average.averages, strict=True))
    for path, expected in ((found.weights, engine.masters), (found.average, averages)):
        model.load_state_dict(load_file(path), strict=True)
        assert all(torch.equal(parameter, expected[name]) for name, parameter in model.named_parameters())


def test_the_tokenizer_is_described_for_other_libraries(
    run: Path, tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy(tokenizer.path, run / "tokenizer.model")
    out = export(run, tmp_path / "model")
    described = json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))
    assert described == tokenizer_json(tokenizer.path.read_bytes())
    settings = json.loads((out / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert (settings["bos_token"], settings["eos_token"], settings["pad_token"]) == (
        "<BOS>",
        "<EOS>",
        "<PAD>",
    )
    assert settings["additional_special_tokens"] == ["<BOI>", "<EOI>", "<PATCH>"]
    assert not caplog.records


def test_one_line_says_why_the_tokenizer_cannot_be_described(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    read_export(export(run, tmp_path / "model"))
    (told,) = (record.getMessage() for record in caplog.records)
    assert "no tokenizer.json is written" in told and "is not a sentencepiece model" in told
    assert "\n" not in told
    assert not list((tmp_path / "model").glob("tokenizer*.json"))


@pytest.mark.parametrize(("prediction", "sampler"), [("epsilon", "ddim"), ("flow", "euler")])
def test_the_stated_defaults_are_those_of_sampling(prediction: str, sampler: str, tmp_path: Path) -> None:
    config = small_config(diffusion__prediction=prediction, codec__image_sizes=("8x4", "4x4"))
    stated = image_generation(config)
    ids = {f"{name}_token_id": stated[f"{name}_token_id"] for name in ("bos", "eos", "pad")}
    assert ids == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    assert stated["image"]["size"] == [8, 4] and stated["image"]["sampler"] == sampler
    image = {name: stated["image"][name] for name in ("guidance_scale", "num_inference_steps")}
    python, typed = ImageSampling(), inspect.signature(generation.sample).parameters
    assert image == {"guidance_scale": python.guidance, "num_inference_steps": python.steps}
    assert image == {"guidance_scale": typed["cfg"].default, "num_inference_steps": typed["steps"].default}
    # Guidance needs captions that were dropped in training.
    assert image_generation(small_config(data__caption_dropout=0))["image"]["guidance_scale"] == 1


def test_the_card_tells_what_the_run_was(tmp_path: Path) -> None:
    sources = [
        {"name": "pictures", "shards": "/home/someone/pictures/*.tar", "weight": 0.75},
        {
            "name": "prose",
            "shards": "/home/someone/prose.jsonl",
            "weight": [{"from_step": 0, "weight": 1}, {"from_step": 2000, "weight": 0.5}],
        },
    ]
    config = small_config(
        run__name="mine", data__sources=sources, data__validation=sources[:1], data__tokenizer="/home/someone/t",
        train__init_from="/home/someone/tiny-llama", train__steps=9000,
    )  # fmt: skip
    engine = LocalEngine(config, ALONE)
    save(tmp_path / "run", engine, TrainState(step=7000, tokens=123456, images=789), keep=1)
    (tmp_path / "run" / "tokenizer.model").write_bytes(b"pieces")
    losses = [
        {"step": 6000, "validation_text_loss": 5.0},
        {"step": 7000, "loss": 4.0, "validation_text_loss": 3.25, "validation_image_loss": None},
    ]
    torn = '{"step": 7000, "validation_te'
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join([*map(json.dumps, losses), torn]))
    page = (export(tmp_path / "run", tmp_path / "model") / "README.md").read_text(encoding="utf-8")
    head = yaml.safe_load(page.split("---\n")[1])
    assert head["library_name"] == "transfusion" and head["pipeline_tag"] == "any-to-any"
    assert "license" not in head and "**Licence: not stated.**" in page
    count = sum(master.numel() for master in engine.masters.values())
    for line in (
        "# mine",
        f"| parameters | {count:,} |",
        "| image sizes, height x width | 4x4 |",
        "| steps | 7,000 of 9,000 |",
        "| tokens and patches, padding included | 123,456 |",
        "| images | 789 |",
        "| text tower started from | tiny-llama |",
        "- `pictures`: 0.75",
        "- `prose`: 1, 0.5 from step 2,000",
        "Losses of the weights at step 7,000, on `pictures`, at most 1,000 documents:",
        "| text loss, nats per token | 3.25 |",
    ):
        assert line in page.splitlines()
    assert "image loss" not in page and "5" not in page.partition("## Validation")[2].replace("3.25", "")
    assert "/home" not in page and str(tmp_path) not in page


def test_a_card_that_was_edited_stays_as_it_is(run: Path, tmp_path: Path) -> None:
    out = export(run, tmp_path / "model")
    assert "No validation loss of step 7 is known." in (out / "README.md").read_text(encoding="utf-8")
    (out / "README.md").write_text("Licence: mine")
    read_export(out)


def test_without_an_average_there_is_one_file(tmp_path: Path) -> None:
    make_run(tmp_path / "run", decay=0.0)
    found = read_export(export(tmp_path / "run", tmp_path / "model"))
    assert found.average is None
    assert found.preferred == found.weights


def test_one_checkpoint_can_be_named(run: Path, tmp_path: Path) -> None:
    assert read_export(export(run / "checkpoints" / "step_00000007", tmp_path / "model")).step == 7


def test_the_configured_tokenizer_serves_only_a_checkpoint_outside_of_a_run(tmp_path: Path) -> None:
    """Inside of one the file may have changed since, which nobody would notice."""
    (tmp_path / "named.model").write_bytes(b"named")
    config = small_config(data__tokenizer=str(tmp_path / "named.model"))
    folder = save(tmp_path / "run", LocalEngine(config, ALONE), TrainState(step=1), keep=1)
    for source in (tmp_path / "run", folder):
        with pytest.raises(UserError, match=r"no tokenizer at .*run/tokenizer\.model"):
            export(source, tmp_path / "model")
    bare = folder.rename(tmp_path / "bare")
    assert read_export(export(bare, tmp_path / "model")).tokenizer.read_bytes() == b"named"


def test_an_export_is_replaced(run: Path, tmp_path: Path) -> None:
    out = export(run, tmp_path / "model")
    (out / "tokenizer.model").unlink()
    read_export(export(run, out))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "run"]


class Killed(BaseException):
    """Stands for SIGKILL."""


def dying_at(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Die before the `count`-th action on the disk, and in the middle of deleting a folder."""
    left = count

    def counted(real: Any) -> Any:
        def act(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left:
                return real(*arguments, **options)
            if real is rmtree:
                next(arguments[0].glob("*.json")).unlink()
            raise Killed

        return act

    rmtree = shutil.rmtree
    for owner, name in (
        (os, "fsync"),
        (Path, "rename"),
        (Path, "replace"),
        (Path, "mkdir"),
        (shutil, "rmtree"),
    ):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))


def test_an_export_killed_at_any_action_leaves_a_whole_one_or_none(run: Path, tmp_path: Path) -> None:
    """The former stays until the new one is complete, and what is left does not block the next."""
    out, killed = tmp_path / "model", 0
    for count in range(1, 100):
        export(run, out)
        with pytest.MonkeyPatch.context() as patch:
            dying_at(count, patch)
            try:
                export(run, out)
            except Killed:
                killed += 1
            else:
                break
        if out.exists():
            read_export(out)
        read_export(export(run, out))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "run"]
    assert killed > 8


def test_anything_else_is_left_alone(run: Path, tmp_path: Path) -> None:
    for name, content in (("notes", "config.json"), ("letters", "letter.txt")):
        (tmp_path / name).mkdir()
        (tmp_path / name / content).write_text("{}")
        with pytest.raises(UserError, match="exists and is not an exported model; name another folder"):
            export(run, tmp_path / name)
        assert [path.name for path in (tmp_path / name).iterdir()] == [content]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is not an exported model"):
        export(run, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_nothing_is_written_without_a_tokenizer(run: Path, tmp_path: Path) -> None:
    (run / "tokenizer.model").unlink()
    with pytest.raises(
        UserError, match=r"cannot export .*: no tokenizer at .*tokenizer\.model; put the file .* there"
    ):
        export(run, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_run_without_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no finished checkpoint; train first"):
        export(tmp_path, tmp_path / "model")


def test_a_damaged_checkpoint_is_not_exported(run: Path, tmp_path: Path) -> None:
    path = run / "checkpoints" / "step_00000007" / "rank_00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="is damaged"):
        export(run, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "model.ema.safetensors", "tokenizer.model"]
)
def test_a_missing_file_is_named(run: Path, tmp_path: Path, name: str) -> None:
    out = export(run, tmp_path / "model")
    (out / name).unlink()
    with pytest.raises(UserError, match=rf"{name}.*export the model again"):
        read_export(out)


def test_one_checkpoint_always_gives_the_same_folder(run: Path, tmp_path: Path) -> None:
    one, other = export(run, tmp_path / "model"), export(run, tmp_path / "again")
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes()
    found = read_export(Path(shutil.copytree(one, tmp_path / "copied")))
    assert found.config == read_export(one).config


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.ema.safetensors"])
def test_files_of_two_exports_are_refused(run: Path, tmp_path: Path, name: str) -> None:
    """Of the same settings, step and shapes: nothing but the id tells them apart."""
    out = export(run, tmp_path / "model")
    make_run(tmp_path / "other", seed=1)
    shutil.copy(export(tmp_path / "other", tmp_path / "newer") / name, out)
    told = "model.safetensors" if name == "config.json" else name
    with pytest.raises(
        UserError, match=rf"{told} is of another export than config\.json.*: transfusion export RUN"
    ):
        read_export(out)


def test_weights_without_an_id_are_refused(run: Path, tmp_path: Path) -> None:
    out = export(run, tmp_path / "model")
    save_file(load_file(out / "model.safetensors"), out / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors is of another export"):
        read_export(out)


def test_a_swapped_tokenizer_is_refused(run: Path, tmp_path: Path) -> None:
    out = export(run, tmp_path / "model")
    (out / "tokenizer.model").write_bytes(b"others")
    with pytest.raises(UserError, match=r"tokenizer\.model is of another export than config\.json"):
        read_export(out)


def test_a_codec_of_another_export_is_refused(tmp_path: Path) -> None:
    files = ("config.json", "preview.json", "diffusion_pytorch_model.safetensors")
    (tmp_path / "run" / "codec").mkdir(parents=True)
    for name in files:
        (tmp_path / "run" / "codec" / name).write_text("{}")
    make_run(tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step_00000007"
    manifest = read_manifest(path)
    codec = {
        **manifest.config["codec"],
        "kind": "kl",
        "folder": "elsewhere",
        "latent_channels": 1,
        "downscale": 1,
    }
    changed = replace(manifest, config={**manifest.config, "codec": codec})
    (path / "manifest.json").write_text(changed.as_json())
    out = export(tmp_path / "run", tmp_path / "model")
    assert read_export(out).config.codec.folder == str(out / "codec")
    for name in files:
        (out / "codec" / name).write_text("[]")
        with pytest.raises(UserError, match=rf"codec/{name} is of another export than config\.json"):
            read_export(out)
        (out / "codec" / name).unlink()
        with pytest.raises(UserError, match=rf"codec/{name} is missing"):
            read_export(out)
        (out / "codec" / name).write_text("{}")


def test_other_configs_and_torn_weights_are_refused(run: Path, tmp_path: Path) -> None:
    out = export(run, tmp_path / "model")
    weights = out / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read .*export the model again"):
        read_export(out)
    weights.write_bytes(whole)
    text = (out / "config.json").read_text()
    (out / "config.json").write_text(text.replace('"format_version": 3', '"format_version": 2'))
    with pytest.raises(UserError, match="has model format 2, this version reads 3; export the model again"):
        read_export(out)
    for broken in ('"config": []', '"config": {"model": "x"}', '"config": {}, "weights": {}', '"digests": 1'):
        damaged = json.loads(text)
        del damaged["config"]
        (out / "config.json").write_text(json.dumps(damaged)[:-1] + f", {broken}}}")
        with pytest.raises(UserError, match=r"config\.json"):
            read_export(out)
    (out / "config.json").write_text('{"architectures": []}')
    with pytest.raises(UserError, match=r"is not a model folder: config\.json is not an export's"):
        read_export(out)
