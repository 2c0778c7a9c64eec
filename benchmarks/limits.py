"""What this machine can do at best, measured: matrix products and copies. And what every benchmark here shares.

    .venv/bin/python benchmarks/limits.py [--device auto] [--seconds 10] [--out FILE]

Prints JSON. A time is the median of many calls on random data (zeros run faster than any real data); a peak is the
best size's median. Speeds count the arithmetic and the bytes that must be, not those that were spent.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from transfusion.files import atomic_write_text
from transfusion.observe.environment import describe_environment

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CUDA_MATRICES, CPU_MATRICES = (4096, 8192, 16384), (256, 512, 1024)
CUDA_COPIES_MIB, CPU_COPIES_MIB = (256, 1024, 4096), (16, 64)
MIN_CALLS, MAX_CALLS = 3, 200
# Written before each timed call on a GPU. Larger than any cache.
FLUSHED_BYTES = 1 << 30
# Then the device sleeps so many of its cycles, about a millisecond. Meanwhile the host launches what is timed, so that
# the device never waits for the host between the two events. It sleeps longer where that was too short.
SLEEP_CYCLES, MAX_SLEEP_CYCLES = 2_000_000, 16_000_000
KEPT = ("time", "python", "platform", "cpu", "cpu_count", "gpus", "packages", "git", "transfusion")


class Timer:
    """Median milliseconds of a call.

    On a GPU those of the device, between two events, with cold caches. The host's part is hidden behind a sleep of the
    device. On a CPU those of the processor, all threads added up, so that other programs on the machine do not count.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.clock = "events" if device.type == "cuda" else "process"
        self._flushed: torch.Tensor | None = None

    def median_ms(self, call: Callable[[], object], seconds: float, *, host_counts: bool = False) -> float:
        """The median over about `seconds`, after two calls that warm up.

        host_counts: On a GPU, begin each call with nothing left to do, so that the time to launch it counts too.
        """
        on_gpu = self.device.type == "cuda"
        with torch.cuda.device(self.device) if on_gpu else contextlib.nullcontext():
            for _ in range(2):
                begin = time.perf_counter()
                self._before(host_counts)
                call()
                self.wait()
                once = max(time.perf_counter() - begin, 1e-6)
            calls = min(max(int(seconds / once), MIN_CALLS), MAX_CALLS)
            times = self._on_cuda(call, calls, host_counts) if on_gpu else _on_cpu(call, calls)
        return statistics.median(times)

    def wait(self) -> None:
        """Until the device has done all it was given. Raises what went wrong there."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _on_cuda(self, call: Callable[[], object], calls: int, host_counts: bool) -> list[float]:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        cycles = SLEEP_CYCLES
        for begin, end in pairs:
            while True:
                self._before(host_counts, cycles)
                begin.record()
                call()
                end.record()
                # A device that has passed the first event by now did not find all of the call launched.
                if host_counts or not begin.query() or cycles >= MAX_SLEEP_CYCLES:
                    break
                cycles *= 2
        self.wait()
        return [begin.elapsed_time(end) for begin, end in pairs]

    def _before(self, host_counts: bool, cycles: int = SLEEP_CYCLES) -> None:
        """What comes before a call on a GPU."""
        if self.device.type != "cuda":
            return
        if host_counts:
            self.wait()
            return
        self._flush()
        torch.cuda._sleep(cycles)

    def _flush(self) -> None:
        if self._flushed is None:
            free, _ = torch.cuda.mem_get_info(self.device)
            size = min(FLUSHED_BYTES, free // 8)
            self._flushed = torch.empty(size, dtype=torch.uint8, device=self.device)
        self._flushed.zero_()


def _on_cpu(call: Callable[[], object], calls: int) -> list[float]:
    times = []
    for _ in range(calls):
        begin = time.process_time()
        call()
        times.append((time.process_time() - begin) * 1e3)
    return times


@dataclass(frozen=True)
class Limits:
    """The peaks of a machine, and every measurement behind them.

    gemm_tflops: of square matrix products, by dtype (a name of `DTYPES`). copy_gb_per_s: bytes read and written.
    """

    device: str
    clock: str
    gemm_tflops: dict[str, float]
    copy_gb_per_s: float
    measurements: tuple[dict[str, Any], ...]

    def share(self, tflops: float, dtype: str) -> float:
        """A speed as a share of the peak of matrix products of that dtype."""
        return tflops / self.gemm_tflops[dtype]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "device": self.device,
            "clock": self.clock,
            "gemm_tflops": self.gemm_tflops,
            "copy_gb_per_s": self.copy_gb_per_s,
            "measurements": list(self.measurements),
        }


def measure_limits(
    device: torch.device, *, seconds: float = 10.0, dtypes: Sequence[str] = ("bf16", "fp32")
) -> Limits:
    """The peaks of `device`, in about `seconds`. fp32 is IEEE arithmetic, as everywhere in this project."""
    timer, on_gpu = Timer(device), device.type == "cuda"
    matrices = CUDA_MATRICES if on_gpu else CPU_MATRICES
    copies = CUDA_COPIES_MIB if on_gpu else CPU_COPIES_MIB
    each = seconds / (len(dtypes) * len(matrices) + len(copies))
    products = {dtype: [product(timer, dtype, size, each) for size in matrices] for dtype in dtypes}
    copied = [copy(timer, mib, each) for mib in copies]
    return Limits(
        device=torch.cuda.get_device_name(device) if on_gpu else "cpu",
        clock=timer.clock,
        gemm_tflops={dtype: max(each["tflops"] for each in found) for dtype, found in products.items()},
        copy_gb_per_s=max(each["gb_per_s"] for each in copied),
        measurements=(*(each for found in products.values() for each in found), *copied),
    )


def product(timer: Timer, dtype: str, size: int, seconds: float) -> dict[str, Any]:
    """The speed of one product of two square matrices."""
    a, b = (torch.randn(size, size, device=timer.device, dtype=DTYPES[dtype]) for _ in range(2))
    milliseconds = timer.median_ms(lambda: a @ b, seconds)
    return {
        "what": "gemm",
        "dtype": dtype,
        "size": size,
        "ms": milliseconds,
        "tflops": tflops(2 * size**3, milliseconds),
    }


def copy(timer: Timer, mib: int, seconds: float) -> dict[str, Any]:
    """The speed of one copy within the device's memory, counting bytes read and bytes written."""
    source = torch.randn((mib << 20) // 4, device=timer.device)
    target = torch.empty_like(source)
    milliseconds = timer.median_ms(lambda: target.copy_(source), seconds)
    return {
        "what": "copy",
        "mib": mib,
        "ms": milliseconds,
        "gb_per_s": 2 * (mib << 20) / milliseconds / 1e6,
    }


def tflops(operations: float, milliseconds: float) -> float:
    """10^12 operations a second."""
    return operations / milliseconds / 1e9


def find_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def record_head(device: torch.device) -> dict[str, Any]:
    """What every result begins with: the command, the machine and the versions."""
    described = describe_environment()
    head = {"command": " ".join(["python", *sys.argv]), **{name: described[name] for name in KEPT}}
    head["threads"] = torch.get_num_threads()
    if device.type == "cuda":
        head["cuda"] = {
            "device": torch.cuda.get_device_name(device),
            "capability": list(torch.cuda.get_device_capability(device)),
            "runtime": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return head


def write_json(record: dict[str, Any], out: Path) -> None:
    """Write a result whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(out, json.dumps(record, indent=2) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--seconds", type=float, default=10.0, help="about how long to measure")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    parser.add_argument(
        "--threads", type=int, default=1, help="of the CPU; waiting ones would count as working"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = find_device(options.device)
    limits = measure_limits(device, seconds=options.seconds)
    record = {"environment": record_head(device), "limits": limits.as_dict()}
    if options.out:
        write_json(record, options.out)
    print(json.dumps(record, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
