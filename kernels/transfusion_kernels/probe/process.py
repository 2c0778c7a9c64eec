"""Runs a probe in a process of its own, which may hang, fault or fill its streams without harm to this one."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any

from transfusion_kernels.probe.records import Subject, Verdict

# How long a killed process may take to go. One in the driver's hands may take for ever, and is then left behind.
KILL_SECONDS = 3.0
# What a line of the child's begins with that is meant for this side.
MARK = "transfusion-probe "
_LINE_BYTES = 4096
_MAX_LINES = 200
_LINE_CHARACTERS = 200
# The child finds its modules where this process does. An alarm ends it if this process is killed first, and a
# crash leaves no image of its memory behind.
_START = """
import json, resource, signal, sys
sys.path[:] = json.loads(sys.argv[1])
signal.signal(signal.SIGALRM, signal.SIG_DFL)
signal.alarm(int(sys.argv[2]))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
from transfusion_kernels.probe.child import main
main(sys.argv[3:])
"""
# Signals that others send, such as a system without memory or a scheduler that ends a job.
_SENT = frozenset(
    getattr(signal, name, None)
    for name in ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGUSR2")
)
_TELLING = re.compile(r"error|fatal|fault|abort|terminate|assert|panic", re.IGNORECASE)


def child_command(subject: Subject, device: str, seconds: float) -> list[str]:
    """What runs the probe of a subject on a device, such as "cuda:0"."""
    paths = json.dumps([str(path) for path in sys.path])
    places = [sys.executable or "", "-c", _START, paths, str(int(seconds) + 5)]
    return [*places, subject.implementation, str(subject.head_dim), subject.dtype, device]


def run_child(command: Sequence[str], seconds: float, variables: Mapping[str, str] | None = None) -> Verdict:
    """Run a probe and return what it says, or what became of it, in `seconds` and the few more that killing takes.

    Args:
        command: What to run. It prints lines that begin with `MARK`, as `probe.child` does.
        seconds: The limit.
        variables: The child's environment, that of this process if None.
    """
    begin = time.monotonic()

    def verdict(outcome: str, detail: str = "") -> Verdict:
        return Verdict(outcome, detail, time=time.time(), seconds=round(time.monotonic() - begin, 1))

    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=None if variables is None else dict(variables),
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        return verdict("undecided", f"no process could be started: {error}")
    assert process.stdout is not None and process.stderr is not None
    out, errors = _Lines(process.stdout), _Lines(process.stderr)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        still = out.stage or "starting"
        if not still.startswith("waiting"):  # for the GPU. All else is the work of a slow machine.
            return verdict("undecided", f"still {still} after {seconds:g} s")
        return verdict("hung", f"no end after {seconds:g} s, {still}")
    finally:
        _kill(process)
        out.close()
        errors.close()
    if code == 0 and out.verdict is not None:
        return verdict(*out.verdict)
    return verdict(*_death(code, out, errors))


def _death(code: int, out: _Lines, errors: _Lines) -> tuple[str, str]:
    """Outcome and detail of a process that ended without a verdict."""
    outcome, how = "died", f"exit code {code} without a verdict"
    if code < 0:
        with contextlib.suppress(ValueError):
            how = f"signal {-code}, {signal.Signals(-code).name}"
        if -code in _SENT:
            outcome = "undecided"
    elif not out.stage:  # it did not come to the kernels
        outcome = "undecided"
    where = f", {out.stage}" if out.stage else ""
    # The first line about a fault, or the last of a traceback.
    line = errors.telling if code < 0 else errors.last
    return outcome, f"{how}{where}" + (f": {line}" if line else "")


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started, if it still runs."""
    if process.poll() is not None:
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(KILL_SECONDS)


class _Lines:
    """Reads a stream to its end, whatever its length, and keeps what counts."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stage = ""
        self.verdict: tuple[str, str] | None = None
        self.last = ""
        self._stream = stream
        self._lines: list[str] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    @property
    def telling(self) -> str:
        """The first line that speaks of an error, else the last."""
        return next((line for line in self._lines if _TELLING.search(line)), self.last)

    def close(self) -> None:
        """Wait a moment for the end. A process that the child left behind may hold the stream open for ever."""
        self._thread.join(1.0)

    def _read(self) -> None:
        with contextlib.suppress(OSError, ValueError), self._stream:
            while line := self._stream.readline(_LINE_BYTES):
                self._take(line.decode("utf-8", errors="replace").strip())

    def _take(self, line: str) -> None:
        if line.startswith(MARK):
            self._understand(line.removeprefix(MARK))
        elif line:
            self.last = "".join(filter(str.isprintable, line))[:_LINE_CHARACTERS]
            if len(self._lines) < _MAX_LINES:
                self._lines.append(self.last)

    def _understand(self, text: str) -> None:
        try:
            told: Any = json.loads(text)
        except ValueError:
            return
        if not isinstance(told, dict):
            return
        if isinstance(told.get("stage"), str):
            self.stage = told["stage"]
        outcome, detail = told.get("outcome"), told.get("detail")
        if outcome in ("right", "wrong", "failed", "undecided") and isinstance(detail, str):
            self.verdict = outcome, detail[: 2 * _LINE_CHARACTERS]
