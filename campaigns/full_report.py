"""Trains a small model of digits, emoji, edits and texts, runs every suite that needs no network, writes its report.

    .venv/bin/python campaigns/full_report.py --images DIR --edits DIR --text DIR [--keep FOLDER] [--out FILE]

DIR/train and DIR/val hold shards: captioned images of 32 pixels or more (*.tar), documents of an image, a text and an
image (*.tar), and texts (*.jsonl). Records how long the evaluation and the report take, and each figure. Exits with 3
when a command fails, a suite leaves no figure, or the evaluation and the report take longer than 15 minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from transfusion.observe.environment import describe_environment

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "full-report.json"
KEPT = ("time", "python", "platform", "cpu", "cpu_count", "packages", "git", "transfusion")
CONFIG, SUITES = "configs/train/everything.yaml", "configs/suites/offline.yaml"
DATA, RUN = "data/everything", "runs/everything"
# Of the validation texts, as many as take seconds.
TEXTS = 200
MAX_SECONDS = 900.0
TRAINING = f"""
transfusion prepare digits --out {DATA}/digits
transfusion tokenizer train {DATA}/images/train/*.tar {DATA}/digits/train/*.tar {DATA}/text/train/*.jsonl --out {DATA}/tokenizer.model --vocabulary 2048
torchrun --standalone --nproc-per-node 2 -m transfusion train {CONFIG}
transfusion export {RUN} --out {RUN}/export
transfusion classifier {CONFIG} --out {DATA}/classifier.safetensors 'data.sources=[{{name: emoji, shards: {DATA}/images/train/*.tar}}]' 'data.validation=[{{name: emoji, shards: {DATA}/images/val/*.tar}}]'
"""  # noqa: E501
EVALUATION = f"""
transfusion eval {RUN}/export --suite {SUITES} --classifier {DATA}/classifier.safetensors --out {RUN}
transfusion report {RUN}
"""


def link(place: Path, images: Path, edits: Path, text: Path) -> None:
    """The folders under the names that the configuration has, and a few texts to measure."""
    data = place / DATA
    data.mkdir(parents=True, exist_ok=True)
    for name, folder in (("images", images), ("edits", edits), ("text", text)):
        (data / name).unlink(missing_ok=True)
        (data / name).symlink_to(folder.resolve(strict=True))
    if not (place / "configs").exists():
        (place / "configs").symlink_to(ROOT / "configs")
    with (data / "text_validation.jsonl").open("w", encoding="utf-8") as out:
        for path in sorted((text / "val").glob("*.jsonl")):
            with path.open(encoding="utf-8") as lines:
                out.writelines(islice(lines, TEXTS))
            break


def run(commands: str, place: Path, done: list[dict[str, Any]]) -> float:
    """Run a command a line, as a user would, and note them; returns the seconds of all. One that fails is the last."""
    begin = time.monotonic()
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for command in commands.strip().splitlines():
        started = time.monotonic()
        print(f"$ {command}", flush=True)
        code = subprocess.run(command, shell=True, cwd=place, env=environment, check=False).returncode
        done.append(
            {
                "command": shlex.split(command)[:3],
                "code": code,
                "seconds": round(time.monotonic() - started, 1),
            }
        )
        if code:
            break
    return time.monotonic() - begin


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("images", "edits", "text"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument(
        "--keep", type=Path, help="the folder of data, run and report; its trained model is used again"
    )
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        place = options.keep or Path(folder)
        link(place, options.images, options.edits, options.text)
        done: list[dict[str, Any]] = []
        if not (place / DATA / "classifier.safetensors").exists():
            run(TRAINING, place, done)
        seconds = 0.0
        if not any(each["code"] for each in done):
            # Figures of a former run would hide a suite that leaves none.
            (place / RUN / "metrics.json").unlink(missing_ok=True)
            seconds = run(EVALUATION, place, done)
        environment = describe_environment()
        metrics = place / RUN / "metrics.json"
        details = json.loads(metrics.read_text(encoding="utf-8"))["details"] if metrics.exists() else {}
    suites = list(yaml.safe_load((ROOT / SUITES).read_text(encoding="utf-8")))
    # A later suite takes over figures of the same name.
    silent = [name for name in suites if name not in {detail["suite"] for detail in details.values()}]
    missed = [
        *(f"{' '.join(each['command'])}: exit code {each['code']}" for each in done if each["code"]),
        *(f"suite {name} left no figure" for name in silent),
        *([f"{seconds:.0f} s of at most {MAX_SECONDS:.0f}"] if seconds > MAX_SECONDS else []),
    ]
    record = {
        "environment": {name: environment[name] for name in KEPT},
        "commands": done,
        "evaluation_and_report_seconds": round(seconds, 1),
        "suites": suites,
        "figures": {name: detail["value"] for name, detail in details.items()},
        "missed": missed,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{len(details)} figures of {len(suites)} suites, evaluation and report in {seconds:.0f} s")
    for line in missed:
        print(f"missed: {line}")
    return 3 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
