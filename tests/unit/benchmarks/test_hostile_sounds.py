"""A small sample of the campaign of hostile sounds, and that it can tell what it looks for."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from transfusion.data.sounds import files
from transfusion.sequence.tokenizer import Tokenizer

pytest.importorskip("soundfile", reason="soundfile is not installed (extra: audio)")
pytest.importorskip("soxr", reason="soxr is not installed (extra: audio)")
sys.path.append(str(Path(__file__).parents[3] / "campaigns"))
import hostile
from hostile_sounds import FORMS, lay_down

FILES = 3 * len(FORMS)


@pytest.fixture(scope="module")
def laid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("sounds")
    lay_down(folder, FILES, seed=0)
    return folder


def problems(folder: Path, tokenizer: Tokenizer) -> list[str]:
    manifest = json.loads((folder / "manifest.json").read_text())
    return [
        problem
        for name, facts in manifest["shards"].items()
        for problem in hostile.check_shard(facts, hostile.read(folder / name, tokenizer))
    ]


def test_every_sound_is_read_or_has_its_reason(laid: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert problems(laid, tokenizer) == []
    manifest = json.loads((laid / "manifest.json").read_text())
    assert hostile.check_index(laid, manifest, tmp_path, tokenizer.path) == []
    cases = [case["case"] for facts in manifest["shards"].values() for case in facts["samples"]]
    assert len(cases) == FILES and set(cases) == {form.__name__ for form in FORMS}


def test_the_same_seed_lays_down_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        (tmp_path / name).mkdir()
        lay_down(tmp_path / name, len(FORMS), seed)
    one, again, other = ((tmp_path / name / "00000.tar").read_bytes() for name in ("one", "again", "other"))
    assert one == again != other


@pytest.mark.parametrize(
    ("name", "fault", "told"),
    [
        ("_is_cut", lambda data: False, "(cut_behind_its_header): 1 times given and 0 times told"),
        ("_LOUDEST", 3.2e38, "(not_finite): 1 times given and 0 times told"),
        ("_RATES", (0, 5_000_000_000), "(odd_rate): 1 times given and 0 times told"),
        ("_RATES", (1_000, 48_000), "(ninety_six_kilohertz): left out as ['sound_rate'], not as None"),
        ("_UNKNOWN_LENGTH", -1, "(tells_no_length): left out as ['sound_too_long'], not as sound_length"),
    ],
)
def test_a_planted_fault_is_noticed(
    laid: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, name: str, fault: Any, told: str
) -> None:
    monkeypatch.setattr(files, name, fault)
    assert any(told in problem for problem in problems(laid, tokenizer))


def test_a_sample_that_is_lost_is_noticed(laid: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    manifest = json.loads((laid / "manifest.json").read_text()) | {"samples": FILES + 1}
    assert hostile.check_index(laid, manifest, tmp_path, tokenizer.path) == [
        f"{FILES} of {FILES + 1} samples are accounted for"
    ]
