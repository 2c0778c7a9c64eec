"""The watchdog of one process: tells once of each stall, and tells a stalled loader from a stalled process."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from transfusion.training import watchdog as watchdog_module
from transfusion.training.watchdog import EXIT_STALLED, LOADER, Watchdog


def wait_for(path: Path) -> str:
    deadline = time.monotonic() + 30
    while not (path.with_suffix(".json").exists() and time.monotonic() < deadline):
        time.sleep(0.01)
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("activity", "meaning"), [(LOADER, "the loader gives no batch"), ("optimiser step", "see the stacks")]
)
def test_standing_still_is_told_once(tmp_path: Path, activity: str, meaning: str) -> None:
    path = tmp_path / "stalls" / "rank_00003.txt"
    with Watchdog(tmp_path / "stalls", 3, seconds=0.1, samples=lambda: ["row 0: digits 17"]) as watchdog:
        watchdog.note(activity, 12)
        told = wait_for(path)
        assert told.startswith(f"rank 3 is stuck in step 12: {activity} for 0 s; ")
        assert meaning in told and "row 0: digits 17" in told
        assert "test_watchdog.py" in told, "the stack of this very test"
        path.unlink()
        time.sleep(0.3)
        assert not path.exists()
        watchdog.note(activity, 13)
        path.with_suffix(".json").unlink()
        assert "in step 13" in wait_for(path)


def test_a_process_that_goes_on_is_left_alone(tmp_path: Path) -> None:
    with Watchdog(tmp_path / "stalls", 0, seconds=5.0) as watchdog:
        for step in range(20):
            watchdog.note("forward and backward", step)
            time.sleep(0.005)
    with Watchdog(tmp_path / "stalls", 0, seconds=0.0) as watchdog:
        watchdog.note("forward and backward", 1)
        time.sleep(0.1)
    assert not (tmp_path / "stalls").exists()


def test_a_folder_that_cannot_be_written_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = []
    monkeypatch.setattr(watchdog_module.log, "warning", lambda text, *values: said.append(text % values))
    (tmp_path / "stalls").write_text("a file")
    with Watchdog(tmp_path / "stalls", 0, seconds=0.05) as watchdog:
        watchdog.note("saving", 1)
        deadline = time.monotonic() + 30
        while not said and time.monotonic() < deadline:
            time.sleep(0.01)
    assert said[0].startswith("rank 0 is stuck, and cannot write why: ")


def open_collective(age: float, *, retired: bool = False) -> dict[str, Any]:
    """A flight record whose newest collective was begun `age` seconds ago."""
    entry = {
        "profiling_name": "gloo:all_gather", "input_sizes": [[3]], "collective_seq_id": 7, "retired": retired,
        "time_created_ns": time.time_ns() - int(age * 1e9),
    }  # fmt: skip
    return {"entries": [entry]}


@pytest.mark.parametrize(
    ("alike", "age", "retired", "ends"),
    [
        (True, 60.0, False, True),
        # The other rank may be drawing or writing for long; this one goes on slowly; it waits for nobody.
        (False, 60.0, False, False),
        (True, 0.0, False, False),
        (True, 60.0, True, False),
    ],
)
def test_only_a_lost_rank_ends_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alike: bool, age: float, retired: bool, ends: bool
) -> None:
    monkeypatch.setattr(watchdog_module, "flight_record", lambda: open_collective(age, retired=retired))
    codes: list[int] = []
    watchdog = Watchdog(
        tmp_path, 0, seconds=30.0, exit_seconds=0.4, samples=lambda: ["row 0"], end=codes.append
    )
    with watchdog:
        watchdog.note("forward and backward", 4, alike=alike)
        deadline = time.monotonic() + (30 if ends else 0.8)
        while not codes and time.monotonic() < deadline:
            time.sleep(0.01)
    assert codes == ([EXIT_STALLED] if ends else [])
    if ends:
        told = (tmp_path / "rank_00000.txt").read_text(encoding="utf-8")
        assert "another rank is late or gone" in told and "all_gather of 3 elements" in told


def test_a_process_that_dies_leaves_the_same_files(tmp_path: Path) -> None:
    watchdog = Watchdog(tmp_path, 2, seconds=0.0, samples=lambda: ["row 0: digits 17"])
    watchdog.note("forward and backward", 5)
    watchdog.died(RuntimeError("Connection closed\nby peer"))
    told = (tmp_path / "rank_00002.txt").read_text(encoding="utf-8")
    head = "rank 2 ended in step 5: forward and backward; RuntimeError: Connection closed by peer"
    assert told.splitlines()[0] == head and "digits 17" in told and (tmp_path / "rank_00002.json").exists()
