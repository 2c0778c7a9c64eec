"""wandb gets the lines of metrics.jsonl on a step axis of our own, offline unless told otherwise."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from transfusion.config import load_config
from transfusion.errors import UserError
from transfusion.observe.runfolder import RunFolder
from transfusion.observe.sinks import NoLogger, open_metric_logger, panel_values, refuse_missing_logger

ON = load_config(None, ["log.wandb=true", "run.name=first", "log.project=ours", "codec.image_size=8"])
LINE = {"step": 3, "loss": 1.0, "text_loss": None, "image_loss_by_timestep": [0.5] + [None] * 9, "tokens": 7}


class FakeRun:
    """Notes what is asked of a wandb run."""

    id = "abc"
    offline = True
    url = None

    def __init__(self) -> None:
        self.axes: list[tuple[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.finished = False

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes.append((name, step_metric))

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    run = FakeRun()
    calls: list[dict[str, Any]] = []
    module = SimpleNamespace(
        init=lambda **options: calls.append(options) or run,
        Settings=lambda **options: options,
        Image=lambda path, caption: (path, caption),
        setup=lambda: SimpleNamespace(settings=SimpleNamespace(model_fields_set=set())),
        run=run,
        calls=calls,
    )
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_off_by_default_and_then_a_no_op(tmp_path: Path) -> None:
    metric_logger = open_metric_logger(
        load_config(None, ["codec.image_size=8"]), RunFolder(tmp_path), attempt=1
    )
    assert isinstance(metric_logger, NoLogger)
    metric_logger.write(LINE)
    metric_logger.image(0, tmp_path / "none.png")
    metric_logger.close()
    assert list(tmp_path.iterdir()) == []


def test_a_missing_wandb_is_told_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        open_metric_logger(ON, RunFolder(tmp_path), attempt=1)
    with pytest.raises(UserError, match="pip install wandb"):
        refuse_missing_logger(ON)
    refuse_missing_logger(load_config(None, ["codec.image_size=8"]))


def test_every_start_goes_on_with_one_wandb_run(tmp_path: Path, fake: SimpleNamespace) -> None:
    for attempt in (1, 2):
        open_metric_logger(ON, RunFolder(tmp_path), attempt=attempt)
    first, second = fake.calls
    assert (first["project"], first["name"]) == ("ours", "first")
    assert first["id"] == second["id"] and second["resume"] == "allow"
    (tmp_path / "other").mkdir()
    open_metric_logger(ON, RunFolder(tmp_path / "other"), attempt=1)
    assert fake.calls[2]["id"] != first["id"]
    assert first["mode"] == "offline"
    assert first["settings"]["save_code"] is False and first["settings"]["silent"] is True


def test_what_the_user_chose_wins(tmp_path: Path, fake: SimpleNamespace) -> None:
    fake.setup = lambda: SimpleNamespace(settings=SimpleNamespace(model_fields_set={"mode", "silent"}))
    open_metric_logger(ON, RunFolder(tmp_path), attempt=1)
    assert fake.calls[0]["mode"] is None and "silent" not in fake.calls[0]["settings"]


def test_the_step_axis_is_ours(tmp_path: Path, fake: SimpleNamespace) -> None:
    metric_logger = open_metric_logger(ON, RunFolder(tmp_path), attempt=1)
    metric_logger.write(LINE)
    metric_logger.image(3, tmp_path / "grid.png")
    metric_logger.close()
    assert ("*", "step") in fake.run.axes
    assert fake.run.logged[0] == {
        "step": 3,
        "loss/total": 1.0,
        "image_loss_by_timestep/00-10%": 0.5,
        "tokens": 7,
    }
    assert fake.run.logged[1]["step"] == 3 and fake.run.finished


def test_panel_values_name_every_bucket_in_order() -> None:
    norms = panel_values({"step": 0, "gradient_norms": {"blocks.0": 1.0}})
    assert norms == {"step": 0, "gradient_norm/blocks.0": 1.0}
    assert panel_values({"step": 0, "gradient_norms": None}) == {"step": 0}
    losses = {"image_loss": 0.5, "validation_image_loss": 0.6, "eval_pairs_image_loss": 0.7}
    assert panel_values(losses).keys() == {"loss/image", "validation_image_loss", "eval_pairs_image_loss"}
    names = list(panel_values({"step": 0, "image_loss_by_timestep": [1.0] * 10}))
    assert names[1:] == sorted(names[1:]) and names[-1] == "image_loss_by_timestep/90-100%"


@pytest.mark.slow
def test_the_real_wandb_writes_offline_and_is_quiet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    metric_logger = open_metric_logger(ON, RunFolder(tmp_path), attempt=1)
    for step in (1, 2, 1):
        metric_logger.write({**LINE, "step": step})
    metric_logger.close()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert "wandb: " not in "".join(capfd.readouterr())
