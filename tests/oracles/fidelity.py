"""Imports torch-fidelity without torchvision, whose wheels break transformers beside a torch for CPUs.

What is tested calls nothing of torchvision, so that empty modules do. No extra names torch-fidelity, since pip would
bring torchvision along. It goes into an environment of its own, which sees the packages of .venv:

    python -m venv /tmp/oracle && /tmp/oracle/bin/pip install --no-deps torch-fidelity==0.4.0
    echo $PWD/.venv/lib/python3.11/site-packages > /tmp/oracle/lib/python3.11/site-packages/main.pth
    PYTHONPATH=src:kernels /tmp/oracle/bin/python -m pytest tests/oracles/test_torch_fidelity.py
"""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any

import pytest

_NAMES = (
    "torchvision",
    "torchvision.datasets",
    "torchvision.transforms",
    "torchvision.transforms.functional",
)


def torch_fidelity() -> Any:
    """The package. Skips the module that asks where it is not installed."""
    reason = f"torch-fidelity is not installed: see {__name__}.py"
    if importlib.util.find_spec("torchvision") is not None:
        return pytest.importorskip("torch_fidelity", reason=reason)
    empty: dict[str, Any] = {name: types.ModuleType(name) for name in _NAMES}
    for name in _NAMES[1:]:
        parent, _, child = name.rpartition(".")
        setattr(empty[parent], child, empty[name])
    for name in ("CIFAR10", "CIFAR100", "STL10"):
        setattr(empty["torchvision.datasets"], name, type(name, (), {}))
    sys.modules.update(empty)
    try:
        return pytest.importorskip("torch_fidelity", reason=reason)
    finally:
        # Nobody else is to take them for the real ones.
        for name in _NAMES:
            del sys.modules[name]
