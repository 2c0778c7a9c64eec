"""A small run of the campaign over odd inputs, and that what is wrong is noticed in each kind."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from transfusion.config import Config
from transfusion.data.shards.sample import SampleError

sys.path.append(str(Path(__file__).parents[3] / "campaigns"))
import odd_base
import odd_inputs
import odd_shards


@pytest.mark.parametrize("kind", odd_inputs.KINDS)
def test_odd_inputs_are_read_rightly_or_refused(kind: str) -> None:
    counts, wrong = odd_inputs.run([kind], times=15, seed=0)
    assert not wrong
    assert counts.total() == 15 and counts[f"{kind}, read"]


@pytest.mark.parametrize("kind", odd_inputs.KINDS)
def test_the_same_seed_makes_the_same_inputs(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def note(what: str, *_: object, **__: object) -> odd_inputs.Outcome:
        made.append(what)
        return odd_inputs.Outcome(what, "read")

    monkeypatch.setattr(odd_inputs, "judge", note)
    monkeypatch.setattr(odd_shards, "judge", note)
    for seed in (0, 0, 1):
        odd_inputs.run([kind], times=10, seed=seed)
    part = len(made) // 3
    assert made[:part] == made[part : 2 * part] != made[2 * part :]


def square(text: str, _: object) -> str:
    """Takes 0.05 s for the shorter text, and sixteen times as long for the longer one."""
    end = time.process_time() + 0.05 * (len(text) / odd_inputs.CHARACTERS["document"]) ** 2
    while time.process_time() < end:
        pass
    return text


def refuse(*_: object, **__: object) -> Any:
    raise SampleError("image_corrupt")


def crash(*_: object, **__: object) -> Any:
    raise KeyError("odd")


def hang(*_: object, **__: object) -> Any:
    try:
        while True:
            pass
    except Exception:
        return []


# Kind, reader, what is in its place, and what must be told of it.
FAULTS: list[tuple[str, str, Any, str]] = [
    ("weights", "read_kl", lambda _: odd_inputs.kl_base()[1], "is read as if nothing were odd"),
    (
        "weights",
        "read_kl",
        lambda _: {n: t.half() for n, t in odd_inputs.kl_base()[1].items()},
        "of torch.float16",
    ),
    ("weights", "start_from_published", lambda *_: None, "is read with other numbers"),
    ("configuration", "load_config", lambda *_: Config(), "is read as"),
    ("configuration", "parse", lambda _: {}, "is read as {}"),
    ("images", "decode", lambda *_, **__: np.zeros((3, 16, 16)), "is read as [0.0, 0.0, 0.0]"),
    ("images", "decode", refuse, "is taken by the index"),
    ("images", "probe", crash, "gives KeyError"),
    ("long", "document", square, "and a quarter of it"),
    ("long", "parse", hang, "takes more than"),
    ("lost", "refuse_too_many", lambda *_: None, "is refused as ''"),
    ("lost", "texts_of", lambda _: [], "has [], not"),
    ("lost", "prepare", crash, "gives KeyError"),
    ("narrow", "encode_shards", lambda *_: [], "has no record of its latents"),
    ("narrow", "scan", lambda *_: [], "is told of as"),
    ("narrow", "cli", SimpleNamespace(_run=lambda: print("\u4e2d") or 0), "gives UnicodeEncodeError"),
]


@pytest.mark.parametrize(("kind", "reader", "fault", "told"), FAULTS)
def test_a_planted_fault_is_noticed(
    kind: str, reader: str, fault: Any, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(odd_shards if kind in ("lost", "narrow") else odd_inputs, reader, fault)
    monkeypatch.setattr(odd_base, "HANG_SECONDS", 2.0)
    if kind == "long":
        monkeypatch.setattr(odd_inputs, "CHARACTERS", {reader: odd_inputs.CHARACTERS[reader]})
    _, wrong = odd_inputs.run([kind], times=1 if kind == "long" else 25, seed=0)
    assert any(told in each for each in wrong)
