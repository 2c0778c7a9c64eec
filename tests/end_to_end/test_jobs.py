"""launch/quickstart.sh and launch/emoji.sh: from nothing to the report, and on again, in a few steps of training."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from transfusion.observe.metrics import read_metrics

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FEW_STEPS = (
    "train.steps=6",
    "checkpoint.every=3",
    "sample_grid.per_prompt=1",
    "sample_grid.steps=2",
    "train.threads=1",
)
# A network whose thousand images take seconds.
TINY = ("model.layers=1", "model.hidden_size=32", "model.heads=2", "data.sequence_length=96")
Job = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the script reads of the checkout, with the environment that runs these tests as its .venv."""
    environment = Path(sys.prefix)
    if not (environment / ".installed").is_file():
        pytest.skip("these tests do not run in an environment that launch/test.sh made")
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("launch", "configs"):
        shutil.copytree(ROOT / name, folder / name)
    for name in ("setup.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(environment)
    return folder


@pytest.fixture
def job(checkout: Path) -> Job:
    def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(checkout / "launch" / script), *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        # From another folder: the script finds its own.
        return subprocess.run(
            command, cwd="/", env=environment, capture_output=True, text=True, timeout=400, check=False
        )

    return run


def stages(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line.removeprefix("== ") for line in done.stderr.splitlines() if line.startswith("== ")]


def test_from_nothing_to_the_report_and_on_again(
    checkout: Path, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVALUATION", "digits.count=2 digits.steps=10 digits.max_tokens=8")
    done = job("quickstart.sh", *FEW_STEPS)
    assert done.returncode == 0, done.stdout + done.stderr
    everything = ["set-up", "prepare", "tokenizer", "train", "export", "sample", "evaluate", "report"]
    assert stages(done) == everything
    run = checkout / "runs" / "quickstart"
    assert "two" in (run / "report.html").read_text(encoding="utf-8")
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert {"generation_accuracy", "caption_accuracy", "text_loss_nats_per_token"} <= set(metrics)
    assert len((run / "images" / "index.jsonl").read_text(encoding="utf-8").splitlines()) == 16
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == list(range(1, 7))

    monkeypatch.setenv("EVALUATION", "digits.count=1 digits.steps=5 digits.max_tokens=8")
    again = job("quickstart.sh", *FEW_STEPS)
    assert again.returncode == 0, again.stdout + again.stderr
    # Nothing is made twice but what is asked for otherwise; training finds that it is done.
    assert stages(again) == ["set-up", "prepare", "train", "evaluate", "report"]
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["details"]["generation_accuracy"]["count"] == 10
    assert (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines() == lines


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The system's emoji font with faces and weather alone, so that the job takes a minute."""
    found = next(Path("/usr/share/fonts").rglob("NotoColorEmoji.ttf"), None)
    if found is None:
        pytest.skip("apt-get install fonts-noto-color-emoji")
    subset = pytest.importorskip("fontTools.subset", reason="pip install fonttools")
    font = subset.load_font(str(found), subset.Options())
    chosen = subset.Subsetter()
    chosen.populate(unicodes=[*range(0x1F600, 0x1F650), *range(0x1F300, 0x1F330)])
    chosen.subset(font)
    path = tmp_path_factory.mktemp("font") / "faces.ttf"
    subset.save_font(font, str(path), subset.Options())
    return path


def test_emoji_of_a_font_to_the_report_and_on_again(
    checkout: Path, job: Job, faces: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FONT", str(faces))
    monkeypatch.setenv("CODEC_STEPS", "4")
    monkeypatch.setenv(
        "EVALUATION", "images.count=40 images.steps=5 nearest.count=8 nearest.steps=5 captions.max_tokens=8"
    )
    done = job("emoji.sh", *FEW_STEPS, *TINY)
    assert done.returncode == 0, done.stdout + done.stderr
    everything = [
        "set-up",
        "prepare",
        "codec",
        "tokenizer",
        "train",
        "export",
        "sample",
        "evaluate",
        "report",
    ]
    assert stages(done) == everything
    run = checkout / "runs" / "emoji-font"
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    named = {"classifier_frechet", "caption_token_f1", "distance_to_nearest_training_image"}
    assert metrics["details"]["classifier_frechet"]["count"] == 40
    assert named | {"text_loss_nats_per_token"} <= set(metrics)
    assert (run / "evaluation" / "nearest.png").is_file() and (run / "report.html").is_file()
    again = job("emoji.sh", *FEW_STEPS, *TINY)
    assert stages(again) == ["set-up", "prepare", "train", "report"], again.stdout + again.stderr


@pytest.mark.parametrize("script", ["quickstart.sh", "emoji.sh"])
@pytest.mark.parametrize("argument", ["train.stepz=6", "--what", "steps"])
def test_a_mistake_ends_before_anything_is_made(checkout: Path, job: Job, script: str, argument: str) -> None:
    before = sorted(checkout.rglob("*"))
    done = job(script, argument)
    assert done.returncode == 2
    assert len([line for line in done.stderr.splitlines() if line and not line.startswith("==")]) == 1
    assert sorted(checkout.rglob("*")) == before
