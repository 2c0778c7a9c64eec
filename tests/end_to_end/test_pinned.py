"""The first batches and losses of a training run, against the committed record of `campaigns/pinned.py`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "campaigns"))

import pinned  # noqa: E402

RECORD = json.loads((ROOT / "tests" / "assets" / "pinned.json").read_text(encoding="utf-8"))
WRITTEN_BY = "where a change means to alter this, write tests/assets/pinned.json anew: campaigns/pinned.py"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pinned")
    pinned.prepare(folder)
    return folder


@pytest.mark.parametrize(("ranks", "name"), [(1, "batches, one rank"), (2, "batches, two ranks")])
def test_batches_are_those_of_the_record(ranks: int, name: str, prepared: Path) -> None:
    assert pinned.batches(prepared, ranks) == RECORD[name], WRITTEN_BY


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "name"), [(1, "losses, one process"), (2, "losses, ZeRO-3")])
def test_losses_are_those_of_the_record(processes: int, name: str, prepared: Path) -> None:
    """Another processor sums in another order, and what that changes grows from step to step."""
    measured: Any = pinned.losses(prepared, processes)
    for step, (here, there) in enumerate(zip(measured, RECORD[name], strict=True), start=1):
        most = 1e-5 if step <= 10 else 5e-3
        assert here == pytest.approx(there, rel=most), f"step {step}: {WRITTEN_BY}"
