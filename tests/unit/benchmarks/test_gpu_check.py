"""launch/gpu_check.sh, tiny and on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "launch" / "gpu_check.sh"


def check(out: Path, *arguments: str) -> tuple[int, str]:
    ended = subprocess.run(
        ["bash", str(SCRIPT), "--cpu", "--seconds", "1400", *arguments, str(out)],
        capture_output=True, text=True, timeout=1500, env={**os.environ, "PYTHON": sys.executable},
    )  # fmt: skip
    return ended.returncode, ended.stdout + ended.stderr


@pytest.mark.slow
def test_all_parts_on_the_cpu(tmp_path: Path) -> None:
    code, printed = check(tmp_path / "out")
    assert code == 0, printed
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"results.json", "log.txt", "report.html", "grid.png"}
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["passed"] and all(part["exit_code"] == 0 for part in results["parts"])
    assert results["tests"]["tests"] > 400 and results["tests"]["failed"] == {}
    assert any(result["status"] == "ok" for result in results["attention"]["results"])
    assert results["steps"]["local"]["step"]["tokens_per_second"] > 0
    assert "text_loss_nats_per_token" in results["quickstart"]["metrics"]
    assert results["quickstart"]["log"][-1]["step"] == 3


@pytest.mark.slow
def test_a_part_that_fails_stops_no_other(tmp_path: Path) -> None:
    code, printed = check(tmp_path, "--only", "quickstart-export,step-local")
    assert code == 3, printed
    results = json.loads((tmp_path / "results.json").read_text())
    parts = {part["name"]: part["exit_code"] for part in results["parts"]}
    assert parts.keys() == {"quickstart-export", "step-local"}
    assert parts["quickstart-export"] != 0 and parts["step-local"] == 0
    assert not results["passed"] and results["attention"] is None
    assert results["steps"]["local"]["step"]["step_ms"] > 0


def test_bad_arguments_are_told(tmp_path: Path) -> None:
    for arguments in (["--nonsense"], [], ["--seconds"], ["--seconds", "soon", str(tmp_path)]):
        ended = subprocess.run(["bash", str(SCRIPT), *arguments], capture_output=True, text=True)
        assert ended.returncode == 2 and ended.stderr.startswith("usage: ")
