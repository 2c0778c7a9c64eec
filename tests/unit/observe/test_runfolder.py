"""The run folder holds what it says, tells no secrets, and its log goes where it should."""

from __future__ import annotations

import json
import logging
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from transfusion.config import load_config
from transfusion.data.shards.sample import Fault
from transfusion.errors import UserError
from transfusion.observe import runfolder
from transfusion.observe.console import start_logging
from transfusion.observe.environment import describe_environment, git_state, package_version
from transfusion.observe.runfolder import RunFolder


@pytest.fixture
def package_logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger("transfusion")
    yield logger
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = True


def test_create_writes_config_and_environment(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "first")
    config = load_config(None, ["run.name=first", "codec.image_size=8"])
    folder.create(config, arguments=["transfusion", "train", "a.yaml"])
    assert load_config(folder.config) == config
    environment = json.loads(folder.environment.read_text())
    assert environment["argv"] == ["transfusion", "train", "a.yaml"]
    assert environment["cpu_count"] >= 1
    assert environment["packages"]["torch"]
    assert folder.samples.is_dir() and folder.checkpoints.is_dir()
    folder.create(config)  # a second start of the same run


def test_no_environment_variable_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a-secret-of-mine")
    assert "a-secret-of-mine" not in json.dumps(describe_environment())


def test_a_folder_that_cannot_be_made_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run\.dir"):
        RunFolder(tmp_path / "file" / "run").create(load_config(None, ["codec.image_size=8"]))


def test_one_process_at_a_time_has_the_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    held = folder.lock()
    with pytest.raises(UserError, match=r"another process trains .* run\.dir"):
        folder.lock()
    held.close()
    folder.lock().close()


def test_only_a_run_that_is_there_can_be_locked_without_making_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    assert folder.lock_existing() is None and not folder.path.exists()
    folder.lock().close()
    held = folder.lock_existing()
    assert held is not None
    with pytest.raises(UserError, match="another process trains"):
        folder.lock_existing()
    held.close()


def test_a_config_torn_while_it_is_written_leaves_the_former(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path / "run")
    config = load_config(None, ["codec.image_size=8"])
    folder.create(config)
    former = folder.config.read_bytes()

    def full(config: object, path: Path) -> None:
        path.write_text("run:")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(runfolder, "dump", full)
    with pytest.raises(UserError, match="No space left"):
        folder.create(config)
    assert folder.config.read_bytes() == former


def test_a_run_keeps_its_tokenizer(tmp_path: Path) -> None:
    folder, given = RunFolder(tmp_path / "run"), tmp_path / "given.model"
    folder.path.mkdir()
    for content in (b"first", b"before any checkpoint"):
        given.write_bytes(content)
        folder.refuse_other_tokenizer(given)
        folder.keep_tokenizer(given)
        assert folder.tokenizer.read_bytes() == content
    checkpoint = folder.checkpoints / "step_00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    folder.refuse_other_tokenizer(given)
    folder.refuse_other_tokenizer(folder.tokenizer)
    given.write_bytes(b"another")
    with pytest.raises(
        UserError, match=r"given\.model is not the .* trained with; set data\.tokenizer=.*run/tok"
    ):
        folder.refuse_other_tokenizer(given)


def test_the_quarantine_grows_and_names_each_sample_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    folder.add_to_quarantine([])
    assert not folder.quarantine.exists()
    first, second = Fault("a.tar", "1", "empty caption"), Fault("a.tar", "é", "not an image")
    folder.add_to_quarantine([first, first])
    # A later start, which has met only the second so far.
    folder.add_to_quarantine([second])
    folder.add_to_quarantine([second, first])
    lines = [json.loads(line) for line in folder.quarantine.read_text(encoding="utf-8").splitlines()]
    assert [line["key"] for line in lines] == ["1", "é"]
    monkeypatch.setattr(Path, "replace", None)
    before = folder.quarantine.read_bytes()
    with pytest.raises(TypeError):
        folder.add_to_quarantine([Fault("b.tar", "2", "torn")])
    assert folder.quarantine.read_bytes() == before


def test_grids_sort_by_step(tmp_path: Path) -> None:
    names = [RunFolder(tmp_path).grid(step).name for step in (0, 90, 1000)]
    assert names == sorted(names) and names[1] == "step_0000090.png"


def test_a_missing_package_has_no_version() -> None:
    assert package_version("no-such-distribution") is None


def test_git_state_tells_commit_and_changes(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(
            ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
            check=True,
            capture_output=True,
        )

    file = tmp_path / "module.py"
    file.write_text("1\n")
    assert git_state(file) is None
    git("init")
    assert git_state(file) is None, "not tracked: the package is not of this repository"
    git("add", "module.py")
    git("commit", "-m", "first")
    state = git_state(file)
    assert state is not None and len(state["commit"]) == 40 and state["dirty"] is False
    file.write_text("2\n")
    assert git_state(file) == {**state, "dirty": True}


def test_the_main_process_logs_to_file_and_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], package_logger: logging.Logger
) -> None:
    folder = RunFolder(tmp_path / "run")
    start_logging(folder)
    start_logging(folder)  # again, as after a resume in one process: no line twice
    package_logger.getChild("trainer").info("starts at step 3")
    assert capsys.readouterr().err == "starts at step 3\n"
    assert folder.log.read_text().endswith("INFO starts at step 3\n")
    assert len(folder.log.read_text().splitlines()) == 1


def test_other_ranks_show_warnings_with_their_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], package_logger: logging.Logger
) -> None:
    folder = RunFolder(tmp_path / "run")
    start_logging(folder, rank=3)
    package_logger.info("of no interest")
    package_logger.warning("bad sample")
    assert capsys.readouterr().err == "rank 3: bad sample\n"
    assert not folder.log.exists()
