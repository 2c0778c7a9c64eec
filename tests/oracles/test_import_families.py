"""Tiny models of six families: a run that starts from one computes what transformers does, and gives it back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from text_logits import logits

from transfusion.checkpoint.published_weights import start_from_published
from transfusion.checkpoint.save import save
from transfusion.checkpoint.text_model import export_text_model
from transfusion.config import Config
from transfusion.errors import UserError
from transfusion.parallel.environment import Environment
from transfusion.parallel.local import LocalEngine
from transfusion.schema import TrainState
from transfusion.sequence.tokenizer import train_tokenizer
from transfusion_kernels.verification.testing import relative_error

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: oracles)")

ALONE = Environment(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"), threads=1)
VOCABULARY = 64
THEIRS = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "attn_implementation": "eager",
}  # fmt: skip
OURS = {"layers": 2, "hidden_size": 32, "heads": 4, "num_kv_heads": 2, "ffn_size": 48}
LLAMA3 = {
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama 3": (
        "Llama",
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 100.0, **LLAMA3}},
        {"rope_theta": 100.0, "rope_scaling": {"type": "llama3", **LLAMA3}},
    ),
    "llama 2": (
        "Llama",
        {"num_key_value_heads": 4, "rms_norm_eps": 1e-6},
        {"num_kv_heads": 4, "norm_epsilon": 1e-6},
    ),
    "llama, linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}},
        {"rope_scaling": {"type": "linear", "factor": 2.5}},
    ),
    "mistral": ("Mistral", {"sliding_window": 64, "head_dim": 12}, {"head_dim": 12}),
    "qwen2": ("Qwen2", {}, {"attention_bias": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}, {"qk_norm": True, "head_dim": 16}),
    "smollm2": ("Llama", {"tie_word_embeddings": True}, {"tie_embeddings": True}),
    "smollm2, trained apart": ("Llama", {"tie_word_embeddings": True}, {}),
}


def save_model(folder: Path, name: str, changes: dict[str, Any]) -> Any:
    """A model of random weights, in several shards as bfloat16, and read again as transformers does."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**THEIRS | changes)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
        model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="12kB")
    return opened(folder)


def opened(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def config_of(changes: dict[str, Any], vocabulary: int = VOCABULARY, length: int = 64) -> Config:
    return Config.model_validate(
        {
            "model": {**OURS, "vocabulary": vocabulary, **changes},
            "codec": {"channels": 1, "image_size": 8},
            "data": {"sequence_length": length},
            "train": {"precision": "fp32"},
        }
    )


def started(folder: Path, config: Config) -> LocalEngine:
    engine = LocalEngine(config, ALONE)
    start_from_published(folder, engine, SimpleNamespace(piece_bytes=lambda: []))  # type: ignore[arg-type]
    return engine


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_transformers(tmp_path: Path, family: str) -> None:
    name, theirs, ours = FAMILIES[family]
    model = save_model(tmp_path, name, theirs)
    assert type(model).__name__ == f"{name}ForCausalLM"
    ids = torch.randint(0, VOCABULARY, (2, 40))
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
    assert relative_error(logits(started(tmp_path, config_of(ours)), ids), wanted) <= 2e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_tower_goes_back_to_transformers(tmp_path: Path, family: str) -> None:
    """And what was written starts a run again, bit for bit."""
    name, theirs, ours = FAMILIES[family]
    save_model(tmp_path / "published", name, theirs)
    tokenizer = train_tokenizer(["a handwritten three"] * 9, tmp_path / "tokenizer.model", vocabulary=320)
    engine = started(tmp_path / "published", config_of(ours, tokenizer.vocabulary))
    save(tmp_path / "run", engine, TrainState(step=1), keep=1)
    shutil.copy(tokenizer.path, tmp_path / "run")
    out = export_text_model(tmp_path / "run", tmp_path / "text")
    ids = torch.randint(0, tokenizer.vocabulary, (2, 40))
    with torch.no_grad():
        wanted = opened(out)(input_ids=ids).logits
    assert relative_error(logits(engine, ids), wanted) <= 2e-6
    settings = json.loads((out / "config.json").read_text())
    assert settings["tie_word_embeddings"] == ours.get("tie_embeddings", False)
    again = LocalEngine(engine.config, ALONE)
    start_from_published(out, again, tokenizer)
    text = ("embedding.", "blocks.", "norm.", "lm_head.")
    assert all(
        torch.equal(again.masters[key], value)
        for key, value in engine.masters.items()
        if key.startswith(text)
    )


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_weights_of_patches_start_as_those_of_text(tmp_path: Path, family: str) -> None:
    name, theirs, ours = FAMILIES[family]
    save_model(tmp_path, name, theirs)
    engine = started(tmp_path, config_of({**ours, "modality_weights": "all"}))
    own = [key for key in engine.masters if ".image_" in key]
    assert len(own) > 20 and any(key.endswith("bias") or "query_norm" in key for key in own)
    assert all(torch.equal(engine.masters[key], engine.masters[key.replace("image_", "")]) for key in own)


@pytest.mark.parametrize(
    ("family", "told"),
    [
        (
            "llama 3",
            "set model.rope_scaling.type=llama3 model.rope_scaling.factor=4.0"
            " model.rope_scaling.original_max_position_embeddings=16",
        ),
        ("mistral", "set model.head_dim=12"),
        ("qwen2", "set model.attention_bias=true"),
        ("qwen3", "set model.qk_norm=true"),
    ],
)
def test_every_value_to_set_is_told(tmp_path: Path, family: str, told: str) -> None:
    name, theirs, ours = FAMILIES[family]
    save_model(tmp_path, name, theirs)
    plain = {"rope_theta": ours["rope_theta"]} if "rope_theta" in ours else {}
    with pytest.raises(UserError) as refused:
        started(tmp_path, config_of(plain))
    assert told in str(refused.value)
    # Nothing else is, but for the width of Qwen3's heads.
    assert str(refused.value).count("model.") == told.count("model.") + (family == "qwen3")


def test_a_head_of_its_own_is_no_tied_one(tmp_path: Path) -> None:
    """The other way round it starts as the embedding."""
    name, theirs, ours = FAMILIES["llama 2"]
    save_model(tmp_path, name, theirs)
    with pytest.raises(UserError, match=r"set model\.tie_embeddings=false"):
        started(tmp_path, config_of({**ours, "tie_embeddings": True}))


@pytest.mark.parametrize(
    ("family", "changes", "told"),
    [
        (
            "mistral",
            {"sliding_window": 32},
            r"windows of 32 positions.* set data\.sequence_length=32 or less",
        ),
        ("mistral", {"sliding_window": ...}, ""),
        ("mistral", {"sliding_window": None}, ""),
        ("qwen2", {"sliding_window": 32, "use_sliding_window": False, "layer_types": ...}, ""),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": True, "layer_types": ...}, ""),
        (
            "qwen2",
            {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 2, "layer_types": ...},
            "",
        ),
        (
            "qwen2",
            {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 1, "layer_types": ...},
            r"set data\.sequence_length=32 or less",
        ),
        ("qwen2", {"layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
        ("qwen3", {"attention_bias": True}, "attention_bias, also where heads are joined"),
        (
            "qwen2",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 1e4,
                    "factor": 4.0,
                    "original_max_position_embeddings": 32,
                }
            },
            "scaled .*yarn.* by 'linear' and 'llama3' alone.*; remove it from config.json",
        ),
        (
            "llama 2",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
            "scaled .*dynamic",
        ),
        ("llama 2", {"model_type": "smollm3"}, r"'smollm3'.*no_rope_layers.*take a model of one of these"),
        ("llama 2", {"model_type": "gpt2"}, "only 'llama', 'mistral', 'qwen2' and 'qwen3' can be read"),
        ("llama 2", {"model_type": ["llama"]}, "model_type is"),
    ],
)
def test_what_no_setting_means_is_refused_by_name(
    tmp_path: Path, family: str, changes: dict[str, Any], told: str
) -> None:
    """A value of ... is left out of config.json, which then means the family's default."""
    name, theirs, ours = FAMILIES[family]
    save_model(tmp_path, name, theirs)
    settings = json.loads((tmp_path / "config.json").read_text()) | changes
    settings = {key: value for key, value in settings.items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    if not told:
        started(tmp_path, config_of(ours))
        return
    with pytest.raises(UserError, match=told):
        started(tmp_path, config_of(ours))


def test_a_window_that_config_json_leaves_out_counts(tmp_path: Path) -> None:
    """A Mistral without the key sees 4,096 positions."""
    name, theirs, ours = FAMILIES["mistral"]
    save_model(tmp_path, name, theirs)
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["sliding_window"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="windows of 4096 positions"):
        started(tmp_path, config_of(ours, length=4097))
    started(tmp_path, config_of(ours, length=4096))
