"""Tests of kernels share modules of this folder, and none is blamed for a GPU that an earlier one has lost."""

import os
import sys
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))

_failed: set[str] = set()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Remember the tests that fail."""
    report = yield
    if report.failed:
        _failed.add(item.nodeid)
    return report


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid: str) -> None:
    """End this process once a test has failed and the GPU with it, for an illegal access fails all that follows.

    xdist starts another worker for the other tests. The test itself has been reported by now.
    """
    if nodeid not in _failed or not _gpu_is_lost():
        return
    if "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(1)
    pytest.exit(f"the GPU was lost by {nodeid}", returncode=1)


def _gpu_is_lost() -> bool:
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
