"""Makes the handmade batches of the distributed tests and the pairs beside this file importable here."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
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


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], AbstractContextManager[None]]:
    """as_rank(rank, ranks) -> a context in which this process is that one of a launcher's; of one rank it is alone."""

    @contextmanager
    def place(rank: int, ranks: int) -> Iterator[None]:
        values = {
            "RANK": rank,
            "WORLD_SIZE": ranks,
            "LOCAL_RANK": rank,
            "MASTER_ADDR": "here",
            "MASTER_PORT": 1,
        }
        with monkeypatch.context() as patched:
            for name, value in values.items() if ranks > 1 else ():
                patched.setenv(name, str(value))
            yield

    return place
