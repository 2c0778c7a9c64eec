"""`import transfusion` is light, and gives its public names when they are asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

import transfusion


def test_importing_it_imports_nothing_heavy() -> None:
    code = "import sys, transfusion; print([name for name in ('torch', 'numpy', 'pydantic') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_its_names_are_those_of_their_modules() -> None:
    from transfusion.config import load_config
    from transfusion.generate.pipeline import Pipeline
    from transfusion.training.trainer import train

    found = (transfusion.Pipeline, transfusion.load_config, transfusion.train)
    assert found == (Pipeline, load_config, train)
    assert all(hasattr(transfusion, name) for name in transfusion.__all__)


def test_other_names_do_not_exist() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        transfusion.nothing  # noqa: B018
