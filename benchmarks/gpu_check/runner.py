"""Runs the parts of a call: each a command under a limit, in a session of its own, ended with all that it started."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_check import processes
from gpu_check.record import Record, read_json

# Kept at the end of a call, for what is still to be written.
RESERVE_SECONDS = 4.0
# Under this no part is begun.
LEAST_SECONDS = 3.0
POLL_SECONDS = 0.1
# How often growing files are looked at.
COLLECT_SECONDS = 0.5


class Skip(Exception):  # noqa: N818  (no failure: the part has nothing to do)
    """Raised where a part's command is made. The message says why there is none."""


@dataclass(frozen=True)
class Part:
    """One command of a call.

    Attributes:
        name: What it is called in the record, the log and `--only`.
        seconds: Its limit.
        command: Makes the command when its turn comes, from what is known by then. May raise `Skip`.
        result: The JSON that it writes, which becomes part of the record as it grows.
        digest: Makes of that JSON what the record holds.
        variables: What its environment has besides.
        kept: Files that are copied into the output whenever they change: a pattern, and the name there. Of several that
            fit the last by name counts.
        beside: Whether the parts after it begin at once.
        after: A part beside this one whose end it waits for, at most `patience` seconds.
        patience: See `after`.
        leave: Seconds to leave for what comes later.
        least: Seconds under which it is not worth beginning.
        then: Called once it has ended.
    """

    name: str
    seconds: float
    command: Callable[[], Sequence[str | Path]]
    result: Path | None = None
    digest: Callable[[Any], Any] | None = None
    variables: Mapping[str, str] = field(default_factory=dict)
    kept: Mapping[str, str] = field(default_factory=dict)
    beside: bool = False
    after: str = ""
    patience: float = 0.0
    leave: float = 0.0
    least: float = LEAST_SECONDS
    then: Callable[[], None] | None = None


@dataclass
class _Running:
    part: Part
    process: subprocess.Popen[bytes]
    began: float
    limit: float
    log_begin: int
    # When the files were last written that have been taken over, by what they are taken for.
    seen: dict[tuple[str, Path], int] = field(default_factory=dict)
    collected: float = 0.0


class Runner:
    """Runs parts until the time of the call is over.

    Args:
        record: Where the findings go.
        seconds: Of the whole call.
        root: Where the commands run.
        variables: The environment of all parts.
        mark: What the marks of all their processes begin with.
        slack: By how much limits are longer, for a machine that is busy with other work.
    """

    def __init__(
        self,
        record: Record,
        *,
        seconds: float,
        root: Path,
        variables: Mapping[str, str],
        mark: str,
        slack: float = 1.0,
    ) -> None:
        self.record, self.seconds, self.slack = record, seconds, slack
        self._root, self._variables, self._mark = root, variables, mark
        self._running: dict[str, _Running] = {}

    @property
    def left(self) -> float:
        """Seconds that parts may still take."""
        return float(self.seconds) - RESERVE_SECONDS - self.record.seconds

    def run(self, parts: Sequence[Part]) -> None:
        """Run all of them. Whatever ends this early ends those that run, and leaves a whole record."""
        try:
            for part in parts:
                if part.after:
                    self._wait_for(part.after, part.patience * self.slack)
                self._start(part)
                if not part.beside:
                    self._wait_for(part.name)
            for name in list(self._running):
                self._wait_for(name)
        finally:
            for name in list(self._running):
                self._end(name, "interrupted")

    def _start(self, part: Part) -> None:
        limit = min(part.seconds * self.slack, self.left - part.leave)
        if limit < max(part.least, LEAST_SECONDS):
            self._not_run(
                part, "no time left", f"{max(self.left, 0):.0f} s left, of which {part.leave:.0f} for others"
            )
            return
        try:
            command = [str(word) for word in part.command()]
        except Skip as reason:
            self._not_run(part, "skipped", str(reason))
            return
        print(f"{self.record.seconds:6.1f} s  {part.name}, at most {limit:.0f} s", flush=True)
        log_begin = self.record.end_of_log()
        variables = {**self._variables, **part.variables, processes.VARIABLE: f"{self._mark}/{part.name}/"}
        with self.record.log.open("ab") as log:
            log.write(f"\n== {part.name}: {' '.join(command)}\n".encode())
            log.flush()
            # A file and no pipe: what a part leaves behind can hold a pipe open for ever.
            process = subprocess.Popen(
                command,
                cwd=self._root,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._running[part.name] = _Running(part, process, self.record.seconds, limit, log_begin)
        self.record.part(
            part.name, status="running", began=round(self.record.seconds, 1), limit=round(limit, 1)
        )

    def _not_run(self, part: Part, status: str, reason: str) -> None:
        print(f"{self.record.seconds:6.1f} s  {part.name}: {status}, {reason}", flush=True)
        self.record.part(part.name, status=status, reason=reason)

    def _wait_for(self, name: str, patience: float | None = None) -> None:
        """Until a part has ended, or for so many seconds. Meanwhile the others that run are looked after too."""
        begin = time.monotonic()
        while name in self._running and (patience is None or time.monotonic() - begin < patience):
            time.sleep(POLL_SECONDS)
            for other in list(self._running):
                self._look_after(other)

    def _look_after(self, name: str) -> None:
        running = self._running[name]
        if running.process.poll() is not None:
            self._end(name)
        elif self.record.seconds - running.began > running.limit:
            self._end(name, "out of time")
        elif time.monotonic() - running.collected > COLLECT_SECONDS:
            running.collected = time.monotonic()
            self._collect(running)

    def _end(self, name: str, status: str = "") -> None:
        """Take down a part that has ended, or end it for the reason that `status` names."""
        running = self._running.pop(name)
        part, code = running.part, running.process.poll()
        left_behind = processes.end_all(f"{self._mark}/{name}/")
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.process.wait(processes.KILL_SECONDS)
        status = status or ("passed" if code == 0 else "failed")
        seconds = round(self.record.seconds - running.began, 1)
        found: dict[str, Any] = {"status": status, "exit_code": code, "seconds": seconds}
        if code is not None and code < 0:
            found["signal"] = _signal_name(-code)
        if left_behind:
            found["left_behind"] = left_behind
        if status != "passed":
            found["tail"] = self.record.tail(running.log_begin)
        self._collect(running)
        if part.then:
            part.then()
        self.record.part(name, **found)
        how = f" ({found.get('signal') or f'exit code {code}'})" if status == "failed" else ""
        print(f"{self.record.seconds:6.1f} s  {name}: {status}{how} after {seconds:.1f} s", flush=True)

    def _collect(self, running: _Running) -> None:
        """Take over the files of a part that have changed."""
        part = running.part
        if part.result and _changed("result", part.result, running.seen):
            found = read_json(part.result)
            self.record.part(part.name, result=part.digest(found) if part.digest and found else found)
        for pattern, name in part.kept.items():
            path = Path(pattern)
            newest = max(path.parent.glob(path.name), default=None)
            if newest and _changed(name, newest, running.seen):
                with contextlib.suppress(OSError):
                    unfinished = self.record.path.with_name(f".{name}")
                    shutil.copyfile(newest, unfinished)
                    os.replace(unfinished, self.record.path.with_name(name))


def _changed(use: str, path: Path, seen: dict[tuple[str, Path], int]) -> bool:
    try:
        now = path.stat().st_mtime_ns
    except OSError:
        return False
    before, seen[use, path] = seen.get((use, path)), now
    return now != before


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
