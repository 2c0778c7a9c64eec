"""The spoken digits: made by the synthesiser of the system, learned, judged."""

from __future__ import annotations

import json
import os
import shutil
import sys
import wave
from collections.abc import Callable
from pathlib import Path

import pytest
from sounds import SOUND

from transfusion import Pipeline
from transfusion.checkpoint.export import export
from transfusion.config import Config
from transfusion.data.prepare import spoken_digits as spoken
from transfusion.data.prepare.digits import DIGIT_WORDS
from transfusion.data.prepare.prepare import prepare
from transfusion.errors import UserError
from transfusion.evaluate.report.page import write_report
from transfusion.evaluate.suites.settings import SpokenDigitsSuite
from transfusion.evaluate.suites.spoken_digits import spoken_digits
from transfusion.training.trainer import train

pytest.importorskip("soundfile", reason="soundfile is not installed (extra: audio)")
pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra: evaluate)")
pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: report)")
MEL = {
    "name": "sound", "kind": "mel", "shapes": ["1x16384"], "patch": "1x1024", "scale": 0.3, "shift": -6.0,
    "diffusion": {"prediction": "flow"},
}  # fmt: skip


def test_without_a_synthesiser_it_is_told_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(shutil, "which", lambda program: None)
    with pytest.raises(
        UserError, match="espeak-ng is not installed, which speaks the digits: apt-get install"
    ):
        prepare("spoken-digits", tmp_path / "out")


def test_the_split_is_by_voice(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one voice is for validation; remove --validation"):
        prepare("spoken-digits", tmp_path / "out", validation=0.5)


# Says each word as a tone of its own, so that this runs where there is no speech.
SYNTHESISER = """#!{python}
import math, sys, wave
if sys.argv[1] == "--version":
    print("a synthesiser of tests")
    sys.exit()
options, word = dict(zip(sys.argv[1:-1:2], sys.argv[2:-1:2])), sys.argv[-1]
hertz = 200 + 150 * {words}.index(word)
samples = [int(12000 * math.sin(2 * math.pi * hertz * place / 22050)) for place in range(11000)]
with wave.open(options["-w"], "wb") as file:
    file.setparams((1, 2, 22050, len(samples), "NONE", ""))
    file.writeframes(b"".join(value.to_bytes(2, "little", signed=True) for value in samples))
"""


@pytest.fixture
def synthesiser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "espeak-ng"
    program.parent.mkdir()
    program.write_text(SYNTHESISER.format(python=sys.executable, words=DIGIT_WORDS))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.usefixtures("synthesiser")
def test_they_are_spoken_learned_and_judged(
    config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spoken, "_SPEEDS", (190,))
    monkeypatch.setattr(spoken, "_PITCHES", (50,))
    prepared = prepare("spoken-digits", tmp_path / "spoken")
    assert (prepared.train, prepared.validation) == (50, 10) and not prepared.skipped
    shards = {"name": "spoken", "shards": f"{tmp_path}/spoken/train/*.tar"}
    held = {"name": "spoken", "shards": f"{tmp_path}/spoken/validation/*.tar"}
    made = config(
        modalities=[MEL],
        data={"sources": [shards], "validation": [held]},
        train={"steps": 3, "precision": "fp32"},
    )
    assert train(made) == 0
    pipeline = Pipeline.from_export(export(tmp_path / "run", tmp_path / "export"))
    metrics = spoken_digits(pipeline, tmp_path / "run", SpokenDigitsSuite(count=1, steps=2, max_tokens=4))
    assert metrics["spoken_classifier_accuracy_on_real"].value == 1
    assert metrics["transcription_accuracy"].count == metrics["spoken_generation_accuracy"].count == 10
    left = tmp_path / "run" / "evaluation"
    assert [json.loads(line)["expected"] for line in (left / "captions.jsonl").open()] == list(DIGIT_WORDS)
    with wave.open(str(left / "generated" / "0003.wav")) as heard:
        assert (heard.getframerate(), heard.getnframes(), heard.getsampwidth()) == (16_000, 16_384, 2)
    for folder in ("generated", "validation"):
        assert [len(list((left / folder).glob(f"*.{kind}"))) for kind in ("png", "wav")] == [10, 10]
    page = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "Sounds from texts" in page and page.count("<audio") >= 20


def test_other_models_are_refused(config: Callable[..., Config], tmp_path: Path) -> None:
    pipeline = type("Stub", (), {"config": config(modalities=[SOUND])})()
    with pytest.raises(UserError, match="a modality sound of kind mel"):
        spoken_digits(pipeline, tmp_path, SpokenDigitsSuite())
