"""DeepSpeed of another version is refused before anything is built, and told by the doctor."""

from __future__ import annotations

from pathlib import Path

import pytest

from transfusion.cli import doctor
from transfusion.errors import UserError
from transfusion.parallel.deepspeed_patches import REQUIREMENT, fits, import_deepspeed

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("version", "right"),
    [("0.19.8", True), ("0.19.10+cu128", True), ("0.19.7", False), ("0.20.0", False), ("1.0", False)],
)
def test_which_versions_fit(version: str, right: bool) -> None:
    assert fits(version) == right


def test_another_version_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    deepspeed = pytest.importorskip("deepspeed")
    assert import_deepspeed() is deepspeed
    monkeypatch.setattr(deepspeed, "__version__", "0.21.1")
    with pytest.raises(UserError, match=r"0\.21\.1: DS_BUILD_OPS=0 pip install 'deepspeed>=0\.19\.8,<0\.20'"):
        import_deepspeed()


def test_the_doctor_notes_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda package: "0.21.1")
    (finding,) = doctor._deepspeed()
    assert finding.state == "note" and "0.21.1" in finding.text and REQUIREMENT in finding.remedy


def test_one_requirement_is_stated() -> None:
    assert f'"{REQUIREMENT}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
