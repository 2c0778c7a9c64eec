"""GPUs and the network between them: the inputs of every prediction, each published, cited or assumed.

`docs/reference/planning.md` names the source of each figure. None was measured here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

GIGA, TERA = 1e9, 1e12
MIB, GIB = 2**20, 2**30
# What the driver, the CUDA context, NCCL's buffers and the allocator's fragments take (assumed).
RESERVED_BYTES = 4 * GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One kind of GPU, in machines of eight.

    memory: bytes. peak: published dense bf16 FLOP/s. products: FLOP/s that the largest products reach. half_width:
    model width at which products reach half of that. attention: FLOP/s of interval attention, by head width. fp32:
    FLOP/s of products in fp32. copy: bytes/s read and written. host: bytes/s to the host's memory. host_copy: bytes/s
    that AdamW reads and writes there, for one of the machine's GPUs. nvlink: bytes/s that a rank receives within a
    machine. network: bytes/s that a rank receives from other machines, through its own adapter.
    """

    name: str
    memory: float
    peak: float
    products: float
    half_width: float
    attention: dict[int, float]
    fp32: float
    copy: float
    host: float
    host_copy: float
    nvlink: float
    network: float
    gpus_per_machine: int = 8
    # Seconds a step of a ring takes within a machine, and between two.
    latency_within: float = 3.4e-6
    latency_between: float = 14e-6

    @property
    def usable(self) -> float:
        """Bytes left for tensors."""
        return self.memory - RESERVED_BYTES

    def product_rate(self, width: int) -> float:
        """FLOP/s of the products of a model of `width`: narrow ones fill the GPU badly."""
        return self.products * width / (width + self.half_width)

    def attention_rate(self, head_dim: int) -> float:
        """FLOP/s of attention, by the nearest head width that is known."""
        return self.attention[min(self.attention, key=lambda known: abs(known - head_dim))]

    def ring_seconds(self, bytes_moved: float, ranks: int, calls: int) -> float:
        """Seconds of all-gathers (or reduce-scatters) of `bytes_moved` in all, whole tensors, in `calls` calls.

        A ring passes everything but its own part through each rank once within a machine, and through each machine's
        adapters together; every call pays the way round.
        """
        if ranks == 1:
            return 0.0
        machines = -(-ranks // self.gpus_per_machine)
        within = bytes_moved * (ranks - 1) / ranks / self.nvlink
        entering = bytes_moved * (machines - 1) / machines
        between = entering / (min(ranks, self.gpus_per_machine) * self.network)
        steps_between = machines - 1 if machines > 1 else 0
        around = (ranks - 1 - steps_between) * self.latency_within + steps_between * self.latency_between
        return max(within, between) + calls * around


_H200 = Gpu(
    name="H200",
    memory=141e9,
    peak=989.4 * TERA,
    products=794.5 * TERA,
    half_width=380,
    attention={64: 380 * TERA, 128: 480 * TERA},
    fp32=50 * TERA,
    copy=4.2 * TERA,
    host=50 * GIGA,
    host_copy=25 * GIGA,
    nvlink=360 * GIGA,
    network=42 * GIGA,
)
GPUS = {
    "h200": _H200,
    "h100": replace(_H200, name="H100", memory=80e9, copy=2.9 * TERA),
    "a100": Gpu(
        name="A100",
        memory=80e9,
        peak=312 * TERA,
        products=268 * TERA,
        half_width=130,
        attention={64: 150 * TERA, 128: 180 * TERA},
        fp32=18 * TERA,
        copy=1.75 * TERA,
        host=24 * GIGA,
        host_copy=20 * GIGA,
        nvlink=235 * GIGA,
        network=21 * GIGA,
    ),
}
