"""The machine's own peaks: what is measured is what is reported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import limits

CPU = torch.device("cpu")


def test_peaks_are_the_best_of_what_was_measured() -> None:
    found = limits.measure_limits(CPU, seconds=0.05)
    assert found.gemm_tflops.keys() == {"bf16", "fp32"}
    for dtype, peak in found.gemm_tflops.items():
        speeds = [each["tflops"] for each in found.measurements if each.get("dtype") == dtype]
        assert len(speeds) == 2 and peak == max(speeds) > 0
    assert found.copy_gb_per_s == found.measurements[-1]["gb_per_s"] > 0
    assert found.share(found.gemm_tflops["fp32"] / 2, "fp32") == pytest.approx(0.5)
    assert json.loads(json.dumps(found.as_dict()))["clock"] == "process"


def test_speeds_count_what_must_be_done() -> None:
    timer = limits.Timer(CPU)
    product = limits.product(timer, "fp32", 64, 0.0)
    assert product["tflops"] == pytest.approx(2 * 64**3 / product["ms"] / 1e9)
    copied = limits.copy(timer, 1, 0.0)
    assert copied["gb_per_s"] == pytest.approx(2 * 2**20 / copied["ms"] / 1e6)


def test_a_time_is_the_median_of_several_calls_after_two_that_warm_up() -> None:
    calls: list[None] = []
    assert limits.Timer(CPU).median_ms(lambda: calls.append(None), 0.0) >= 0
    assert len(calls) == 2 + limits.MIN_CALLS


def test_results_are_written_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "result.json"
    limits.write_json({"environment": limits.record_head(CPU)}, out)
    assert json.loads(out.read_text())["environment"]["packages"]["torch"]
    assert list(out.parent.iterdir()) == [out]
