"""The watchdog of one process: tells once of each stall, and tells a stalled loader from a stalled process."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from transfusion.observe import watchdog as watchdog_module
from transfusion.observe.watchdog import LOADER, Watchdog


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
        assert told.startswith(f"rank 3 stands still in step 12: {activity} for 0 s; ")
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
    assert said[0].startswith("rank 0 stands still, and cannot write why: ")
