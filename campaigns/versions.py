"""Tests this checkout with other versions of torch and Triton, an environment each, and records what passed.

    .venv/bin/python campaigns/versions.py [--torch 2.11.0 2.15.0] [--keep FOLDER] [--out FILE] [-- PYTEST ARGUMENTS]

Needs no GPU, but PyPI: torch there is a CUDA build, which imports without a GPU and fetches gigabytes once. Everything
else is at the versions of constraints.txt, and Triton is the one that the torch asks for. --keep holds the environments
for a later run. Without arguments for pytest it runs `-m "not slow"`, twenty minutes for each on two cores. What was
not asked for this time stays in the record. Exits with 1 when a test fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "versions.json"
TORCH = ("2.11.0", "2.12.1", "2.13.0", "2.14.1", "2.15.0")
EXTRAS = "all,test,oracles,docs"
# The interpreter of Triton 3.6, which torch 2.11 asks for, cannot take numpy 2.4.
PINNED = {"2.11.0": {"numpy": "2.3.5"}}
ARGUMENTS = ("-m", "not slow", "-n", "2", "--dist", "loadfile")
NAMED = ("torch", "triton", "numpy", "deepspeed", "diffusers", "transformers")


def environment(torch: str, folder: Path) -> Path:
    """The Python of an environment with a version of torch and this checkout, made where it is not there yet."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    for name, version in {"torch": torch, **PINNED.get(torch, {})}.items():
        pinned = re.sub(rf"^{name}==.*$", f"{name}=={version}", pinned, flags=re.MULTILINE)
    # torch says which Triton it wants.
    pinned = re.sub(r"^triton==.*$", "", pinned, flags=re.MULTILINE)
    constraints = folder / "constraints.txt"
    constraints.write_text(pinned, encoding="utf-8")
    install = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", str(constraints))
    # A cap of the machine on versions of torch is not meant for this.
    variables = os.environ | {"DS_BUILD_OPS": "0", "PIP_CONSTRAINT": os.devnull}
    subprocess.run([python, *install, "-e", f"{ROOT}[{EXTRAS}]"], check=True, env=variables)
    return python


def versions(python: Path) -> dict[str, str]:
    """What an environment holds, each package imported."""
    code = f"import json\nprint(json.dumps({{name: __import__(name).__version__ for name in {NAMED}}}))"
    printed = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout
    found: dict[str, str] = json.loads(printed.splitlines()[-1])
    return found


def test(python: Path, arguments: list[str], report: Path) -> dict[str, Any]:
    """Run pytest; how many tests passed, failed and were skipped, and which failed."""
    begin = time.monotonic()
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml", report, *arguments]
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    suite = ElementTree.parse(report).getroot().find("testsuite")
    if suite is None:
        raise SystemExit(f"pytest ended with {code} and wrote no report")
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    bad = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return counts | {"exit_code": code, "seconds": round(time.monotonic() - begin), "failed": bad}


def main() -> int:
    given = sys.argv[1:]
    split = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch", nargs="+", default=list(TORCH), help=f"default: {' '.join(TORCH)}")
    parser.add_argument("--keep", type=Path, help="where the environments are kept")
    parser.add_argument("--out", type=Path, default=RESULT, help="where the JSON goes")
    options = parser.parse_args(given[:split])
    arguments = given[split + 1 :] or list(ARGUMENTS)
    record = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        for torch in options.torch:
            python = environment(torch, (options.keep or Path(temporary)) / f"torch-{torch}")
            found = {
                "date": datetime.now(UTC).date().isoformat(),
                "versions": versions(python),
                "pytest": " ".join(arguments),
                **test(python, arguments, Path(temporary) / "report.xml"),
            }
            print(json.dumps({torch: found}, indent=1), flush=True)
            record[torch] = found
            options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 1 if any(record[torch]["exit_code"] for torch in options.torch) else 0


if __name__ == "__main__":
    sys.exit(main())
