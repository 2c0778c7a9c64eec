"""A pipeline from an exported folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from transfusion.checkpoint import export
from transfusion.config import Config
from transfusion.errors import UserError
from transfusion.generate import Pipeline
from transfusion.generate.load import Weights
from transfusion.model import Transfusion
from transfusion.sequence.tokenizer import Tokenizer

from ..conftest import MARKED


def images(pipeline: Pipeline) -> torch.Tensor:
    return pipeline.sample(["a handwritten three"], steps=3)[0].pixels


def test_an_export_samples_as_its_live_model(
    folder: Path, build_model: Callable[..., tuple[Config, Transfusion]], tokenizer: Tokenizer
) -> None:
    raw, average = (
        images(Pipeline(model, tokenizer, config, "cpu"))
        for config, model in (build_model(seed=0), build_model(seed=1))
    )
    assert not torch.equal(raw, average)
    loaded = Pipeline.from_export(folder, device="cpu")
    assert torch.equal(images(loaded), average)
    assert torch.equal(images(Pipeline.from_export(folder, weights="ema", device="cpu")), average)
    assert torch.equal(images(Pipeline.from_export(folder, weights="raw", device="cpu")), raw)
    assert not any(parameter.requires_grad for parameter in loaded.runner.model.parameters())


@pytest.mark.parametrize("prediction", ["v", "flow", "x"])
def test_an_export_knows_what_its_model_predicts(folder: Path, prediction: str) -> None:
    drawn = {"epsilon": images(Pipeline.from_export(folder, device="cpu"))}
    description = json.loads((folder / export.CONFIG).read_text())
    description["config"]["diffusion"]["prediction"] = prediction
    (folder / export.CONFIG).write_text(json.dumps(description))
    pipeline = Pipeline.from_export(folder, device="cpu")
    own, other = {"v": ("ddim", "euler"), "flow": ("euler", "ddim"), "x": ("euler", "ddim")}[prediction]
    drawn[prediction] = images(pipeline)
    assert not torch.equal(drawn["epsilon"], drawn[prediction])
    named = pipeline.sample(["a handwritten three"], steps=3, sampler=own)
    assert torch.equal(named[0].pixels, drawn[prediction])
    with pytest.raises(
        UserError, match=f"'{other}' cannot draw with this model, .*(velocity|image); choose {own} or"
    ):
        pipeline.sample(["a handwritten three"], steps=3, sampler=other)


def test_raw_weights_serve_where_there_is_no_average(folder: Path) -> None:
    description = json.loads((folder / export.CONFIG).read_text())
    removed = description["weights"].popitem()[1]
    (folder / export.CONFIG).write_text(json.dumps(description))
    (folder / removed).unlink()
    assert torch.equal(
        images(Pipeline.from_export(folder, device="cpu")),
        images(Pipeline.from_export(folder, weights="raw", device="cpu")),
    )
    with pytest.raises(UserError, match="choose auto, raw or ema"):
        Pipeline.from_export(folder, weights="latest")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no averaged weights"):
        Pipeline.from_export(folder, weights="ema")


def test_weights_of_another_model_are_refused(
    folder: Path, build_model: Callable[..., tuple[Config, Transfusion]]
) -> None:
    _, other = build_model(hidden_size=16, heads=2)
    save_file(other.state_dict(), folder / "model.safetensors", metadata=MARKED)
    with pytest.raises(
        UserError, match=r"model\.safetensors does not match config.*has shape \[.*\] instead of"
    ):
        Pipeline.from_export(folder, weights="raw")


@pytest.mark.parametrize("weights", ["raw", "ema"])
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"norm.weight": None}, r"norm\.weight is missing \(1 such tensors\)"),
        (
            {"norm.scale": torch.ones(1), "norm.zero": torch.ones(1)},
            r"norm\.scale is left over \(2 such tensors\)",
        ),
        *(
            (
                {"norm.weight": torch.ones(32).to(dtype)},
                r"norm\.weight is stored as .*only F64, F32, F16, BF16",
            )
            for dtype in (torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn)
        ),
    ],
)
def test_tensors_that_mean_something_else_are_refused_by_name(
    folder: Path, weights: Weights, changes: dict[str, torch.Tensor | None], told: str
) -> None:
    path = folder / {"raw": "model.safetensors", "ema": "model.ema.safetensors"}[weights]
    changed = {**load_file(path), **changes}
    save_file({name: each for name, each in changed.items() if each is not None}, path, metadata=MARKED)
    with pytest.raises(UserError, match=rf"{path.name} does not match config\.json: {told}") as caught:
        Pipeline.from_export(folder, weights=weights)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floats_of_other_widths_are_read(folder: Path, dtype: torch.dtype) -> None:
    path = folder / "model.ema.safetensors"
    save_file({name: each.to(dtype) for name, each in load_file(path).items()}, path, metadata=MARKED)
    model = Pipeline.from_export(folder, device="cpu").runner.model
    assert {each.dtype for each in model.parameters()} == {torch.float32}


def test_a_larger_tokenizer_is_refused(folder: Path) -> None:
    description = json.loads((folder / export.CONFIG).read_text())
    description["config"]["model"]["vocabulary"] = 300
    (folder / export.CONFIG).write_text(json.dumps(description))
    with pytest.raises(UserError, match="320 pieces, its model has 300"):
        Pipeline.from_export(folder)


@pytest.mark.parametrize("device", ["gpu9000", "cuda"])
def test_a_device_that_is_not_there_is_refused(
    folder: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=f"device '{device}'"):
        Pipeline.from_export(folder, device=device)


@pytest.mark.parametrize("name", ["config.json", "model.ema.safetensors", "tokenizer.model"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(UserError, match=name):
        Pipeline.from_export(folder)
