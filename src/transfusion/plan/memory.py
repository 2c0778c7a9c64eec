"""Bytes of tensors that one rank holds at its fullest moment, by kind.

Activations and logits are those of the real network (`tracing`); what the engines keep beside it is counted here.
N: parameters. Deduced from `parallel.local` and, for ZeRO, from DeepSpeed 0.19.8; checked by `benchmarks/plan.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from transfusion.config import Config
from transfusion.families.build import compute_dtype
from transfusion.observe.flops import Workload
from transfusion.plan.communication import FP32
from transfusion.plan.network import Network
from transfusion.plan.tracing import ACTIVATIONS, GRADIENTS, LOGITS, Trace

# exp_avg and exp_avg_sq.
MOMENTS = 2 * FP32


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes on the device, at the moment when they are most.

    parameters: what this rank keeps of the network between uses. gradients: what adds up over micro-batches.
    optimizer: fp32 weights, where they are a copy, both moments and the moving average. activations: what the backward
    pass needs, and what both passes make on the way. logits: of one chunk, and the text head's gradients. gathers:
    weights gathered for use, and buckets of gradients on their way. offloaded: not on the device, and not in `total`.
    """

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0
    gathers: int = 0
    offloaded: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self)) - self.offloaded


def local_memory(config: Config, network: Network, trace: Trace) -> Memory:
    """Of the local engine."""
    elements, trained, largest = network.elements, network.trained, network.largest
    averages = FP32 * trained if config.optimizer.average_decay else 0
    traced = {kind: trace.peak[kind] for kind in (GRADIENTS, ACTIVATIONS, LOGITS)}
    if config.train.precision == "fp32":
        kept = Memory(parameters=FP32 * elements, optimizer=MOMENTS * trained + averages)
        moments = [replace(kept, **traced)]
    else:
        # The optimiser's weights and gradients are fp32 copies; gradients are rounded up one by one.
        kept = Memory(parameters=2 * elements, optimizer=(FP32 + MOMENTS) * trained + averages)
        added = FP32 * trained if trace.accumulates else 0
        moments = [replace(kept, **traced | {"gradients": traced["gradients"] + added})]
        halves = 2 * trained if trace.accumulates else 0
        moments.append(replace(kept, gradients=FP32 * (trained + largest) + halves))
    # The optimiser's step: AdamW of the CPU makes two tensors of the parameter at hand.
    moments.append(replace(kept, gradients=FP32 * trained, activations=2 * FP32 * largest))
    return max(moments, key=lambda memory: memory.total)


def zero_memory(config: Config, network: Network, trace: Trace, ranks: int) -> Memory:
    """Of one rank of the ZeRO engine, parts being equal among `ranks`."""
    zero, elements = config.train.zero, network.elements
    width = compute_dtype(config).itemsize
    part, trained = -(-elements // ranks), -(-network.trained // ranks)
    states = FP32 + MOMENTS + (FP32 if config.optimizer.average_decay else 0)
    # On its way a bucket's gradients are copied, in the order in which the ranks get them. Where all gradients fit in
    # one bucket, it leaves when the backward pass has ended.
    sent = FP32 * min(zero.reduce_bucket_size, network.trained)
    one_bucket = network.trained <= zero.reduce_bucket_size
    if zero.stage == 3:
        small = elements - network.larger_than(zero.persistence_threshold)
        ahead = zero.max_live_parameters + zero.prefetch_bucket_size
        # One rank alone has nothing to gather.
        live = min(elements, max(ahead, network.max_gather)) - small if ranks > 1 else 0
        kept = Memory(parameters=width * (part + small), optimizer=states * trained, gradients=FP32 * trained)
        if zero.hpz_partition_size > 1:
            kept = replace(kept, parameters=kept.parameters + width * elements // zero.hpz_partition_size)
        gathers = width * max(0, live) + FP32 * zero.reduce_bucket_size
    else:
        whole = elements if zero.stage == 1 else part
        kept = Memory(parameters=width * elements, optimizer=states * part, gradients=FP32 * whole)
        buffers = 2 if zero.overlap_communication and ranks > 1 else 1
        gathers = buffers * (FP32 if zero.stage == 1 else width) * zero.reduce_bucket_size
    kept = _offload(config, kept, width * small if zero.stage == 3 else kept.parameters)
    sending = replace(kept, gathers=gathers + sent)
    working = replace(
        sending,
        gathers=gathers + (0 if one_bucket else sent),
        activations=trace.working[ACTIVATIONS],
        logits=trace.working[LOGITS],
    )
    # The optimiser's step copies the gradients into the flat tensors that AdamW reads.
    stepping = replace(kept, gradients=kept.gradients + (FP32 * trained if kept.optimizer else 0))
    return max(working, sending, stepping, key=lambda memory: memory.total)


def _offload(config: Config, kept: Memory, small: int) -> Memory:
    """Move to the host what the configuration says. small: bytes of weights that stay."""
    zero = config.train.zero
    if zero.offload_optimizer != "none":
        kept = replace(kept, optimizer=0, gradients=0, offloaded=kept.optimizer + kept.gradients)
    if zero.offload_parameters != "none":
        kept = replace(kept, parameters=small, offloaded=kept.offloaded + kept.parameters - small)
    return kept


def load_of_rank(load: Workload, sequence_ranks: int) -> Workload:
    """The part of a micro-batch that one of the ranks has which share its rows."""
    return replace(
        load,
        positions=load.positions // sequence_ranks,
        tokens=load.tokens // sequence_ranks,
        text_targets=-(-load.text_targets // sequence_ranks),
        pairs=load.pairs // sequence_ranks,
        images=tuple(
            each._replace(real=-(-each.real // sequence_ranks), carried=-(-each.carried // sequence_ranks))
            for each in load.images
        ),
    )
