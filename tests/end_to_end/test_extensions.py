"""The extension guides run as written: the Python of each page, one script, in an empty folder."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PAGES = [page for page in sorted(ROOT.glob("docs/extend/*.md")) if "```python" in page.read_text("utf-8")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_page_runs(page: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    assert "assert " in blocks[-1] or any("assert " in block for block in blocks)
    (tmp_path / "script.py").write_text("\n".join(blocks), encoding="utf-8")
    ended = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_there_are_pages() -> None:
    assert {"codec", "family", "kernel", "sampler", "suite"} <= {page.stem for page in PAGES}
