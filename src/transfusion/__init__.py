"""Transfusion: one transformer trained on text by next-token loss and on images by diffusion, together.

    from transfusion import Pipeline, load_config, train

Importing this package imports nothing heavy, so that the command line answers at once. Each of these names is imported
when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transfusion.config import load_config as load_config
    from transfusion.generate.pipeline import Pipeline as Pipeline
    from transfusion.training.trainer import train as train

__version__ = "0.1.0"
__all__ = ["Pipeline", "__version__", "load_config", "train"]

_HOMES = {
    "Pipeline": "transfusion.generate.pipeline",
    "load_config": "transfusion.config",
    "train": "transfusion.training.trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
