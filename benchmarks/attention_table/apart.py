"""A process for each provider of attention.py, so that a kernel that hangs or crashes loses its own lines only."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from attention_table.cases import Case
from attention_table.measure import WRONG_OR_FAILED, Options, Table, exit_code, line_of
from attention_table.providers import PROVIDERS, Provider
from limits import Limits, write_json

# What runs one provider, and how often its results are looked at.
COMMAND = (sys.executable, str(Path(__file__).resolve().parents[1] / "attention.py"))
POLL_SECONDS = 0.1


def measure_apart(
    options: Options,
    providers: Sequence[Provider],
    limits: Limits,
    deadline: float,
    results: list[dict[str, Any]],
    keep: Callable[[], None],
) -> None:
    """Fill the table, each provider in processes of its own, as `Table.fill` does. What hung once is not begun again.

    The share is of the products that this process measured, before all others.
    """
    trouble: dict[str, str] = {}
    for cases, some in options.stages(providers):
        for provider in some:
            lines = [{**asdict(case), "provider": provider.name, "ours": provider.ours} for case in cases]
            before = len(results)
            why = trouble.get(provider.name, "" if time.monotonic() < deadline else "out of time")
            if why:
                own = [line | {"status": "skipped", "reason": why} for line in lines]
                _print(own)
            else:
                show = functools.partial(_show, list(results), results, keep)
                own, status, reason = _in_a_process(options, provider, cases, limits, deadline, show)
                missing = _missing(lines, own, status, reason)
                if missing:
                    trouble[provider.name] = f"{provider.name} {missing[0]['status']} before"
                own = [*own[: len(lines) - len(missing)], *missing]
                del results[before:]
            results += own
            keep()


def _show(
    before: list[dict[str, Any]],
    results: list[dict[str, Any]],
    keep: Callable[[], None],
    own: list[dict[str, Any]],
) -> None:
    """Let the record hold what a process has written so far, behind what was there before."""
    results[:] = [*before, *own]
    keep()


def _in_a_process(
    options: Options,
    provider: Provider,
    cases: Sequence[Case],
    limits: Limits,
    deadline: float,
    show: Callable[[list[dict[str, Any]]], None],
) -> tuple[list[dict[str, Any]], str, str]:
    """The results that a process wrote, and the status and reason of what it did not finish, or nothing."""
    with tempfile.TemporaryDirectory() as folder:
        job, written = Path(folder) / "job.json", Path(folder) / "results.json"
        job_options = asdict(options) | {
            "device": str(options.device),
            "seconds": max(0.0, deadline - time.monotonic()),
        }
        described = {
            "options": job_options,
            "provider": provider.name,
            "cases": [asdict(case) for case in cases],
            "limits": limits.as_dict(),
            "threads": torch.get_num_threads(),
            "results": str(written),
        }
        write_json(described, job)
        process = subprocess.Popen([*COMMAND, "--job", str(job)], start_new_session=True)
        try:
            assert options.isolate is not None
            status, reason = _watch(process, written, options.isolate, show)
        finally:
            _end(process)
        return _read(written), status, reason


def _watch(
    process: subprocess.Popen[bytes],
    written: Path,
    silence: float,
    show: Callable[[list[dict[str, Any]]], None],
) -> tuple[str, str]:
    """Wait until the process ends or writes nothing new for `silence` seconds. Status and reason, if it ended badly."""
    heard, before = time.monotonic(), 0
    while time.monotonic() - heard < silence:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(POLL_SECONDS)
            ended_well = code in (0, WRONG_OR_FAILED)
            return ("", "") if ended_well else ("failed", f"its process ended with {code}")
        now = written.stat().st_mtime_ns if written.exists() else 0
        if now != before:
            heard, before = time.monotonic(), now
            show(_read(written))
    return "hung", f"no new figure for {silence:g} s"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started. One that the driver holds may not go, and is left behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)


def _read(written: Path) -> list[dict[str, Any]]:
    if not written.exists():
        return []
    results: list[dict[str, Any]] = json.loads(written.read_text(encoding="utf-8"))["results"]
    return results


def _missing(
    lines: Sequence[dict[str, Any]], own: Sequence[dict[str, Any]], status: str, reason: str
) -> list[dict[str, Any]]:
    """What a provider did not finish: the line that it was at, with what it had, and those that it never came to."""
    finished = sum(result["status"] != "running" for result in own)
    if finished == len(lines):
        return []
    at = lines[finished] | (own[finished] if len(own) > finished else {})
    # A process that ends as if all were well has written all its lines.
    ended = (status, reason) if status else ("failed", "its process left no result")
    never = {"status": "skipped", "reason": f"{at['provider']} {ended[0]} before"}
    missing = [at | dict(zip(("status", "reason"), ended, strict=True))]
    missing += [line | never for line in lines[finished + 1 :]]
    _print(missing)
    return missing


def _print(results: Sequence[dict[str, Any]]) -> None:
    for result in results:
        print(line_of(result), flush=True)


def run_job(job: Path) -> int:
    """What a process of its own does: measure one provider on some cases, as `_in_a_process` describes them."""
    described = json.loads(job.read_text(encoding="utf-8"))
    torch.set_num_threads(described["threads"])
    given = described["options"]
    options = Options(**given | {"device": torch.device(given["device"])})
    provider = next(each for each in PROVIDERS if each.name == described["provider"])
    cases = [Case(**case) for case in described["cases"]]
    limits = Limits(**described["limits"])
    record: dict[str, Any] = {"results": []}

    def keep() -> None:
        write_json(record, Path(described["results"]))

    table = Table(options, limits, time.monotonic() + options.seconds)
    table.fill(cases, [provider], record["results"], keep)
    keep()
    return exit_code(record)
