"""Notices that this process stands still, leaves what tells why, and ends it where another one is lost."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from transfusion.files import atomic_file, atomic_write_text
from transfusion.parallel.flight_recorder import flight_record, stuck_seconds, waiting_in

log = logging.getLogger(__name__)

LOADER = "waiting for the loader"
# What standing still means: in the loader; with a collective open; otherwise.
_NO_BATCH = "the loader gives no batch: look at its processes and at the storage of the shards"
_OTHER_RANK = "another rank is late or gone: its own file shows what it does"
_THIS_RANK = "no collective is open, so it is this process itself: see the stacks"
# Looks so many times in the allowed time.
_LOOKS = 20
# EX_UNAVAILABLE of sysexits.h: another rank is late or gone; the newest checkpoint is what there is to go on from.
EXIT_STALLED = 69


class _Doing(NamedTuple):
    activity: str
    step: int
    since: float
    alike: bool


class Watchdog:
    """A thread that writes down a process that has done the same thing for too long, once each time.

    FOLDER/rank_00000.txt holds what the process was doing, the collectives it waits in, the samples of its last
    batch and the stacks of all threads; FOLDER/rank_00000.json the flight recorder. A process that waits in a
    collective for `exit_seconds`, in what takes all ranks equally long, is ended: the rank that it waits for is
    lost. Else nothing is ended. A context manager; without either time it does nothing.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        *,
        seconds: float,
        exit_seconds: float = 0.0,
        samples: Callable[[], Sequence[str]] = lambda: [],
        end: Callable[[int], object] = os._exit,
    ) -> None:
        """seconds: of the same activity that count as standing still; 0: never. samples: of the last batch.

        end: ends the process with an exit code, whatever its main thread waits for.
        """
        self._folder, self._rank, self._samples, self._end = folder, rank, samples, end
        self._seconds = seconds or math.inf
        self._exit_seconds = exit_seconds or math.inf
        self._doing: _Doing | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def note(self, activity: str, step: int, *, alike: bool = False) -> None:
        """From now on this process does `activity`. Cheap: called several times a step.

        alike: it takes all ranks equally long, so one that waits longer has lost another.
        """
        self._doing = _Doing(activity, step, time.monotonic(), alike)

    def died(self, error: BaseException) -> None:
        """Write the same files for a process that ends by `error`: its last batch may be the cause."""
        doing = self._doing or _Doing("nothing yet", 0, time.monotonic(), False)
        reason = " ".join(str(error).split())[:200]
        head = f"rank {self._rank} ended in step {doing.step}: {doing.activity}; {type(error).__name__}: {reason}"
        with contextlib.suppress(OSError):
            self._write(head, flight_record())

    def __enter__(self) -> Watchdog:
        if math.isfinite(min(self._seconds, self._exit_seconds)):
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
        while not self._ended.wait(min(self._seconds, self._exit_seconds) / _LOOKS):
            doing = self._doing
            if doing is None:
                continue
            seconds = time.monotonic() - doing.since
            lost = doing.alike and seconds >= self._exit_seconds <= stuck_seconds(flight_record())
            if doing is not told and (lost or seconds >= self._seconds):
                told = doing
                self._tell(doing)
            if lost:
                log.error(
                    "rank %d ends: it waited for another rank for %.0f s (train.lost_rank_timeout); the same"
                    " command continues from the newest checkpoint",
                    self._rank,
                    seconds,
                )
                self._end(EXIT_STALLED)
                return

    def _tell(self, doing: _Doing) -> None:
        record = flight_record()
        meaning = _OTHER_RANK if waiting_in(record) else _NO_BATCH if doing.activity == LOADER else _THIS_RANK
        seconds = time.monotonic() - doing.since
        where = f"rank {self._rank} is stuck in step {doing.step}"
        summary = f"{where}: {doing.activity} for {seconds:.0f} s; {meaning}"
        try:
            log.warning("%s; %s has the stacks", summary, self._write(summary, record))
        except OSError as error:
            log.warning("rank %d is stuck, and cannot write why: %s", self._rank, error)

    def _write(self, summary: str, record: dict[str, Any]) -> Path:
        """Both files, each whole or not there: others watch for them."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"rank_{self._rank:05d}.txt"
        with atomic_file(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
            lines = [summary, "", "open collectives:", *(waiting_in(record) or ["none"])]
            lines += ["", "samples of the last batch:", *(self._samples() or ["none"]), "", "stacks:", ""]
            file.write("\n".join(lines))
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        atomic_write_text(path.with_suffix(".json"), json.dumps(record))
        return path
