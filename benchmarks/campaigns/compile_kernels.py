"""Compiles every form of the kernels for sm_80, sm_90 (the Hopper kernels too), sm_100 and gfx942, and reads the code.

    .venv/bin/python benchmarks/campaigns/compile_kernels.py [--targets sm_90,...] [--out FILE]

Needs no GPU; takes minutes. Prints a table and writes benchmarks/results/compiled-kernels-triton-VERSION.json. Exits
with 1 when a form that is shipped for NVIDIA or AMD spills, waits for each matrix product, or misses the tensor cores.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transfusion_kernels.attention.hopper import compile_cases
from transfusion_kernels.attention.shipped import (
    TARGETS,
    compile_cache_form,
    compile_case,
    compile_form,
    shipped_cache_forms,
    shipped_forms,
    triton_version,
)
from transfusion_kernels.machine_code import Report

ROOT = Path(__file__).resolve().parents[2]


def compile_all(targets: list[str]) -> Iterator[list[tuple[Report, list[str]]]]:
    """The reports on every form, each with what is wrong with it."""
    for target in targets:
        for form in shipped_forms(target):
            yield compile_form(form)
        for cache_form in shipped_cache_forms(target):
            yield compile_cache_form(cache_form)
        if target == "sm_90":
            yield [compile_case(case) for case in compile_cases()]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated; all, unless given")
    name = f"compiled-kernels-triton-{triton_version()}.json"
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / name)
    arguments = parser.parse_args()
    targets = arguments.targets.split(",")
    if unknown := set(targets) - set(TARGETS):
        parser.error(f"--targets: got {sorted(unknown)}, takes {', '.join(TARGETS)}")
    kernels: list[dict[str, Any]] = []
    print(f"{'kernel':84} {'registers':>9} {'spills':>7} {'shared':>7}  instructions")
    for compiled in compile_all(targets):
        for report, wrong in compiled:
            kernels.append({**report.as_dict(), "problems": wrong})
            counts = " ".join(f"{kind}:{count}" for kind, count in report.instructions.items() if count)
            spills = f"{report.spill_stores}/{report.spill_loads}"
            print(f"{report.name:84} {report.registers:9} {spills:>7} {report.shared_bytes:7}  {counts}")
            for problem in wrong:
                print(f"    {problem}")
            sys.stdout.flush()
    failed = [kernel["name"] for kernel in kernels if kernel["problems"]]
    record = {
        "command": "python benchmarks/campaigns/compile_kernels.py",
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {
            "triton": triton_version(),
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
        "targets": targets,
        "violations": failed,
        "kernels": kernels,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{len(kernels)} kernels, {len(failed)} with a violation")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
