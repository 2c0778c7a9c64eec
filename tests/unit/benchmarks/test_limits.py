"""The machine's own peaks: what is measured is what is reported."""

from __future__ import annotations

import contextlib
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


class FakeCuda:
    """Writes down in which order a timer asks for what. `slow` calls find that the device woke too soon."""

    def __init__(self, slow: int = 0) -> None:
        self.log: list[str] = []
        self.slept: list[int] = []
        self.slow = slow
        self.device = contextlib.nullcontext
        self.synchronize = lambda device: self.log.append("wait")

    def _sleep(self, cycles: int) -> None:
        self.log.append("sleep")
        self.slept.append(cycles)

    def Event(self, enable_timing: bool) -> FakeEvent:
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def record(self) -> None:
        self.cuda.log.append("event")

    def query(self) -> bool:
        self.cuda.slow -= 1
        return self.cuda.slow >= 0

    def elapsed_time(self, end: FakeEvent) -> float:
        return 1.5


def gpu_timer(monkeypatch: pytest.MonkeyPatch, slow: int = 0) -> tuple[limits.Timer, FakeCuda]:
    cuda = FakeCuda(slow)
    timer = limits.Timer(torch.device("cuda"))
    monkeypatch.setattr(timer, "_flush", lambda: cuda.log.append("flush"))
    for name in ("device", "synchronize", "_sleep", "Event"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    return timer, cuda


def test_the_hosts_part_is_hidden_behind_a_sleep_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    timer, cuda = gpu_timer(monkeypatch)
    assert timer.median_ms(lambda: cuda.log.append("call"), 0.0) == 1.5
    warm_up, timed = ["flush", "sleep", "call", "wait"], ["flush", "sleep", "event", "call", "event"]
    assert cuda.log == [*warm_up * 2, *timed * limits.MIN_CALLS, "wait"]
    assert set(cuda.slept) == {limits.SLEEP_CYCLES}


def test_a_device_that_woke_too_soon_sleeps_longer_and_the_call_is_timed_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timer, cuda = gpu_timer(monkeypatch, slow=2)
    timer.median_ms(lambda: cuda.log.append("call"), 0.0)
    once = limits.SLEEP_CYCLES
    assert cuda.slept == [once, once, once, 2 * once, *[4 * once] * limits.MIN_CALLS]
    assert cuda.log.count("call") == 2 + 2 + limits.MIN_CALLS
    # A call that waits for the device itself finds it awake each time.
    timer, cuda = gpu_timer(monkeypatch, slow=1000)
    timer.median_ms(lambda: cuda.log.append("call"), 0.0)
    assert max(cuda.slept) == limits.MAX_SLEEP_CYCLES and cuda.log.count("call") < 10


def test_the_hosts_part_counts_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    timer, cuda = gpu_timer(monkeypatch)
    timer.median_ms(lambda: cuda.log.append("call"), 0.0, host_counts=True)
    timed = ["wait", "event", "call", "event"]
    assert cuda.log == [*["wait", "call", "wait"] * 2, *timed * limits.MIN_CALLS, "wait"]


def test_results_are_written_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "result.json"
    limits.write_json({"environment": limits.record_head(CPU)}, out)
    assert json.loads(out.read_text())["environment"]["packages"]["torch"]
    assert list(out.parent.iterdir()) == [out]
