"""Whether kernels give right results on a GPU, found out in a process of its own and kept on record.

`python -m transfusion_kernels.probe` probes from the command line. `dispatch` asks `verdict_on` before it takes a
kernel by itself.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from transfusion_kernels.probe import records
from transfusion_kernels.probe.process import KILL_SECONDS, child_command, run_child
from transfusion_kernels.probe.records import Subject, Verdict

__all__ = ["COMMAND", "LIMIT_SECONDS", "Subject", "Verdict", "say", "verdict_on"]

COMMAND = "python -m transfusion_kernels.probe"
# The limit of a probe. Killing what hangs takes a few seconds more.
LIMIT_SECONDS = 40.0
# How much longer than a probe's limit its record is waited for.
_PATIENCE_SECONDS = KILL_SECONDS + 2

# Verdicts that could not be put on record.
_kept: dict[Subject, Verdict] = {}


def verdict_on(
    subject: Subject,
    device: str,
    folder: Path | None,
    *,
    probes: bool = True,
    again: bool = False,
    seconds: float = LIMIT_SECONDS,
    variables: Mapping[str, str] | None = None,
    command: Callable[[Subject, str, float], Sequence[str]] = child_command,
) -> Verdict | None:
    """The verdict on record, and where there is none that of a probe, which is then put on record.

    Of several processes that ask at the same time one probes, and the others wait for its record.

    Args:
        subject: What to find out about.
        device: Where the probe runs, such as "cuda:0".
        folder: That of the records. None keeps a verdict in this process alone.
        probes: Whether to probe at all. If not, None is returned where nothing is on record.
        again: Probe whatever is on record.
        seconds: The limit of a probe.
        variables: The environment of the probe's process, that of this one if None.
        command: Makes the command of the probe's process.
    """
    asked = time.time()
    known = None if again else _known(folder, subject)
    if known is not None or not probes:
        return known
    with records.locked(folder, subject, seconds + _PATIENCE_SECONDS):
        known = _known(folder, subject)
        # Another process may have probed meanwhile.
        if known is not None and (not again or known.time >= asked):
            return known
        say(
            f"trying the attention kernels ({subject.kernels}) on {subject.device} in a process of their own, "
            f"once a machine, for at most {seconds:g} s"
        )
        verdict = run_child(command(subject, device, seconds), seconds, variables)
        _keep(folder, subject, verdict)
    return verdict


def say(text: str) -> None:
    """Tell the user one line."""
    print(f"transfusion_kernels: {text}", file=sys.stderr, flush=True)


def _known(folder: Path | None, subject: Subject) -> Verdict | None:
    kept = _kept.get(subject)
    return kept if kept is not None and kept.counts else records.read(folder, subject)


def _keep(folder: Path | None, subject: Subject, verdict: Verdict) -> None:
    _kept.pop(subject, None)
    problem = "there is no home folder"
    if folder is not None:
        try:
            records.write(folder, subject, verdict)
            return
        except OSError as error:
            problem = f"{folder} cannot be written: {error.strerror or error}"
    _kept[subject] = verdict
    say(f"every process tries the kernels anew, since {problem}. TRANSFUSION_CACHE can name another folder")
