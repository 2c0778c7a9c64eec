"""The package of the kernels by itself: what `pip install ./kernels` gives needs nothing but torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
import torch
from pathlib import Path

import transfusion_kernels
from transfusion_kernels import IntervalMask, interval_attention

assert Path(transfusion_kernels.__file__).is_relative_to(sys.argv[1]), transfusion_kernels.__file__
start = torch.zeros(1, 8, dtype=torch.int32)
q = torch.randn(1, 2, 8, 16, requires_grad=True)
interval_attention(q, q, q, IntervalMask.from_spans(start, start)).sum().backward()
others = {"transfusion", "pydantic", "webdataset", "sentencepiece", "deepspeed", "typer", "safetensors", "PIL"}
print(sorted(others & set(sys.modules)), len(list(Path(sys.argv[1]).rglob("*.py"))))
"""


@pytest.mark.slow
def test_the_kernels_install_alone(tmp_path: Path) -> None:
    # Without what an installation in the checkout leaves behind.
    ignored = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=ignored)
    # What proves the kernels stays behind.
    written = sum("verification" not in file.parts for file in (tmp_path / "kernels").rglob("*.py"))
    options = "--no-deps --no-build-isolation --no-index --quiet --wheel-dir out"
    command = [sys.executable, "-m", "pip", "wheel", *options.split(), "./kernels"]
    made = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    (wheel,) = (tmp_path / "out").glob("transfusion_kernels-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    variables = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "site")],
        env=variables, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.stdout.split() == ["[]", str(written)], ended.stderr
