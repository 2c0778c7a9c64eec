"""`launch/gpu_check.sh`: reads the arguments, runs the parts of a call, says what it found."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from gpu_check import fakes, processes, summary, verdicts
from gpu_check.calls import REHEARSAL_SLACK, SECONDS, Call, Setup
from gpu_check.record import RESULTS, Record, read_json
from gpu_check.runner import Part, Runner

ROOT = Path(__file__).resolve().parents[2]
NOT_ALL_PASSED = 3
NEXT = "bash launch/gpu_check.sh --call 2 OUT"
# Parts whose end is a finding, not a fault of the call.
FINE = ("passed", "skipped")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a call. Returns 0 if all parts passed, 3 if not, and does not return where a signal ends it."""
    parser = _parser()
    given = parser.parse_args(arguments)
    out = given.out.resolve()
    setup = Setup(
        python=sys.executable,
        root=ROOT,
        work=given.work.resolve(),
        carried=given.carried.resolve(),
        cpu=given.cpu,
        fakes=dict(each.split("=", 1) for each in given.fake),
    )
    setup.work.mkdir(parents=True, exist_ok=True)
    kept = setup.work / f"call-{given.call}.json"
    former = _former(given.after or setup.work) if given.call == 2 else {}
    if given.after and not former:
        parser.error(f"{given.after} holds no results.json of a first call")
    verdicts.restore(former.get("kernels", []), setup.kernels)
    record = Record(out, {"call": given.call, "rehearsal": given.cpu, "kernels": former.get("kernels", [])})
    mark = f"{os.getpid()}-{time.time_ns()}"
    watch = processes.start_watch(mark)
    runner = Runner(
        record,
        seconds=given.seconds or SECONDS[given.call],
        root=ROOT,
        variables=setup.variables(dict(os.environ)),
        mark=mark,
        slack=REHEARSAL_SLACK if given.cpu else 1.0,
    )
    call = Call(setup, record, runner, former)
    parts = [part for part in call.parts(given.call) if _wanted(part, given.only)]
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        signal.signal(getattr(signal, name), _stop)
    try:
        runner.run(parts)
        record.data["finished"] = True
    finally:
        processes.end_all(mark)
        watch.kill()
        _tell(record, parts, given.call, call)
        shutil.copyfile(record.path, kept)
    return 0 if record.data["passed"] else NOT_ALL_PASSED


def _tell(record: Record, parts: Sequence[Part], number: int, call: Call) -> None:
    """The end of what is printed, and of the record."""
    found = record.data["parts"]
    record.data["passed"] = all(found.get(part.name, {}).get("status") in FINE for part in parts)
    record.data["summary"] = summary.lines_of(record.data)
    print("\n".join(["", *_table(found), "", *call.verdicts().lines, *record.data["summary"]]), flush=True)
    if number == 1:
        wrong = call.wrong()
        unknown = not call.verdicts().records
        does = f"looks into {', '.join(wrong)}, sweeps the others" if wrong else "sweeps variants"
        does = "probes the kernels first" if unknown else does
        record.data["next"] = {"does": f"{does}, and trains", "command": NEXT}
        print(
            f"\nThe second call {does}, and trains. On this machine, and on another with this results.json in DIR:"
        )
        print(f"  {NEXT}\n  {NEXT.replace(' OUT', ' --after DIR OUT')}", flush=True)
    record.write()
    print(f"\n{record.seconds:.0f} s in all. Results in {record.path.parent}", flush=True)


def _table(found: dict[str, Any]) -> list[str]:
    return [
        f"  {name:<16}{part.get('seconds', 0):>6.1f} s  {part['status']} {part.get('reason', '')}".rstrip()
        for name, part in found.items()
    ]


def _former(folder: Path) -> dict[str, Any]:
    """What the first call found, from its output or from the working folder. Nothing if there is none."""
    for path in (folder / RESULTS, folder / "call-1.json"):
        found = read_json(path)
        if isinstance(found, dict) and found.get("call") == 1:
            return found
    return {}


def _wanted(part: Part, only: Sequence[str]) -> bool:
    """By `--only`, under its own name or the beginning of it before a dash."""
    return not only or any(part.name == name or part.name.startswith(f"{name}-") for name in only)


def _stop(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bash launch/gpu_check.sh",
        description="What only a GPU can tell, in two calls of 400 and 310 seconds. Exit code 0: all parts passed. 3: "
        "not all. OUT holds results.json and log.txt at any time.",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the results, eight files at most")
    parser.add_argument("--call", type=int, choices=(1, 2), default=1, help="which of the two (default: 1)")
    parser.add_argument(
        "--after", type=Path, metavar="DIR", help="the results of the first call, for the second"
    )
    parser.add_argument("--cpu", action="store_true", help="all of it tiny and on the CPU: a rehearsal")
    parser.add_argument("--seconds", type=_seconds, help="for everything together (default: 400 and 310)")
    parser.add_argument(
        "--only", type=lambda text: text.split(","), default=[], metavar="PART,...", help="these parts"
    )
    parser.add_argument(
        "--carried",
        type=Path,
        default=ROOT / "build" / "gpu",
        metavar="DIR",
        help="made by launch/gpu_wheels.sh",
    )
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "gpu_check", metavar="DIR",
        help="working folder, which both calls share on one machine (default: build/gpu_check)",
    )  # fmt: skip
    parser.add_argument("--fake", action="append", default=[], type=_fake, help=argparse.SUPPRESS)
    return parser


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < 1e6:
        raise ValueError(text)
    return seconds


def _fake(text: str) -> str:
    """PART=KIND, for rehearsals."""
    if text.partition("=")[2] not in fakes.KINDS:
        raise ValueError(text)
    return text


if __name__ == "__main__":
    sys.exit(main())
