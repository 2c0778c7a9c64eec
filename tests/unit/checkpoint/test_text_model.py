"""The text tower as a Llama's folder: what it holds, what is refused, and that a new run starts from it bit for bit."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import make_batch, small_config, train_step
from safetensors.torch import load_file

from transfusion.checkpoint.published_weights import start_from_published
from transfusion.checkpoint.save import save
from transfusion.checkpoint.text_model import export_text_model
from transfusion.cli.main import main
from transfusion.errors import UserError
from transfusion.parallel.environment import Environment
from transfusion.parallel.local import LocalEngine
from transfusion.schema import TrainState
from transfusion.sequence.tokenizer import Tokenizer

ALONE = Environment(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"), threads=1)
# As for two further image sizes.
MORE_ROWS = 2


def make_run(folder: Path, tokenizer: Tokenizer, **changes: Any) -> LocalEngine:
    settings = {"model__vocabulary": tokenizer.vocabulary + MORE_ROWS, "optimizer__ema_decay": 0.5}
    engine = LocalEngine(small_config(**settings | changes), ALONE)
    train_step(engine, [make_batch("mixed", 0)])
    save(folder, engine, TrainState(step=7), keep=1)
    shutil.copy(tokenizer.path, folder / "tokenizer.model")
    return engine


def test_a_new_run_starts_from_it_bit_for_bit(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """With rows of the embedding that are no pieces, and pieces of single bytes beside pieces of the same bytes."""
    engine = make_run(tmp_path / "run", tokenizer)
    out = export_text_model(tmp_path / "run", tmp_path / "text")
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer.model",
        "tokenizer_config.json",
    ]  # fmt: skip
    started = LocalEngine(engine.config, ALONE)
    start_from_published(out, started, tokenizer)
    averages = dict(zip(engine.masters, engine.average.averages, strict=True))
    text = [
        name for name in engine.masters if name.split(".")[0] in ("embedding", "blocks", "norm", "lm_head")
    ]
    assert len(text) == len(load_file(out / "model.safetensors")) == 21
    assert all(torch.equal(started.masters[name], averages[name]) for name in text)
    assert not torch.equal(averages["lm_head.weight"], engine.masters["lm_head.weight"])


def test_without_an_average_it_has_the_weights(tmp_path: Path, tokenizer: Tokenizer) -> None:
    engine = make_run(tmp_path / "run", tokenizer, optimizer__ema_decay=0.0)
    weights = load_file(export_text_model(tmp_path / "run", tmp_path / "text") / "model.safetensors")
    assert torch.equal(weights["model.embed_tokens.weight"], engine.masters["embedding.weight"])


def test_what_is_no_text_is_never_chosen(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """As where our own sampling allows no image."""
    make_run(tmp_path / "run", tokenizer)
    out = export_text_model(tmp_path / "run", tmp_path / "text")
    settings = json.loads((out / "generation_config.json").read_text())
    first_row = tokenizer.vocabulary
    assert settings["suppress_tokens"] == [0, 1, 3, 4, 5, 6, *range(first_row, first_row + MORE_ROWS)]
    assert (settings["bos_token_id"], settings["eos_token_id"], settings["pad_token_id"]) == (1, 2, 0)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"model__qk_norm": True, "model__attention_bias": True},
            r"since model\.attention_bias=true and model\.qk_norm=true; .* train with one of them",
        ),
        ({"model__norm_placement": "post"}, r"model\.norm_placement=post; .*model\.norm_placement=pre"),
    ],
)
def test_a_network_of_no_family_is_refused(
    tmp_path: Path, tokenizer: Tokenizer, changes: dict[str, Any], told: str
) -> None:
    make_run(tmp_path / "run", tokenizer, **changes)
    with pytest.raises(UserError, match=told) as refused:
        export_text_model(tmp_path / "run", tmp_path / "text")
    assert "\n" not in str(refused.value) and not (tmp_path / "text").exists()


def test_another_family_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    codec = {
        "kind": "vq", "folder": "codec", "channels": 3, "image_size": 4, "latent_channels": 2, "downscale": 2,
        "codebook_size": 16, "scale": [1.0], "shift": [0.0],
    }  # fmt: skip
    chameleon = small_config(
        model__family="chameleon", model__vocabulary=tokenizer.vocabulary, model__qk_norm=False,
        model__norm_placement="pre", **{f"codec__{key}": value for key, value in codec.items()},
    )  # fmt: skip
    save(tmp_path / "run", LocalEngine(chameleon, ALONE), TrainState(step=7), keep=1)
    shutil.copy(tokenizer.path, tmp_path / "run" / "tokenizer.model")
    with pytest.raises(UserError, match=r"since model\.family=chameleon"):
        export_text_model(tmp_path / "run", tmp_path / "text")


def test_a_former_one_is_replaced_and_anything_else_left_alone(tmp_path: Path, tokenizer: Tokenizer) -> None:
    make_run(tmp_path / "run", tokenizer)
    out = export_text_model(tmp_path / "run", tmp_path / "text")
    (out / "config.json").touch()
    (out / "model.safetensors").unlink()
    assert (export_text_model(tmp_path / "run", out) / "model.safetensors").is_file()
    # A Llama of somebody else.
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(UserError, match="exists and is not an exported model; name another folder"):
        export_text_model(tmp_path / "run", tmp_path / "llama")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "run", "text"]


def test_the_command_writes_both_folders_or_neither(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run", tokenizer)
    make_run(tmp_path / "normed", tokenizer, model__norm_placement="post")
    for run, code in (("normed", 2), ("run", 0)):
        out = f"of-{run}"
        monkeypatch.setattr(
            sys, "argv", ["transfusion", "export", run, "--out", out, "--text-model", f"{out}-text"]
        )
        with pytest.raises(SystemExit) as ended:
            main()
        assert int(ended.value.code or 0) == code
        told = capsys.readouterr()
        if code:
            assert len(told.err.splitlines()) == 1 and "model.norm_placement=post" in told.err
        assert Path(out).exists() == Path(f"{out}-text").exists() == (not code)
    assert "of-run-text: the text tower, a causal language model of transformers" in told.out
