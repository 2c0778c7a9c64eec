"""A run that starts from a Llama computes what transformers computes with it, to rounding, and so does its export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from text_logits import logits

from transfusion.checkpoint.export import export
from transfusion.checkpoint.published_weights import start_from_published
from transfusion.checkpoint.save import save
from transfusion.checkpoint.text_model import export_text_model
from transfusion.config import Config
from transfusion.errors import UserError
from transfusion.parallel.environment import Environment
from transfusion.parallel.local import LocalEngine
from transfusion.schema import TrainState
from transfusion.sequence.tokenizer import train_tokenizer
from transfusion.tokens import SpecialToken
from transfusion_kernels.verification.testing import relative_error

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: oracles)")

ALONE = Environment(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"), threads=1)
VOCABULARY = 64
SHAPE = {"layers": 2, "hidden_size": 32, "heads": 4, "num_kv_heads": 2, "ffn_size": 48, "rope_theta": 5e5}


def save_llama(folder: Path, **changes: Any) -> Any:
    """A Llama with grouped queries, saved in several shards as bfloat16 is on the hub."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "attn_implementation": "eager",
    }  # fmt: skip
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings | changes)).eval()
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
        llama.to(torch.bfloat16).save_pretrained(folder, max_shard_size="12kB")
    # Read again, since the angles of the one that was cast are rounded too.
    return transformers.LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def config_of(vocabulary: int = VOCABULARY, **changes: Any) -> Config:
    return Config.model_validate(
        {
            "model": {**SHAPE, "vocabulary": vocabulary, **changes},
            "codec": {"channels": 1, "image_size": 8},
            "optimizer": {"ema_decay": 0.5},
            "train": {"precision": "fp32"},
        }
    )


def tokenizer_of(pieces: list[bytes]) -> Any:
    return SimpleNamespace(piece_bytes=lambda: pieces)


def started(folder: Path, config: Config, pieces: list[bytes] | None = None) -> LocalEngine:
    engine = LocalEngine(config, ALONE)
    start_from_published(folder, engine, tokenizer_of(pieces or []))
    return engine


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_the_llamas(tmp_path: Path, tied: bool) -> None:
    theirs = save_llama(tmp_path, tie_word_embeddings=tied)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    engine = started(tmp_path, config_of())
    ids = torch.randint(0, VOCABULARY, (2, 24))
    with torch.no_grad():
        wanted = theirs(input_ids=ids).logits
    assert relative_error(logits(engine, ids), wanted) <= 2e-6
    averages = dict(zip(engine.masters, engine.average.averages, strict=True))
    assert all(torch.equal(averages[name], master) for name, master in engine.masters.items())
    drawn = LocalEngine(config_of(), ALONE).masters
    assert torch.equal(
        engine.masters["patch_encoder.projection.weight"], drawn["patch_encoder.projection.weight"]
    )


@pytest.mark.parametrize("vocabulary", [50, 80])
def test_without_a_tokenizer_rows_go_by_their_number(tmp_path: Path, vocabulary: int) -> None:
    """A smaller vocabulary leaves theirs out; of a larger one the rest is as drawn."""
    theirs = save_llama(tmp_path)
    config = config_of(vocabulary)
    engine, drawn = started(tmp_path, config), LocalEngine(config, ALONE)
    same = min(vocabulary, VOCABULARY)
    for ours, its in (("embedding", theirs.model.embed_tokens), ("lm_head", theirs.lm_head)):
        weight = engine.masters[f"{ours}.weight"]
        assert torch.equal(weight[:same], its.weight[:same])
        assert torch.equal(weight[same:], drawn.masters[f"{ours}.weight"][same:])


@pytest.mark.parametrize("byte_level", [True, False])
def test_with_a_tokenizer_rows_go_by_the_bytes_of_pieces(tmp_path: Path, byte_level: bool) -> None:
    """Ours: control tokens, then pieces in another order than theirs, one of them unknown to them."""
    theirs = save_llama(tmp_path)
    if byte_level:
        vocabulary = {"Ġthe": 10, "Ã": 11, "a": 12, "<|begin_of_text|>": 1}
        kind: dict[str, Any] = {"type": "ByteLevel"}
    else:
        vocabulary = {"▁the": 10, "<0xC3>": 11, "a": 12, "<s>": 1}
        kind = {"type": "Metaspace"}
    described = {"model": {"vocab": vocabulary}, "pre_tokenizer": kind, "added_tokens": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps(described), encoding="utf-8")
    pieces = [b"<PAD>", b"<BOS>", b"<EOS>", b"\xc3", b" the", b"zebra", b"a"]
    config = config_of(8)
    engine, drawn = started(tmp_path, config, pieces), LocalEngine(config, ALONE)
    weight, its = engine.masters["lm_head.weight"], theirs.lm_head.weight
    rows = {int(SpecialToken.BEGIN_DOCUMENT): 1, 3: 11, 4: 10, 6: 12}
    for row in range(8):
        wanted = its[rows[row]] if row in rows else drawn.masters["lm_head.weight"][row]
        assert torch.equal(weight[row], wanted), row


def test_another_network_is_refused_with_every_value_to_set(tmp_path: Path) -> None:
    save_llama(tmp_path)
    with pytest.raises(UserError) as refused:
        started(tmp_path, config_of(layers=3, num_kv_heads=4, norm_epsilon=1e-6, qk_norm=True))
    told = str(refused.value)
    assert "set model.layers=2 model.num_kv_heads=2 model.norm_epsilon=1e-05" in told
    assert "set model.qk_norm=false" in told
    for key, value, complaint in (
        ("model_type", "gpt2", "only 'llama', 'mistral', 'qwen2' and 'qwen3' can be read"),
        (
            "rope_parameters",
            {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0},
            "rotary embedding is scaled",
        ),
        ("attention_bias", True, "attention_bias"),
        ("head_dim", 16, r"set model\.head_dim=16"),
        ("hidden_size", None, "config.json is not a llama model's"),
    ):
        settings = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "changed").mkdir(exist_ok=True)
        (tmp_path / "changed" / "config.json").write_text(json.dumps({**settings, key: value}))
        with pytest.raises(UserError, match=complaint):
            started(tmp_path / "changed", config_of())


def test_files_that_are_missing_or_torn_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.init_from: cannot read .*config\.json"):
        started(tmp_path, config_of())
    save_llama(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    name = index["weight_map"]["model.norm.weight"]
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[:-8])
    with pytest.raises(UserError, match=name):
        started(tmp_path, config_of())
    (tmp_path / name).write_bytes(whole)
    del index["weight_map"]["model.norm.weight"]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"index\.json does not fit: model\.norm\.weight"):
        started(tmp_path, config_of())


def single_file(folder: Path) -> dict[str, torch.Tensor]:
    """A Llama saved whole, and its tensors."""
    save_llama(folder / "parts")
    folder.joinpath("one").mkdir()
    tensors = {}
    for part in sorted((folder / "parts").glob("*.safetensors")):
        tensors |= load_file(part)
    shutil.copy(folder / "parts" / "config.json", folder / "one")
    save_file(tensors, folder / "one" / "model.safetensors")
    return tensors


def test_tensors_without_a_place_are_refused_by_name(tmp_path: Path) -> None:
    tensors, file = single_file(tmp_path), tmp_path / "one" / "model.safetensors"
    query = "model.layers.1.self_attn.q_proj"
    for name, values in {
        f"{query}.bias": torch.ones(32),
        f"{query}.weight_scale": torch.ones(1),
        f"{query}.lora_A.weight": torch.ones(4, 32),
        "model.layers.0.self_attn.k_norm.weight": torch.ones(8),
        "model.layers.2.input_layernorm.weight": torch.ones(32),
        "score.weight": torch.ones(2, 32),
    }.items():
        save_file({**tensors, name: values}, file)
        with pytest.raises(UserError, match=f"this network has no place for {name}"):
            started(tmp_path / "one", config_of())
    # What a Llama computes anew is passed over, as transformers does.
    save_file({**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, file)
    started(tmp_path / "one", config_of())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_numbers_that_need_a_scale_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = single_file(tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name].to(dtype)}, tmp_path / "one" / "model.safetensors")
    with pytest.raises(UserError, match=f"{name} is stored as .* take the weights that are not quantised"):
        started(tmp_path / "one", config_of())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"residual_multiplier": 0.22}, "residual_multiplier"),
        ({"layer_types": ["sliding_attention"]}, "layer_types"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5}},
            "partial",
        ),
        ({"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": {"factor": 2.0}}, "is scaled"),
        (
            {"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            r"set model\.rope_scaling\.type=linear model\.rope_scaling\.factor=2\.0",
        ),
        ({"vocab_size": 7}, r"says \[7, 32\] \(vocab_size"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "is scaled in two ways"),
        ({"rope_scaling": 2.0}, "is scaled"),
        ({"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": "linear"}, "is scaled"),
    ],
)
def test_settings_that_change_the_numbers_are_refused(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    save_llama(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | changes))
    with pytest.raises(UserError, match=words):
        started(tmp_path, config_of())


def test_settings_that_change_nothing_are_passed_over(tmp_path: Path) -> None:
    save_llama(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    harmless = {
        "unsloth_fixed": True, "_attn_implementation_autoset": True, "auto_map": {}, "pretraining_tp": 2,
        "attention_dropout": 0.1, "partial_rotary_factor": 1.0, "sliding_window": None, "transformers_version": "9",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(settings | harmless))
    started(tmp_path, config_of())


def test_two_truths_in_one_folder_are_refused(tmp_path: Path) -> None:
    tensors = single_file(tmp_path)
    save_file(tensors, tmp_path / "parts" / "model.safetensors")
    with pytest.raises(
        UserError, match=r"it holds model\.safetensors beside model-00001-of-.*only one of them"
    ):
        started(tmp_path / "parts", config_of())


def test_a_tied_head_that_is_stored_apart_must_be_the_embedding(tmp_path: Path) -> None:
    """transformers 4 takes the embedding, 5 the stored head."""
    tensors, file = single_file(tmp_path), tmp_path / "one" / "model.safetensors"
    settings = json.loads((tmp_path / "one" / "config.json").read_text())
    (tmp_path / "one" / "config.json").write_text(json.dumps(settings | {"tie_word_embeddings": True}))
    with pytest.raises(UserError, match=r"tie_word_embeddings=true, and lm_head\.weight is stored apart"):
        started(tmp_path / "one", config_of())
    embedding = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": embedding.clone()}, file)
    head = started(tmp_path / "one", config_of()).masters["lm_head.weight"][:VOCABULARY]
    assert torch.equal(head, embedding.float())


def test_a_head_that_is_missing_is_not_taken_for_a_tied_one(tmp_path: Path) -> None:
    tensors = single_file(tmp_path)
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "one" / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head\.weight is in none of its files"):
        started(tmp_path / "one", config_of())


@pytest.mark.parametrize("changes", [{}, {"position": "2d"}, {"num_kv_heads": 1, "norm_epsilon": 1e-6}])
def test_transformers_opens_an_exported_text_tower(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Logits, the tokenizer's ids with <BOS> before them, and what generation never chooses."""
    tokenizer = train_tokenizer(["a handwritten three"] * 9, tmp_path / "tokenizer.model", vocabulary=320)
    rows = tokenizer.vocabulary + 3
    engine = LocalEngine(config_of(rows, **changes), ALONE)
    torch.manual_seed(0)
    for values in (*engine.masters.values(), *engine.average.averages):
        values.detach().add_(0.1 * torch.randn(values.shape))
    save(tmp_path / "run", engine, TrainState(step=1), keep=1)
    shutil.copy(tokenizer.path, tmp_path / "run")
    out = export_text_model(tmp_path / "run", tmp_path / "text")

    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager").eval()
    assert type(theirs) is transformers.LlamaForCausalLM and theirs.dtype == torch.float32
    averages = dict(zip(engine.masters, engine.average.averages, strict=True))
    engine.model.load_state_dict(averages)
    ids = torch.randint(0, rows, (2, 24))
    with torch.no_grad():
        wanted = logits(engine, ids)
        assert (theirs(input_ids=ids).logits - wanted).abs().max() <= 2e-6
        assert (
            theirs(input_ids=ids).logits - logits(LocalEngine(engine.config, ALONE), ids)
        ).abs().max() > 1e-2

    read = transformers.AutoTokenizer.from_pretrained(out)
    for text in ("three <BOS>", "  a\u2581\n<EOI>  ", "", "e\u0301\U0001f468\u200d\U0001f469\0"):
        ours = tokenizer.encode(text)
        assert read.encode(text, add_special_tokens=False) == ours and read.encode(text) == [1, *ours]
        assert read.decode([1, *ours, 4, 2], skip_special_tokens=True) == text
    answer = theirs.generate(torch.tensor([read.encode("a")]), max_new_tokens=30)[0, 2:]
    assert all(token == 2 or len(SpecialToken) <= token < tokenizer.vocabulary for token in answer.tolist())


def test_transformers_opens_the_tokenizer_of_a_whole_export(tmp_path: Path) -> None:
    """Without <BOS>, as ours."""
    tokenizer = train_tokenizer(["a handwritten three"] * 9, tmp_path / "tokenizer.model", vocabulary=320)
    save(tmp_path / "run", LocalEngine(config_of(tokenizer.vocabulary), ALONE), TrainState(step=1), keep=1)
    shutil.copy(tokenizer.path, tmp_path / "run")
    out = export(tmp_path / "run", tmp_path / "model")
    one = transformers.PreTrainedTokenizerFast(tokenizer_file=str(out / "tokenizer.json"))
    for read in (one, transformers.AutoTokenizer.from_pretrained(out)):
        for text in ("three <BOS><s>", "  a\u2581\n<PATCH>  ", "", "e\u0301\U0001f468\u200d\U0001f469\0"):
            assert read(text)["input_ids"] == tokenizer.encode(text)
