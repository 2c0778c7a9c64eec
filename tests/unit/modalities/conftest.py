"""A configuration of texts, images and sounds in shards."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from transfusion import Pipeline
from transfusion.config import Config
from transfusion.data.shards.webdataset import write_shards
from transfusion.families.build import build_model
from transfusion.model.initialise import initialise
from transfusion.sequence.sizes import Size
from transfusion.sequence.tokenizer import Tokenizer, train_tokenizer

sys.path.append(str(Path(__file__).parent))

from sounds import SOUND, samples


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    texts = ["a low middle high sound grey: the word stands here alone, 0123456789"] * 4
    train_tokenizer(texts, tmp_path / "t.model", vocabulary=300)
    return Tokenizer(tmp_path / "t.model")


@pytest.fixture
def config(tmp_path: Path, tokenizer: Tokenizer) -> Callable[..., Config]:
    """Of the shards above, or of others."""
    write_shards(samples(), tmp_path / "shards")

    def made(shards: str = "shards", **sections: Any) -> Config:
        source = {"name": "all", "shards": f"{tmp_path}/{shards}/*.tar", "kind": "mixed"}
        values: dict[str, Any] = {
            "run": {"dir": str(tmp_path / "run")},
            "model": {"layers": 2, "hidden_size": 32, "heads": 2, "patch_size": 4},
            "codec": {"channels": 1, "image_size": 8},
            "modalities": [SOUND],
            "data": {
                "tokenizer": str(tokenizer.path), "sources": [source], "validation": [source],
                "sequence_length": 96, "global_batch_size": 4, "max_bad_fraction": 1.0,
            },
            "train": {"precision": "fp32", "steps": 30, "threads": 1},
            "optimizer": {"learning_rate": 3e-3, "warmup_steps": 1},
            "log": {"every": 1},
        }  # fmt: skip
        for name, section in sections.items():
            values[name] = values.get(name, {}) | section if isinstance(section, dict) else section
        return Config.model_validate(values).with_vocabulary(tokenizer.vocabulary)

    return made


@pytest.fixture
def untrained(tokenizer: Tokenizer) -> Callable[[Config], Pipeline]:
    """A pipeline of a model that was never trained, whose last layers are no zeros."""

    def made(config: Config) -> Pipeline:
        network = build_model(config)
        initialise(network, seed=1, layers=2)
        with torch.no_grad():
            for parameter in network.parameters():
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
                parameter.add_(noise * 0.05)
        return Pipeline(network.eval(), tokenizer, config, "cpu")

    return made


@pytest.fixture
def begins(monkeypatch: pytest.MonkeyPatch) -> Callable[[Pipeline, Size], None]:
    """Makes what begins an array of a size the likeliest token, whatever the model would say."""

    def made(pipeline: Pipeline, size: Size) -> None:
        begin, logits = pipeline.runner.sizes.begin_token(size), pipeline.runner.logits

        def louder(state_RD: torch.Tensor) -> torch.Tensor:
            found = logits(state_RD)
            found[:, begin] += 100.0
            return found

        monkeypatch.setattr(pipeline.runner, "logits", louder)

    return made
