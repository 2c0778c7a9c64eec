"""The launch scripts: right whatever the shell that calls them has set."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
Call = Callable[..., tuple[int, list[str], str]]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with nothing but the launch scripts, and a decoy of the same name elsewhere."""
    shutil.copytree(LAUNCH, tmp_path / "checkout/launch")
    (tmp_path / "decoy/launch").mkdir(parents=True)
    return tmp_path / "checkout"


@pytest.mark.parametrize("path", [None, ".", "{decoy}", "{decoy}:."])
def test_they_go_to_their_checkout_whatever_cdpath_says(checkout: Path, path: str | None) -> None:
    script = checkout / "launch/where.sh"
    script.write_text(
        'set -euo pipefail\nsource "$(dirname "${BASH_SOURCE[0]}")/env.sh"\necho "$ROOT"\necho "$PWD"\n'
    )
    variables = {name: value for name, value in os.environ.items() if name != "CDPATH"}
    if path is not None:
        variables["CDPATH"] = path.format(decoy=checkout.parent / "decoy")
    done = subprocess.run(
        ["bash", "launch/where.sh"], cwd=checkout, env=variables, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{checkout}\n{checkout}\n", "")


def test_what_does_not_reach_other_machines_is_refused(checkout: Path) -> None:
    (checkout / "launch/hostfile").write_text("one slots=8\ntwo slots=8\n")
    (checkout / "a.yaml").write_text("")
    done = subprocess.run(
        ["bash", "launch/deepspeed.sh", "a.yaml", "wandb.name=it's"],
        cwd=checkout,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr == (
        "an argument holds a ', which does not reach other machines;"
        " write that setting into the configuration file\n"
    )


# In place of Python: notes each command of transfusion, leaves what it would make, and fails where FAILS is in it.
STAND_IN = """#!/usr/bin/env bash
[[ "$1" == -m ]] || exit 1
shift
echo "$*" >> "$CALLS"
if [[ "$*" == *"${FAILS:-no such command}"* ]]; then
    [[ "$2" != sample ]] || { mkdir -p "$5" && touch "$5/index.jsonl"; }
    exit "${CODE:-130}"
fi
case "$2 $3" in
    "codec train") mkdir -p "${5#run.dir=}/codec" && touch "${5#run.dir=}/codec/config.json" ;;
    "tokenizer train") mkdir -p data/emoji-font && touch data/emoji-font/tokenizer.model ;;
    "export "*) mkdir -p "$5" && touch "$5/config.json" ;;
    "sample "*) mkdir -p "$5" && touch "$5/index.jsonl" ;;
    "eval "*) touch runs/emoji-font/metrics.json ;;
    "--standalone "*) mkdir -p runs/emoji-font && cp -n /dev/null runs/emoji-font/metrics.jsonl ;;
esac
"""
STAND_IN_ENVIRONMENT = """
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"
PYTHON="$ROOT/python"
ensure_venv() { echo "install $*" >> "$CALLS"; }
process_count() { echo 1; }
check_config() { "$PYTHON" -m transfusion config "$@"; }
fail() { echo "$*" >&2; exit 2; }
"""


@pytest.fixture
def call(checkout: Path) -> Call:
    """call(script, *arguments, **variables) -> exit code, and the commands of transfusion that it gave."""
    (checkout / "python").write_text(STAND_IN)
    (checkout / "python").chmod(0o755)
    (checkout / "launch/env.sh").write_text(STAND_IN_ENVIRONMENT)
    calls = checkout.parent / "calls"

    def run(script: str, *arguments: str, **variables: str) -> tuple[int, list[str], str]:
        calls.write_text("")
        done = subprocess.run(
            ["bash", str(checkout / "launch" / script), *arguments],
            cwd=checkout.parent,
            env=os.environ | {"CALLS": str(calls)} | variables,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode, calls.read_text().splitlines(), done.stderr

    return run


def test_a_job_that_was_stopped_while_it_drew_draws_again(checkout: Path, call: Call) -> None:
    code, _, told = call("emoji.sh", FAILS="transfusion sample")
    assert code == 130 and 'Stopped in stage "sample"' in told
    code, calls, _ = call("emoji.sh")
    assert code == 0 and [line for line in calls if line.startswith("transfusion sample")]
    assert (checkout / "runs/emoji-font/images/index.jsonl").is_file()
    code, calls, _ = call("emoji.sh")
    assert code == 0 and not [line for line in calls if line.startswith("transfusion sample")]


def test_a_font_is_named_from_where_the_job_is_started(checkout: Path, call: Call) -> None:
    (checkout.parent / "my font.ttf").write_text("")
    code, calls, _ = call("emoji.sh", FONT="my font.ttf")
    assert code == 0
    assert (
        f"transfusion prepare emoji --out data/emoji-font/images --font {checkout.parent}/my font.ttf"
        in calls
    )


@pytest.mark.parametrize("script", ["quickstart.sh", "emoji.sh"])
def test_a_mistake_beside_fresh_deletes_nothing(checkout: Path, call: Call, script: str) -> None:
    folder = "quickstart" if script == "quickstart.sh" else "emoji-font"
    for made in (f"data/{folder}/codec/config.json", f"runs/{folder}/metrics.jsonl"):
        (checkout / made).parent.mkdir(parents=True)
        (checkout / made).write_text("")
    code, calls, _ = call(script, "--fresh", "train.stepz=6", FAILS="train.stepz", CODE="2")
    assert code == 2 and not [line for line in calls if "prepare" in line]
    assert (checkout / f"data/{folder}/codec/config.json").exists()
    assert (checkout / f"runs/{folder}/metrics.jsonl").exists()
    call(script, "--fresh", FAILS="transfusion prepare")
    assert not (checkout / f"data/{folder}").exists() and not (checkout / f"runs/{folder}").exists()


@pytest.mark.parametrize(
    "words", [["nonsense"], ["prepare", "a", "b", "c", "d"], ["editing", "missing"], ["editing", "."]]
)
def test_experiments_that_cannot_start_say_so_in_one_line(call: Call, words: list[str]) -> None:
    code, calls, told = call("experiments.sh", *words)
    assert (code, calls, len(told.splitlines())) == (2, [], 1)
