"""Makes the handmade batches of the distributed tests and the pairs beside this file importable here."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from transfusion.config import Config
from transfusion.generate.pipeline import Pipeline

sys.path += [str(Path(__file__).parents[2] / "dist"), str(Path(__file__).parent)]

Open = Callable[..., Path]


@pytest.fixture
def open_model(build_model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    """open_model(data section, **build_model's) -> a folder that `run_suites` opens as that untrained model."""

    def make(data: dict[str, Any], **fields: Any) -> Path:
        config, network = build_model(**fields)
        values = config.as_dict()
        values["data"] = {"sequence_length": 128, "tokenizer": str(tokenizer.path), **data}
        values["run"] = {"dir": str(tmp_path / "run")}
        pipeline = Pipeline(network, tokenizer, Config.model_validate(values), "cpu")
        monkeypatch.setattr(Pipeline, "from_export", lambda *_, **__: pipeline)
        return tmp_path / "model"

    return make
