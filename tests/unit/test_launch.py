"""The launch scripts: right whatever the shell that calls them has set."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"


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
