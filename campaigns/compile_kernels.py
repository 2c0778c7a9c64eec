"""Compiles every form of the kernels, those for Hopper too, for seven GPUs of NVIDIA and AMD, and reads the code.

    .venv/bin/python campaigns/compile_kernels.py [--targets sm_90,...] [--kinds cache,...] [--out FILE]

Needs no GPU; takes an hour. Prints a table and writes benchmarks/results/compiled-kernels-triton-VERSION.json, where
what was not asked for this time stays as it stands, each kernel with the date at which it was compiled. Exits with 1
when a form that is shipped for NVIDIA or AMD spills, waits for each matrix product, or misses the tensor cores.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from transfusion_kernels.attention.hopper import compile_cases
from transfusion_kernels.verification.machine_code import Report
from transfusion_kernels.verification.shipped import (
    TARGETS,
    compile_cache_form,
    compile_case,
    compile_form,
    compile_helpers,
    shipped_cache_forms,
    shipped_forms,
    triton_version,
)

ROOT = Path(__file__).resolve().parents[1]

KINDS = {
    "16-bit": "attention in 16 bits",
    "float32": "the same in float32",
    "cache": "attention to a cache",
    "helpers": "kernels that multiply no matrices",
    "hopper": "the kernels for sm_90 alone",
}


def compile_all(targets: list[str], kinds: list[str]) -> Iterator[list[tuple[Report, list[str]]]]:
    """The reports on every form of these kinds, each with what is wrong with it."""
    for target in targets:
        for form in shipped_forms(target):
            if ("float32" if form.exact else "16-bit") in kinds:
                yield compile_form(form)
        for cache_form in shipped_cache_forms(target) if "cache" in kinds else ():
            yield compile_cache_form(cache_form)
        if "helpers" in kinds:
            yield compile_helpers(target)
        if "hopper" in kinds and target == "sm_90":
            yield [compile_case(case) for case in compile_cases()]


def chosen(text: str, of: Iterable[str], option: str, parser: argparse.ArgumentParser) -> list[str]:
    """The names of a list with commas; those of `of` are known."""
    names = text.split(",")
    if unknown := set(names) - set(of):
        parser.error(f"{option}: got {sorted(unknown)}, takes {', '.join(of)}")
    return names


def earlier(out: Path, versions: dict[str, str]) -> dict[str, dict[str, Any]]:
    """The kernels of an earlier record by name, each with its date; none if other versions made it."""
    if not out.exists():
        return {}
    record = json.loads(out.read_text(encoding="utf-8"))
    if record["versions"] != versions:
        return {}
    return {kernel["name"]: {"compiled": record["date"]} | kernel for kernel in record["kernels"]}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    targets_help = f"comma-separated, of {', '.join(TARGETS)}; all, unless given"
    parser.add_argument("--targets", default=",".join(TARGETS), help=targets_help)
    kinds_help = "; ".join(f"{kind}: {meaning}" for kind, meaning in KINDS.items())
    parser.add_argument(
        "--kinds", default=",".join(KINDS), help=f"comma-separated; all, unless given. {kinds_help}"
    )
    name = f"compiled-kernels-triton-{triton_version()}.json"
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / name)
    arguments = parser.parse_args()
    targets = chosen(arguments.targets, TARGETS, "--targets", parser)
    kinds = chosen(arguments.kinds, KINDS, "--kinds", parser)
    today = datetime.now(UTC).date().isoformat()
    versions = {
        "triton": triton_version(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
    kernels: dict[str, dict[str, Any]] = {}
    print(f"{'kernel':84} {'registers':>9} {'spills':>7} {'shared':>7}  instructions")
    for compiled in compile_all(targets, kinds):
        for report, wrong in compiled:
            kernels[report.name] = {"compiled": today, **report.as_dict(), "problems": wrong}
            counts = " ".join(f"{kind}:{count}" for kind, count in report.instructions.items() if count)
            spills = f"{report.spill_stores}/{report.spill_loads}"
            print(f"{report.name:84} {report.registers:9} {spills:>7} {report.shared_bytes:7}  {counts}")
            for problem in wrong:
                print(f"    {problem}")
            sys.stdout.flush()
    kernels = earlier(arguments.out, versions) | kernels
    failed = [kernel["name"] for kernel in kernels.values() if kernel["problems"]]
    record = {
        "command": "python campaigns/compile_kernels.py",
        "date": today,
        "versions": versions,
        "targets": [target for target in TARGETS if any(k["target"] == target for k in kernels.values())],
        "violations": failed,
        "kernels": list(kernels.values()),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{len(kernels)} kernels, {len(failed)} with a violation")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
