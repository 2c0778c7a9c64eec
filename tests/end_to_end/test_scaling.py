"""A grid run, gone on with, fitted and drawn, by the commands of docs/guides/experiments.md."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from .conftest import ROOT, TINY

OUT = "runs/grid"
BUDGET = 1.0e9
SMALL = {key: int(value) for key, value in (override.split("=") for override in TINY)} | {
    "model.layers": 1,
    "train.engine": "local",
    "sample_grid.prompts": [],
}


def write_grid(path: Path, size: dict[str, dict[str, Any]], **more: Any) -> None:
    base = str(ROOT / "configs" / "train" / "quickstart.yaml")
    grid = {"base": base, "axes": {"model": {"plain": SMALL}, "size": size}, **more}
    path.write_text(yaml.safe_dump(grid, sort_keys=False))


@pytest.mark.slow
def test_a_grid_goes_on_where_it_stopped_and_is_fitted_and_drawn(workplace: Any) -> None:
    sizes = {"s": {"model.hidden_size": 32, "train.steps": 1}, "m": {"flops": BUDGET}}
    write_grid(workplace.folder / "grid.yaml", sizes, suites=["validation", "captions"])
    command = ["scaling", "run", "grid.yaml", "--out", OUT]
    assert workplace.run(*command, "--list").split() == ["plain/s", "plain/m"]
    workplace.run(*command, "--only", "plain/m")
    folder = workplace.folder / OUT / "plain.m.seed-0"
    record = json.loads((folder / "cell.json").read_text())
    # As many steps as come nearest to the budget, and as many were made.
    assert abs(record["flops"] - BUDGET) <= record["flops"] / record["steps"] / 2
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == record["steps"] > 1
    assert 0 <= record["metrics"]["caption_token_f1"] <= 1
    assert record["metrics"]["text_loss_nats_per_byte"] > 0
    better = record["higher_is_better"]
    assert better["caption_token_f1"] and not better["digits_image_loss"]

    before = (folder / "cell.json").stat().st_mtime_ns
    printed = workplace.run(*command)
    assert (folder / "cell.json").stat().st_mtime_ns == before
    assert "| plain/s | 1 |" in printed and "| plain/m | 1 |" in printed
    assert len((workplace.folder / OUT / "cells.jsonl").read_text().splitlines()) == 2
    assert "holds another configuration" in workplace.run(*command, "model.layers=2", code=2)
    assert "| exponent of plain |" in workplace.run("scaling", "fit", OUT)
    workplace.run("scaling", "plot", OUT, "--out", "figure.svg", "--metric", "text_loss_nats_per_byte")
    assert (workplace.folder / "figure.svg").stat().st_size > 10_000


def test_a_run_that_fails_is_named(workplace: Any) -> None:
    write_grid(workplace.folder / "bad.yaml", {"s": {"train.steps": 1}})
    printed = workplace.run("scaling", "run", "bad.yaml", "--out", "runs/bad", "--launcher", "false", code=1)
    assert "plain.s.seed-0: exit code 1, see runs/bad/plain.s.seed-0/grid.log" in printed
    assert "1 of 1 runs failed" in printed


def test_cells_that_cannot_run_here_hide_no_other(workplace: Any) -> None:
    write_grid(workplace.folder / "some.yaml", {"s": {"train.steps": 1}, "bad": {"model.patch_size": 3}})
    printed = workplace.run("scaling", "run", "some.yaml", "--out", "runs/some", "--list", code=2)
    assert "plain/s" in printed.splitlines() and "cannot run here: cell plain/bad: " in printed


@pytest.mark.slow
def test_a_grid_that_is_told_to_end_ends_its_runs(workplace: Any) -> None:
    write_grid(workplace.folder / "long.yaml", {"s": {"train.steps": 1}})
    begun = workplace.folder / "begun"
    sleeper = f'{sys.executable} -c \'import time; open("{begun}", "w"); time.sleep(100)\''
    process = workplace.start("scaling", "run", "long.yaml", "--out", "runs/long", "--launcher", sleeper)
    log = workplace.folder / "runs" / "long" / "plain.s.seed-0" / "grid.log"
    while process.poll() is None and not begun.exists():
        time.sleep(0.1)
    process.terminate()
    process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert not (log.parent / "cell.json").exists()
