"""Starts the interpreter's tests, which need an environment variable before the kernels are imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "test_interpreted.py",
        "test_interpreted_decode.py",
        "test_interpreted_derived.py",
        "test_interpreted_public_bugs.py",
        "test_interpreted_second.py",
    ],
)
def test_triton_kernels_in_the_interpreter(name: str) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    path = Path(__file__).with_name(name)
    command = [sys.executable, "-m", "pytest", str(path), "-q", "-p", "no:cacheprovider"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert "skipped" not in result.stdout.splitlines()[-1]
