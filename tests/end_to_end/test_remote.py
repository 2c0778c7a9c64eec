"""Training from URLs as a user would: index, cache, faults and their exit code, and no credentials written down."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Protocol

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import pytest

from web import Web


class Commands(Protocol):
    folder: Path

    def run(self, *arguments: str, processes: int = 1, code: int = 0) -> str: ...

    def train(self, run: str, *overrides: str) -> list[str]: ...


@pytest.mark.slow
def test_training_from_a_server(workplace: Commands) -> None:
    with contextlib.closing(Web(workplace.folder)) as web:
        base = web.address.replace("http://", "http://me:hunter2@") + "/data/quickstart/digits"
        sources = [
            f"data.sources.0.shards={base}/train/{{00000..00001}}.tar?X-Amz-Signature=hunter2",
            f"data.validation.0.shards={base}/validation/00000.tar",
        ]
        said = [workplace.run(*workplace.train("remote", *sources, "train.steps=3"))]
        asked = web.asked.total()
        # What was downloaded stays, so going on asks for nothing.
        said.append(workplace.run(*workplace.train("remote", *sources, "train.steps=6")))
        assert web.asked.total() == asked == 3
        web.behave = lambda name, number, body: None
        dead = [
            "data.cache.folder=elsewhere",
            "data.cache.pause=0",
            "data.cache.attempts=2",
            "data.max_bad_fraction=0",
        ]
        said.append(workplace.run(*workplace.train("remote", *sources, *dead, "train.steps=9"), code=2))
    assert "could not be read, more than data.max_bad_fraction" in said[-1]
    assert "(http://***@" in said[-1] and "download failed: curl ended with status 52)" in said[-1]
    assert "Traceback" not in said[-1]
    written = [path for path in workplace.folder.rglob("*") if path.is_file()]
    assert any(path.name == "env.json" for path in written)
    assert not any(b"hunter2" in path.read_bytes() for path in written)
    assert not any("hunter2" in text for text in said)
