"""Killed, stopped, stalled, continued: the same command ends up with the same run, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from transfusion.observe.metrics import read_metrics

STEPS = 8
# For processes on a machine that does much else.
LONGEST_WAIT = 600
COMPARED = ("loss", "text_loss", "image_loss", "image_loss_by_timestep", "gradient_norm", "tokens", "images")


def figures(run: Path) -> list[tuple[Any, ...]]:
    """What every step measured, time and speed left out."""
    return [tuple(line[name] for name in COMPARED) for line in read_metrics(run / "metrics.jsonl")]


def wait_for_step(run: Path, step: int, process: Any) -> None:
    deadline = time.monotonic() + LONGEST_WAIT
    while time.monotonic() < deadline:
        lines = read_metrics(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
        if lines and lines[-1]["step"] >= step:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise AssertionError(f"no step {step} within {LONGEST_WAIT} seconds")


@pytest.fixture(scope="session")
def straight(workplace: Any) -> Path:
    workplace.run(*workplace.train("runs/straight", f"train.steps={STEPS}"))
    return workplace.folder / "runs/straight"


def weights(run: Path) -> bytes:
    return (run / "checkpoints" / f"step_{STEPS:08d}" / "rank_00000.safetensors").read_bytes()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run, to see that a refused start leaves all as it was."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_killed_and_continued(workplace: Any, straight: Path) -> None:
    run = workplace.folder / "runs/killed"
    command = workplace.train("runs/killed", f"train.steps={STEPS}")
    process = workplace.start(*command)
    wait_for_step(run, 5, process)
    workplace.kill(process)
    workplace.run(*command)
    assert figures(run) == figures(straight)
    assert weights(run) == weights(straight)


@pytest.mark.slow
def test_stopped_by_a_signal_saves_and_exits_with_75(workplace: Any, straight: Path) -> None:
    run = workplace.folder / "runs/stopped"
    command = workplace.train("runs/stopped", f"train.steps={STEPS}", "checkpoint.every=100")
    process = workplace.start(*command)
    wait_for_step(run, 2, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=LONGEST_WAIT)
    assert process.returncode == 75, err
    assert "the same command continues" in err
    workplace.run(*command)
    assert figures(run) == figures(straight)


@pytest.mark.slow
def test_after_ctrl_c_the_last_line_is_that_the_same_command_continues(
    workplace: Any, straight: Path
) -> None:
    """Under torchrun too, whose own messages come before it. Both have the signal from the terminal."""
    run = workplace.folder / "runs/interrupted"
    command = workplace.train("runs/interrupted", f"train.steps={STEPS}", "checkpoint.every=100")
    process = workplace.start(*command, processes=2)
    wait_for_step(run, 2, process)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=LONGEST_WAIT)
    step = read_metrics(run / "metrics.jsonl")[-1]["step"]
    last = f"stopped at step {step} after saving; the same command continues"
    assert "SignalException" in err and err.splitlines()[-1] == f"transfusion: {last}"
    process = workplace.start(*command)
    wait_for_step(run, step + 1, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=LONGEST_WAIT)
    assert process.returncode == 75 and "the same command continues" in err.splitlines()[-1]


@pytest.mark.slow
def test_a_torn_checkpoint_is_refused_until_it_is_deleted(workplace: Any, straight: Path) -> None:
    """The refusal changes nothing; after what it advises, the run goes on from the checkpoint before."""
    run = workplace.folder / "runs/torn"
    workplace.run(*workplace.train("runs/torn", "train.steps=6"))
    newest = run / "checkpoints" / "step_00000006" / "rank_00000.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    before = contents(run)
    command = workplace.train("runs/torn", f"train.steps={STEPS}")
    said = workplace.run(*command, code=2)
    assert "step_00000006 is damaged" in said and "delete the folder" in said and "Traceback" not in said
    assert contents(run) == before
    shutil.rmtree(newest.parent)
    assert "step 3 to 8" in workplace.run(*command)
    assert weights(run) == weights(straight)


def test_two_processes_never_write_one_folder(workplace: Any) -> None:
    command = workplace.train("runs/shared", "train.steps=1000")
    process = workplace.start(*command)
    wait_for_step(workplace.folder / "runs/shared", 1, process)
    said = workplace.run(*command, code=2)
    workplace.kill(process)
    assert "another process trains in runs/shared" in said and "Traceback" not in said


def test_a_finished_run_has_nothing_to_do(workplace: Any, straight: Path) -> None:
    before = (straight / "metrics.jsonl").read_bytes()
    assert "nothing to do" in workplace.run(*workplace.train("runs/straight", f"train.steps={STEPS}"))
    assert (straight / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_refused(workplace: Any, straight: Path) -> None:
    before = contents(straight)
    said = workplace.run(*workplace.train("runs/straight", "train.steps=9", "model.hidden_size=96"), code=2)
    assert "Traceback" not in said and "run.dir" in said
    assert contents(straight) == before


@pytest.mark.slow
def test_another_tokenizer_is_refused(workplace: Any, straight: Path) -> None:
    named = workplace.folder / "data/quickstart/tokenizer.model"
    assert (straight / "tokenizer.model").read_bytes() == named.read_bytes()
    workplace.run(
        "tokenizer", "train", "data/quickstart/*/train/*.tar", "--out", "other.model", "--vocabulary", "1100"
    )
    before = contents(straight)
    command = workplace.train("runs/straight", "train.steps=9", "data.tokenizer=other.model")
    said = workplace.run(*command, code=2)
    assert "set data.tokenizer=runs/straight/tokenizer.model" in said and "Traceback" not in said
    assert contents(straight) == before


@pytest.mark.slow
def test_a_file_torn_on_one_rank_is_named_by_all(workplace: Any) -> None:
    run = workplace.folder / "runs/torn-rank"
    command = workplace.train("runs/torn-rank", "train.steps=3")
    workplace.run(*command, processes=2)
    torn = run / "checkpoints" / "step_00000003" / "rank_00001.safetensors"
    torn.write_bytes(torn.read_bytes()[:-100])
    said = workplace.run(*command[:-1], "train.steps=6", processes=2, code=1)
    (line,) = [line for line in said.splitlines() if line.startswith("transfusion: ")]
    assert "rank_00001.safetensors has" in line


@pytest.mark.slow
def test_two_ranks_are_killed_and_continued(workplace: Any) -> None:
    whole, killed = (workplace.folder / "runs" / name for name in ("zero-straight", "zero-killed"))
    workplace.run(*workplace.train("runs/zero-straight", f"train.steps={STEPS}"), processes=2)
    command = workplace.train("runs/zero-killed", f"train.steps={STEPS}")
    process = workplace.start(*command, processes=2)
    wait_for_step(killed, 4, process)
    workplace.kill(process)
    workplace.run(*command, processes=2)
    assert figures(killed) == figures(whole)


def rank_processes(parent: int) -> list[int]:
    """The processes that a launcher has started, rank 0 first."""
    found = subprocess.run(
        ["pgrep", "-P", str(parent), "-f", "transfusion train"], capture_output=True, text=True
    )
    return sorted(int(word) for word in found.stdout.split())


def wait_for(path: Path, process: Any) -> str:
    deadline = time.monotonic() + LONGEST_WAIT
    while time.monotonic() < deadline:
        if path.exists():
            return path.read_text(encoding="utf-8")
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError(f"{path} did not come within {LONGEST_WAIT} seconds")


@pytest.mark.slow
def test_a_rank_that_stands_still_is_told_by_the_others(workplace: Any) -> None:
    """SIGSTOP to the second rank: the first waits for it in a collective, and says so while it does."""
    run = workplace.folder / "runs/stalled"
    command = workplace.train(
        "runs/stalled", "train.steps=100", "checkpoint.every=200", "train.stall_seconds=2"
    )
    process = workplace.start(*command, processes=2)
    wait_for_step(run, 3, process)
    first, second = rank_processes(process.pid)
    os.kill(second, signal.SIGSTOP)
    try:
        told = wait_for(run / "stalls" / "rank_00000.txt", process)
        recorded = json.loads(wait_for(run / "stalls" / "rank_00000.json", process))
    finally:
        os.kill(second, signal.SIGCONT)
    _, err = process.communicate(timeout=LONGEST_WAIT)
    assert process.returncode == 0, err
    assert first != second and read_metrics(run / "metrics.jsonl")[-1]["step"] == 100
    head, rest = told.split("\n", 1)
    assert head.startswith("rank 0 is stuck in step ") and "another rank is late or gone" in head
    assert head in err
    # A collective with its size, the samples by source and key, and the stack of the thread that trains.
    collectives, samples = rest.split("samples of the last batch:")
    assert " elements, number " in collectives
    assert "row 0: digits " in samples or "row 0: python-docs " in samples
    assert "trainer.py" in samples
    assert not recorded["entries"][-1]["retired"]
