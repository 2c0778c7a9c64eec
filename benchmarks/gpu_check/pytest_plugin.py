"""For pytest on a GPU: the telling tests first, a JSON line for each test as it ends, and none that hangs for certain.

python -m pytest -p gpu_check.pytest_plugin --gpu-check-out FILE --gpu-check-width 32|others
    [--gpu-check-without hopper-128 ...] -m gpu tests/kernels
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

MAX_REASON = 400
HALVES = (torch.bfloat16, torch.float16)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what launch/gpu_check.sh gives."""
    group = parser.getgroup("gpu_check")
    group.addoption("--gpu-check-out", help="the file of the lines")
    group.addoption(
        "--gpu-check-width", default="others", choices=["32", "others"], help="the head widths to test"
    )
    group.addoption(
        "--gpu-check-without", action="append", default=[], help="kernels that hang, as hopper-128"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Choose and order the tests."""
    wants_32 = config.getoption("--gpu-check-width") == "32"
    without = set(config.getoption("--gpu-check-without"))
    chosen: list[pytest.Item] = []
    others: list[pytest.Item] = []
    for item in items:
        kept = is_of_32(item) == wants_32 and not (kernels_of(item) & without)
        (chosen if kept else others).append(item)
    items[:] = sorted(chosen, key=rank)
    config.hook.pytest_deselected(items=others)


def is_of_32(item: pytest.Item) -> bool:
    """Whether a test is of heads of 32, at which others' kernels are known to access illegally."""
    return parameters(item).get("width") == 32 or "head_dim_32" in item.name


def kernels_of(item: pytest.Item) -> set[str]:
    """Implementations and head widths that a test launches. One that does not name its width may launch any."""
    given = parameters(item)
    implementation = given.get("implementation") or ("hopper" if "hopper" in item.nodeid else "triton")
    if implementation == "triton" and "cache" in item.name:
        implementation = "decode"
    widths = [given["width"]] if "width" in given else [64, 128]
    return {f"{implementation}-{width}" for width in widths}


def rank(item: pytest.Item) -> int:
    """Hopper, then 16 bits by the usual widths, then the other widths, caches, and float32."""
    given = parameters(item)
    if "hopper" in item.nodeid:
        return 0
    if "cache" in item.name:
        return 3
    if given.get("dtype") in HALVES:
        return 1 if given.get("width", 64) in (64, 128) else 2
    return 4 if "float32" in item.name else 1


def parameters(item: pytest.Item) -> dict[str, Any]:
    """What a test is parametrised with."""
    callspec = getattr(item, "callspec", None)
    return dict(callspec.params) if callspec else {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Append a line, in the process that hears of all tests."""
    out = _options.get("out")
    if not out or not (report.when == "call" or report.failed or report.skipped):
        return
    line: dict[str, Any] = {
        "test": report.nodeid,
        "outcome": report.outcome,
        "seconds": round(report.duration, 2),
    }
    if report.failed:
        line["reason"] = reason_of(report)
    with open(out, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def reason_of(report: pytest.TestReport) -> str:
    """The error of a test, in a line."""
    crash = getattr(report.longrepr, "reprcrash", None)
    return " ".join(str(crash.message if crash else report.longrepr).split())[:MAX_REASON]


_options: dict[str, str] = {}


def pytest_configure(config: pytest.Config) -> None:
    """Remember where the lines go. A worker of xdist writes none."""
    if not hasattr(config, "workerinput") and config.getoption("--gpu-check-out"):
        _options["out"] = config.getoption("--gpu-check-out")
