"""A run with a published model's own tokenizer: its rows, its export, and what transformers makes of that."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from transfusion.checkpoint.export import export, read_export
from transfusion.checkpoint.published_weights import start_from_published
from transfusion.checkpoint.text_model import export_text_model
from transfusion.config import Config
from transfusion.data.prepare.prepare import prepare
from transfusion.generate.pipeline import Pipeline
from transfusion.observe.console import start_logging
from transfusion.parallel.environment import Environment
from transfusion.parallel.local import LocalEngine
from transfusion.sequence.tokenizer import Tokenizer
from transfusion.tokens import SpecialToken
from transfusion.training.trainer import Trainer

tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed (extra: tokenizers)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: oracles)")

ALONE = Environment(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"), threads=1)
MOVED = len(SpecialToken)
ROWS = 384
TEXTS = (
    "a handwritten three",
    "  a\u2581\n<EOI> <|im_end|> ",
    "",
    "e\u0301\U0001f468\u200d\U0001f469\0",
    "<BOS>",
)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with more rows than its byte-level tokenizer has pieces, as published ones have."""
    folder = tmp_path_factory.mktemp("published")
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )
    library.train_from_iterator(["a handwritten three", "a handwritten seven"] * 30, trainer)
    library.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=ROWS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=[2, 0],
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finished(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run of two steps on images and captions."""
    folder = tmp_path_factory.mktemp("run")
    prepare("digits", folder / "digits")
    config = config_of(published, published / "tokenizer.json", folder)
    trainer = Trainer(config, ALONE)
    try:
        trainer.run()
    finally:
        trainer.lock.close()
        start_logging(None)
    return config


def config_of(init_from: Path, tokenizer: Path, folder: Path, **model: Any) -> Config:
    return Config.model_validate(
        {
            "run": {"dir": str(folder / "run")},
            "model": {
                "layers": 2, "hidden_size": 32, "heads": 4, "num_kv_heads": 2, "ffn_size": 48, **model,
            },
            "codec": {"channels": 1, "image_size": 8},
            "data": {
                "tokenizer": str(tokenizer),
                "sources": [{"name": "digits", "shards": f"{folder}/digits/validation/*.tar"}],
                "sequence_length": 64,
                "global_batch_size": 4,
                "micro_batch_size": 2,
            },
            "train": {"steps": 2, "precision": "fp32", "engine": "local", "init_from": str(init_from)},
        }
    )  # fmt: skip


def started(folder: Path, tokenizer: Tokenizer, vocabulary: int = 0) -> dict[str, torch.Tensor]:
    config = config_of(folder, tokenizer.path, folder, vocabulary=vocabulary or tokenizer.vocabulary)
    engine = LocalEngine(config, ALONE)
    start_from_published(folder, engine, tokenizer)
    return engine.masters


@pytest.mark.parametrize("beside", [True, False])
def test_rows_stand_behind_the_control_tokens(published: Path, tmp_path: Path, beside: bool) -> None:
    """With the tokenizer in the model's folder, and without it."""
    tokenizer = Tokenizer(published / "tokenizer.json")
    for name in ("config.json", "model.safetensors", *(["tokenizer.json"] if beside else [])):
        (tmp_path / name).symlink_to(published / name)
    masters = started(tmp_path, tokenizer)
    theirs = transformers.LlamaForCausalLM.from_pretrained(published)
    for ours, weight in (
        (masters["embedding.weight"], theirs.model.embed_tokens.weight),
        (masters["lm_head.weight"], theirs.lm_head.weight),
    ):
        pieces = tokenizer.vocabulary - MOVED
        assert torch.equal(ours[MOVED:], weight[:pieces])
        assert torch.equal(ours[SpecialToken.BEGIN_DOCUMENT], weight[1])
        assert torch.equal(ours[SpecialToken.END_DOCUMENT], weight[2])
        for token in (SpecialToken.BEGIN_IMAGE, SpecialToken.END_IMAGE, SpecialToken.PADDING):
            assert not (ours[token] == weight).all(1).any()


def test_our_pieces_find_theirs_by_their_bytes_as_before(published: Path, tmp_path: Path) -> None:
    """A tokenizer of ours beside a published one."""
    config = config_of(published, tmp_path, tmp_path, vocabulary=9)
    engine = LocalEngine(config, ALONE)
    pieces = [b"<PAD>", b"<BOS>", b"<EOS>", b" handwritten", b"\xc3"]
    start_from_published(published, engine, SimpleNamespace(piece_bytes=lambda: pieces))  # type: ignore[arg-type]
    numbers = json.loads((published / "tokenizer.json").read_text())["model"]["vocab"]
    weight = transformers.LlamaForCausalLM.from_pretrained(published).lm_head.weight
    assert torch.equal(engine.masters["lm_head.weight"][3], weight[numbers["Ġhandwritten"]])
    assert torch.equal(engine.masters["lm_head.weight"][4], weight[numbers["Ã"]])


def test_a_run_is_exported_with_its_tokenizer(finished: Config, tmp_path: Path) -> None:
    run = Path(finished.run.folder)
    assert (run / "tokenizer.json").read_bytes() == Path(finished.data.tokenizer).read_bytes()
    assert not (run / "tokenizer.model").exists()
    ours = Tokenizer(run / "tokenizer.json")
    out = export(run, tmp_path / "model")
    assert not (out / "tokenizer.model").exists() and read_export(out).tokenizer == out / "tokenizer.json"
    pipeline = Pipeline.from_export(out)
    assert pipeline.tokenizer.encode_all(TEXTS) == ours.encode_all(TEXTS)
    read = transformers.AutoTokenizer.from_pretrained(out)
    for text in TEXTS:
        assert read(text)["input_ids"] == ours.encode(text)


def test_transformers_opens_the_text_tower_with_the_same_ids(finished: Config, tmp_path: Path) -> None:
    """And a new run starts from it bit for bit, by its tokenizer or the published one."""
    run = Path(finished.run.folder)
    ours = Tokenizer(run / "tokenizer.json")
    out = export_text_model(run, tmp_path / "text")
    read = transformers.AutoTokenizer.from_pretrained(out)
    for text in TEXTS:
        ids = ours.encode(text)
        assert read.encode(text, add_special_tokens=False) == ids and read.encode(text) == [1, *ids]
        assert read.decode([1, *ids, 4, 2], skip_special_tokens=True) == text
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    answer = model.generate(torch.tensor([read.encode("a")]), max_new_tokens=20)[0, 2:]
    assert all(token == 2 or MOVED <= token < ours.vocabulary for token in answer.tolist())
    for tokenizer in (Tokenizer(out / "tokenizer.json"), ours):
        masters = started(out, tokenizer)
        assert torch.equal(masters["lm_head.weight"], model.lm_head.weight)
        assert torch.equal(masters["embedding.weight"], model.model.embed_tokens.weight)
    more = started(out, Tokenizer(out / "tokenizer.json"), ours.vocabulary + 3)
    assert torch.equal(more["lm_head.weight"][: ours.vocabulary], model.lm_head.weight)
