"""A watcher measures every checkpoint once, also one that was killed, and ends behind the last step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from handmade import small_config

from transfusion.checkpoint.layout import step_folder
from transfusion.checkpoint.save import save
from transfusion.errors import UserError
from transfusion.evaluate import watch as module
from transfusion.evaluate.metrics.metric import Metric
from transfusion.evaluate.watch import EXPORT, RECORD, evaluations, watch
from transfusion.parallel.environment import Environment
from transfusion.parallel.local import LocalEngine
from transfusion.schema import TrainState

ALONE = Environment(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"), threads=1)
STEPS = 3


@pytest.fixture(scope="module")
def engine() -> LocalEngine:
    return LocalEngine(small_config(train__steps=STEPS), ALONE)


class Training:
    """A run whose next checkpoint is saved whenever the watcher waits."""

    def __init__(self, folder: Path, engine: LocalEngine, *, keep: int = 9) -> None:
        self.folder, self.engine, self.keep, self.step, self.waits = folder, engine, keep, 0, 0
        self.measured: list[float] = []
        self.outs: list[str] = []
        folder.mkdir()
        (folder / "tokenizer.model").write_bytes(b"pieces")

    def save(self) -> None:
        self.step += 1
        save(self.folder, self.engine, TrainState(step=self.step), keep=self.keep)

    def wait(self, seconds: float) -> None:
        assert seconds == module.POLL_SECONDS
        self.waits += 1
        self.save()

    def measure(self, model: Path, out: Path) -> dict[str, Metric]:
        assert (model / "config.json").is_file()
        self.measured.append(self.step)
        self.outs.append(out.name)
        return {"distance": Metric(value=10.0 - self.step, how="by hand")}

    def watch(self, *, once: bool = False) -> list[str]:
        told: list[str] = []
        watch(self.folder, self.measure, once=once, say=told.append, wait=self.wait)
        return told


@pytest.fixture
def training(tmp_path: Path, engine: LocalEngine) -> Training:
    return Training(tmp_path / "run", engine)


def test_each_checkpoint_is_measured_as_it_appears_until_the_last_step(training: Training) -> None:
    told = training.watch()
    assert training.waits == STEPS and told[0] == "step 1" and "distance" in told[1]
    assert evaluations(training.folder) == [{"step": step, "distance": 10.0 - step} for step in (1, 2, 3)]
    assert not (training.folder / EXPORT).exists(), "the model is not kept"
    assert set(training.outs) == {training.folder.name}
    [told_again] = training.watch()
    assert "has every checkpoint; delete it" in told_again
    assert len(training.measured) == STEPS, "nothing is measured twice, and the last step is known as such"


def test_one_that_was_killed_goes_on_and_the_newest_is_measured_first(training: Training) -> None:
    training.save()
    training.watch(once=True)
    training.save()
    training.save()
    (training.folder / EXPORT).mkdir()
    order: list[str] = []
    watch(training.folder, training.measure, once=True, say=order.append, wait=training.wait)
    assert [line for line in order if line.startswith("step")] == ["step 3", "step 2"]
    assert [line["step"] for line in evaluations(training.folder)] == [1, 2, 3]
    assert training.outs == ["run", "run", EXPORT], "what the run shows stays that of the newest"


def test_several_processes_are_refused(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="watch is one process"):
        training.watch(once=True)


def test_a_checkpoint_that_is_gone_meanwhile_is_passed_over(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    training.save()
    real = module.export

    def export(checkpoint: Path, out: Path) -> Path:
        if checkpoint == step_folder(training.folder, 1):
            shutil.rmtree(checkpoint)
        return real(checkpoint, out)

    monkeypatch.setattr(module, "export", export)
    training.watch()
    assert [line["step"] for line in evaluations(training.folder)] == [2, 3]


def test_damage_is_told(training: Training, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing is not there; give the folder of a run"):
        watch(tmp_path / "missing", training.measure)
    training.save()
    (step_folder(training.folder, 1) / "rank_00000.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="rank_00000"):
        training.watch(once=True)
    (training.folder / RECORD).write_text(json.dumps({"no": "step"}) + "\n")
    with pytest.raises(UserError, match=r"evaluations\.jsonl is damaged; delete it"):
        training.watch(once=True)
