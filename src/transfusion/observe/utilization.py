"""What share of a machine's arithmetic a run uses, by each convention of `flops`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from transfusion.config import Config
from transfusion.observe.flops import FlopModel, Work
from transfusion.schema import Batch

# Published dense bf16 peaks in TFLOP/s, by a part of the device's name; the first that fits.
PUBLISHED_PEAKS = {"H200": 989.4, "H100 PCIe": 756.0, "H100": 989.4, "A100": 312.0, "B200": 2250.0}
# Side of the square products that tell what a machine reaches, and how many are timed.
GEMM_SIDE = {"cuda": 8192, "cpu": 512}
GEMM_CALLS = 4
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Utilization:
    """Of a device's published bf16 peak, None where nobody publishes one: mfu by the exact mask and the real tokens,
    hfu with padding and recomputation, mfu_palm as PaLM counts. gemm_share: the first, of the products measured here.
    """

    mfu: float | None = None
    hfu: float | None = None
    mfu_palm: float | None = None
    gemm_share: float | None = None


class OperationMeter:
    """Adds up the operations of steps, and tells them as shares."""

    def __init__(self, config: Config, device: torch.device) -> None:
        """Times a few products on `device`. `config.model.vocabulary` must be set."""
        self._flops = FlopModel(config)
        # Ranks that share rows read them whole, and compute a part each.
        self._ranks_of_a_row = config.train.sequence_parallel
        self._published = published_tflops(device)
        self._measured = measured_tflops(device, DTYPES[config.train.precision])
        self._work = Work()

    def note(self, batches: Sequence[Batch]) -> None:
        """Count the micro-batches of a step of this rank, while they are on the host."""
        self._work += self._flops.of(batches)

    def take(self) -> list[float]:
        """This rank's operations since the last call, exact, hardware and palm: to be added up over the ranks."""
        work, self._work = self._work, Work()
        return [part.total / self._ranks_of_a_row for part in (work.exact, work.hardware, work.palm)]

    def utilization(self, operations: Sequence[float], seconds: float, ranks: int) -> Utilization:
        """Of what all ranks have taken, in `seconds`; the devices are taken to be alike."""
        exact, hardware, palm = (each / max(seconds, 1e-9) / ranks / 1e12 for each in operations)
        peak = self._published
        return Utilization(
            mfu=exact / peak if peak else None,
            hfu=hardware / peak if peak else None,
            mfu_palm=palm / peak if peak else None,
            gemm_share=exact / self._measured,
        )


def published_tflops(device: torch.device) -> float | None:
    """The maker's dense bf16 figure, None where it is not known here."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PUBLISHED_PEAKS.items() if part in name), None)


def measured_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of the best of a few large square products on random data: what this process can reach here."""
    side = GEMM_SIDE.get(device.type, GEMM_SIDE["cpu"])
    # Its own generator: measuring changes no other random number.
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, device=device, generator=generator).to(dtype) for _ in range(2))
    times = []
    for _ in range(GEMM_CALLS):
        begin = _now(device)
        a @ b
        times.append(_now(device) - begin)
    return 2 * side**3 / min(times) / 1e12


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
