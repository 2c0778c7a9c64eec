"""Ends processes with all that they have started, even in sessions of their own. Linux tells which those are in /proc.

    python -m gpu_check.processes MARK

waits for the end of its standard input, which another process holds open as long as it lives. Then it ends all
processes that bear the mark.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

# The environment variable that marks a process. Those that it starts inherit the mark.
VARIABLE = "GPU_CHECK_MARK"
# How long killed processes may take to go. One in the driver's hands may take for ever, and is then left behind.
KILL_SECONDS = 3.0
_POLL_SECONDS = 0.05


def marked(mark: str) -> list[int]:
    """The processes whose mark begins so, this one left out. One that has ended and waits for its parent is none."""
    sought = f"{VARIABLE}={mark}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            variables = (folder / "environ").read_bytes().split(b"\0")
            if any(variable.startswith(sought) for variable in variables):
                found.append(int(folder.name))
    return found


def end_all(mark: str, seconds: float = KILL_SECONDS) -> list[int]:
    """Kill all processes whose mark begins so, and those that they start meanwhile.

    Args:
        mark: What the mark begins with.
        seconds: How long to try.

    Returns:
        Those that would not go.
    """
    deadline = time.monotonic() + seconds
    while left := marked(mark):
        for process in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)
        if time.monotonic() > deadline:
            break
        time.sleep(_POLL_SECONDS)
    return left


def start_watch(mark: str) -> subprocess.Popen[bytes]:
    """Start what ends all processes with a mark once this process is gone, however it went.

    It stays as long as its standard input is open, which no other process inherits.
    """
    return subprocess.Popen(
        [sys.executable, "-S", str(Path(__file__)), mark],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={name: value for name, value in os.environ.items() if name != VARIABLE},
    )


def main() -> None:
    """Wait for the end of the input, then end what bears the mark."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    sys.stdin.buffer.read()
    end_all(sys.argv[1])


if __name__ == "__main__":
    main()
