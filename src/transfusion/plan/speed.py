"""Seconds of a step: products, attention, memory traffic and communication, each at its rate, one over the other.

`docs/reference/planning.md` explains the model. Collectives of weights and gradients run beside the arithmetic. What
takes longer counts, and the first gather and the last reduction, which nothing hides. The host launches beside the
device too.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from transfusion.config import Config
from transfusion.families.build import compute_dtype
from transfusion.observe.flops import Work
from transfusion.plan.communication import FP32, Communication
from transfusion.plan.machines import Gpu
from transfusion.plan.tracing import Trace
from transfusion.plan.workload import Division

# Of the operators one by one, and of their traffic, what is left when each block's are fused (assumed).
COMPILED_SHARE = 0.4
# Bytes of a parameter that AdamW reads and writes: weight, gradient, moments, the rounded copy.
OPTIMIZER_TRAFFIC = 30
# Seconds of the host for an operator that it launches, and for a collective with DeepSpeed's hooks around it (assumed).
LAUNCH, COLLECTIVE = 6e-6, 100e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Seconds:
    """Of a step on one rank. exposed: communication that is waited for. host: waiting for the host to launch.

    optimizer: AdamW, and what is offloaded on its way to the host and back.
    """

    products: float
    attention: float
    traffic: float
    optimizer: float
    exposed: float
    host: float

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def step_seconds(
    config: Config,
    division: Division,
    work: Work,
    trace: Trace,
    communication: Communication,
    elements: int,
    gpu: Gpu,
) -> Seconds:
    """work, trace: of one rank and micro-batch. elements: parameters."""
    model, batches = config.model, division.micro_batches
    left = COMPILED_SHARE if config.train.compile else 1.0
    if config.train.precision == "fp32":
        products, attention = work.hardware.products / gpu.fp32, work.hardware.attention / gpu.fp32
    else:
        products = work.hardware.products / gpu.product_rate(model.hidden_size)
        attention = work.hardware.attention / gpu.attention_rate(model.head_width)
    traffic = left * trace.traffic / gpu.copy
    compute = products + attention + traffic
    host = left * trace.operators * LAUNCH + communication.calls * COLLECTIVE
    return Seconds(
        products=batches * products,
        attention=batches * attention,
        traffic=batches * traffic,
        optimizer=_optimizer(config, elements / division.gpus, gpu),
        exposed=batches * _exposed(config, communication, compute) + communication.seconds_of_step,
        host=batches * max(0.0, host - compute),
    )


def _exposed(config: Config, communication: Communication, compute: float) -> float:
    """Of a micro-batch."""
    beside = communication.seconds_of_micro_batch
    if beside and config.train.zero.overlap_communication:
        # The first unit's gather has nothing to hide behind, nor has the last reduction.
        first = beside / (3 * config.model.layers)
        return max(0.0, beside - compute) + 2 * first + communication.seconds_between_layers
    return beside + communication.seconds_between_layers


def _optimizer(config: Config, share: float, gpu: Gpu) -> float:
    """share: parameters of this rank."""
    if config.train.zero.offload_optimizer == "none":
        return OPTIMIZER_TRAFFIC * share / gpu.copy
    return (
        OPTIMIZER_TRAFFIC * share / gpu.host_copy + (FP32 + compute_dtype(config).itemsize) * share / gpu.host
    )
