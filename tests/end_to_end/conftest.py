"""The real data of the quickstart, prepared once a session, and the commands a user would type."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from transfusion.cli import main
from transfusion.observe.console import start_logging

ROOT = Path(__file__).parents[2]
TINY = (
    "model.layers=2", "model.hidden_size=64", "model.heads=2", "data.sequence_length=128", "data.global_batch_size=4",
    "train.threads=1", "checkpoint.every=3", "sample_grid.per_prompt=1", "sample_grid.steps=2",
)  # fmt: skip
Command = Callable[..., str]


@dataclass(frozen=True)
class Workplace:
    """A folder with prepared data, in which commands run as a user would type them."""

    folder: Path

    def start(self, *arguments: str, processes: int = 1) -> subprocess.Popen[str]:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *(launcher if processes > 1 else []), "-m", "transfusion", *arguments]
        return subprocess.Popen(
            command, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
        )  # fmt: skip

    def kill(self, process: subprocess.Popen[str]) -> None:
        """End a command and all the processes it started, at once, as a lost machine would."""
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()

    def run(self, *arguments: str, processes: int = 1, code: int = 0) -> str:
        """Run a command to its end, check its exit code, return what it printed."""
        process = self.start(*arguments, processes=processes)
        out, err = process.communicate(timeout=300)
        assert process.returncode == code, f"{arguments}: exit {process.returncode}\n{out}\n{err}"
        return out + err

    def train(self, run: str, *overrides: str) -> list[str]:
        """The arguments that train the tiny model in the folder `run`."""
        config = str(ROOT / "configs" / "train" / "quickstart.yaml")
        return ["train", config, f"run.dir={run}", *TINY, *overrides]


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    folder = tmp_path_factory.mktemp("workplace")
    place = Workplace(folder)
    place.run("prepare", "digits", "--out", "data/quickstart/digits")
    place.run("prepare", "python-docs", "--out", "data/quickstart/text")
    place.run(
        "tokenizer", "train", "data/quickstart/*/train/*.tar",
        "--out", "data/quickstart/tokenizer.model", "--vocabulary", "1280",
    )  # fmt: skip
    return place


@pytest.fixture(scope="session")
def trained(workplace: Workplace) -> str:
    """A run of a few steps under ZeRO-3 on two processes, exported to <run>/export."""
    workplace.run(*workplace.train("runs/trained", "train.steps=7"), processes=2)
    workplace.run("export", "runs/trained", "--out", "runs/trained/export")
    return "runs/trained"


@pytest.fixture
def transfusion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Command:
    """transfusion(*words, code=0) -> what the command printed, in a folder of its own and in this process."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["transfusion", *words])
        left = main._run()
        start_logging(None)
        told = capfd.readouterr()
        assert left == code, told.out + told.err
        return told.out + told.err

    return run
