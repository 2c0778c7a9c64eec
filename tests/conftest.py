"""What all tests stand on: nothing of a launcher or a user in the environment, no network, builds of their own."""

from __future__ import annotations

import os
import tempfile

import pytest

LEFT_OUT = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TRANSFUSION_ATTENTION",
    "WANDB_API_KEY",
)


def pytest_configure(config: pytest.Config) -> None:
    """Set the variables before anything that reads them is imported; the processes tests start inherit them."""
    for name in LEFT_OUT:
        os.environ.pop(name, None)
    os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", WANDB_SILENT="true")
    # A DeepSpeed build that was killed leaves a lock in the shared folder, which later ones wait for in silence.
    builds = tempfile.TemporaryDirectory(prefix="torch_extensions_")
    os.environ["TORCH_EXTENSIONS_DIR"] = builds.name
    config.add_cleanup(builds.cleanup)
