"""Notices that this process stands still, and leaves what tells why."""

from __future__ import annotations

import faulthandler
import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from transfusion.parallel.flight import flight_record, waiting_in

log = logging.getLogger(__name__)

LOADER = "waiting for the loader"
# What standing still means: in the loader; with a collective open; otherwise.
_NO_BATCH = "the loader gives no batch: look at its processes and at the storage of the shards"
_OTHER_RANK = "another rank is late or gone: its own file tells what it does"
_THIS_RANK = "no collective is open, so it is this process itself: see the stacks"
# Looks so many times in the allowed time.
_LOOKS = 20


class _Doing(NamedTuple):
    activity: str
    step: int
    since: float


class Watchdog:
    """A thread that writes down a process that has done the same thing for too long, once each time.

    FOLDER/rank_00000.txt holds what the process was doing, the collectives it waits in, the samples of its last
    batch and the stacks of all threads; FOLDER/rank_00000.json the flight recorder. Nothing is ended: that
    is for the timeout of the collectives. A context manager; without `seconds` it does nothing.
    """

    def __init__(
        self, folder: Path, rank: int, *, seconds: float, samples: Callable[[], Sequence[str]] = lambda: []
    ) -> None:
        """seconds: of the same activity that count as standing still; 0: never. samples: of the last batch."""
        self._folder, self._rank, self._seconds, self._samples = folder, rank, seconds, samples
        self._doing: _Doing | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def note(self, activity: str, step: int) -> None:
        """From now on this process does `activity`. Cheap: called several times a step."""
        self._doing = _Doing(activity, step, time.monotonic())

    def __enter__(self) -> Watchdog:
        if self._seconds > 0:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        told: _Doing | None = None
        while not self._ended.wait(self._seconds / _LOOKS):
            doing = self._doing
            if doing is None or doing is told or time.monotonic() - doing.since < self._seconds:
                continue
            told = doing
            try:
                log.warning("%s", self._report(doing))
            except OSError as error:
                log.warning("rank %d stands still, and cannot write why: %s", self._rank, error)

    def _report(self, doing: _Doing) -> str:
        """Write both files; returns the line for the log."""
        record = flight_record()
        collectives = waiting_in(record)
        meaning = _OTHER_RANK if collectives else _NO_BATCH if doing.activity == LOADER else _THIS_RANK
        seconds = time.monotonic() - doing.since
        where = f"rank {self._rank} stands still in step {doing.step}"
        summary = f"{where}: {doing.activity} for {seconds:.0f} s; {meaning}"
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"rank_{self._rank:05d}.txt"
        with path.open("w", encoding="utf-8") as file:
            lines = [summary, "", "open collectives:", *(collectives or ["none"])]
            lines += ["", "samples of the last batch:", *(self._samples() or ["none"]), "", "stacks:", ""]
            file.write("\n".join(lines))
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        path.with_suffix(".json").write_text(json.dumps(record), encoding="utf-8")
        return f"{summary}; {path} has the stacks"
