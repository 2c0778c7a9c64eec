"""Runs the quickstart from nothing and records what it reached, how long it took and how much memory it held.

    .venv/bin/python campaigns/quickstart.py [--out benchmarks/results/quickstart.json] [section.key=value ...]
    .venv/bin/python campaigns/quickstart.py --clean-context

--clean-context: with the paper's share of captions first, clean context and a recipe that learns captions with it. Its
record is benchmarks/results/quickstart-clean-context.json.

Needs an installed checkout (the set-up is not part of the figure) and five minutes. Deletes runs/quickstart and
data/quickstart first. Exits with 3 when a threshold is missed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from transfusion.observe.environment import describe_environment

ROOT = Path(__file__).resolve().parents[1]
RUN = ROOT / "runs" / "quickstart"
MAX_SECONDS = 600
MAX_GIB = 4.0
KEPT = ("time", "python", "platform", "cpu", "cpu_count", "gpus", "packages", "git", "transfusion")
CLEAN_CONTEXT = [
    "data.caption_first=0.8",
    "diffusion.context=clean",
    "diffusion.prediction=x",
    "diffusion.image_loss_weight=0.5",
    "model.modality_weights=all",
    "optimizer.name=muon",
]
STAGE = re.compile(r"^  (\S+)\s+(\d+) s$", re.MULTILINE)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--clean-context", action="store_true")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    name = "quickstart-clean-context.json" if options.clean_context else "quickstart.json"
    out: Path = options.out or ROOT / "benchmarks" / "results" / name
    overrides = [*(CLEAN_CONTEXT if options.clean_context else []), *options.overrides]
    command = ["bash", str(ROOT / "launch" / "quickstart.sh"), "--fresh", *overrides]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    memory = PeakMemory(process.pid)
    memory.start()
    printed, _ = process.communicate()
    memory.join()
    print(printed)
    if process.returncode:
        print(f"the quickstart failed with exit code {process.returncode}", file=sys.stderr)
        return process.returncode
    stages = {name: int(seconds) for name, seconds in STAGE.findall(printed)}
    seconds = sum(value for name, value in stages.items() if name != "set-up")
    metrics = json.loads((RUN / "metrics.json").read_text(encoding="utf-8"))["details"]
    environment = describe_environment()
    record: dict[str, Any] = {
        "command": " ".join(["python campaigns/quickstart.py", *sys.argv[1:]]),
        "overrides": overrides,
        "environment": {name: environment[name] for name in KEPT},
        "seconds_without_set_up": seconds,
        "seconds_by_stage": stages,
        "peak_memory_gib": round(memory.peak_bytes / 2**30, 2),
        "metrics": metrics,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    missed = [name for name, metric in metrics.items() if metric["passed"] is False]
    if seconds > MAX_SECONDS:
        missed.append(f"{seconds} s of at most {MAX_SECONDS}")
    if record["peak_memory_gib"] >= MAX_GIB:
        missed.append(f"{record['peak_memory_gib']} GiB of less than {MAX_GIB}")
    print("missed: " + ", ".join(missed) if missed else "every threshold reached")
    return 3 if missed else 0


class PeakMemory(threading.Thread):
    """Greatest proportional memory (PSS, so that shared pages count once) of a process and all it started."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.peak_bytes = pid, 0

    def run(self) -> None:
        while Path(f"/proc/{self.pid}").exists():
            self.peak_bytes = max(self.peak_bytes, sum(_pss_bytes(pid) for pid in _family(self.pid)))
            time.sleep(0.5)


def _family(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return [pid]
    return [pid, *(member for child in children for member in _family(int(child)))]


def _pss_bytes(pid: int) -> int:
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    found = re.search(r"^Pss:\s+(\d+) kB", rollup, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


if __name__ == "__main__":
    sys.exit(main())
