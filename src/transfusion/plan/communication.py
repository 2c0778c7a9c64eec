"""What the ranks send each other, in bytes and seconds.

Under ZeRO-3 a micro-batch gathers the weights for the forward pass, again for the backward pass where they were not
kept, and scatters the sum of its gradients. Ranks that share rows exchange heads for positions around the attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transfusion.config import Config
from transfusion.families.build import compute_dtype
from transfusion.plan.machines import Gpu
from transfusion.plan.network import Network
from transfusion.plan.workload import Division

FP32 = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Communication:
    """What one rank receives, in bytes, and how long it takes. A micro-batch's, unless it says step.

    gathered: weights, forward and backward. reduced: gradients. exchanged: heads for positions. calls: collectives.
    after_step: what is gathered once the optimiser is done (stages 1 and 2), in bytes.
    seconds_of_micro_batch: beside the arithmetic. seconds_between_layers: not beside it.
    """

    gathered: int = 0
    reduced: int = 0
    exchanged: int = 0
    after_step: int = 0
    calls: int = 0
    seconds_of_micro_batch: float = 0.0
    seconds_between_layers: float = 0.0
    seconds_of_step: float = 0.0


def communicate(
    config: Config, division: Division, network: Network, positions: int, gpu: Gpu
) -> Communication:
    """What the ZeRO stage and the sharing of rows send; sizes are of whole tensors, of which a rank lacks most.

    positions: of a micro-batch on one rank.
    """
    if division.gpus == 1:
        return Communication()
    zero, ranks = config.train.zero, division.gpus
    reductions = count_reductions(network.sizes, zero.reduce_bucket_size)
    reduce_seconds = gpu.ring_seconds(FP32 * network.trained, ranks, reductions)
    exchanged, between = _exchange(config, division, positions, gpu)
    # Stage 1 adds gradients up on each rank and sends them once a step.
    each, once = (0.0, reduce_seconds) if zero.stage == 1 else (reduce_seconds, 0.0)
    sent = Communication(
        reduced=FP32 * network.trained,
        exchanged=exchanged,
        calls=reductions,
        seconds_of_micro_batch=each,
        seconds_between_layers=between,
    )
    if zero.stage == 3:
        gathered, gathers, seconds = _gather(config, network, ranks, gpu)
        return replace(
            sent, gathered=gathered, calls=gathers + reductions, seconds_of_micro_batch=seconds + each
        )
    after = compute_dtype(config).itemsize * network.elements
    return replace(sent, after_step=after, seconds_of_step=once + gpu.ring_seconds(after, ranks, reductions))


def _gather(config: Config, network: Network, ranks: int, gpu: Gpu) -> tuple[int, int, float]:
    """Bytes, calls and seconds of the gathers of a micro-batch under stage 3."""
    zero = config.train.zero
    large = network.larger_than(zero.persistence_threshold)
    calls = config.model.layers + sum(each >= zero.persistence_threshold for each in network.outside)
    embedding = network.parts["embedding"]
    if config.model.tie_embeddings and embedding >= zero.persistence_threshold:
        # Once more for the text head.
        large, calls = large + embedding, calls + 1
    size = compute_dtype(config).itemsize * large
    seconds = gpu.ring_seconds(size, ranks, calls)
    # Whether the weights stay gathered from the forward to the backward pass.
    passes = 1 if large <= min(zero.max_live_parameters, zero.max_reuse_distance) else 2
    if passes == 2:
        # With hpZ the second gather stays among the ranks that hold a copy between them.
        again = zero.hpz_partition_size if zero.hpz_partition_size > 1 else ranks
        seconds += gpu.ring_seconds(size, again, calls)
    if zero.offload_parameters != "none":
        seconds += passes * size / ranks / gpu.host
    return passes * size, passes * calls, seconds


def _exchange(config: Config, division: Division, positions: int, gpu: Gpu) -> tuple[int, float]:
    """Bytes and seconds of a micro-batch's exchanges of heads for positions: queries, keys, values, and back."""
    model, ranks = config.model, division.sequence_ranks
    values = 2 * (model.heads + model.kv_heads) * model.head_width
    again = 0 if config.train.activation_checkpointing == "none" else 1
    exchanges = model.layers * (2 + again)
    sent = exchanges * positions * values * compute_dtype(config).itemsize * (ranks - 1) // ranks
    rate = gpu.nvlink if ranks <= gpu.gpus_per_machine else gpu.network
    return sent, sent / rate


def count_reductions(sizes: Sequence[int], bucket: int) -> int:
    """Collectives that reduce all gradients, as DeepSpeed fills its bucket: what does not fit empties it first."""
    calls, filled = 0, 0
    for size in reversed(sizes):
        if filled and filled + size > bucket:
            calls, filled = calls + 1, 0
        filled += size
    return calls + (filled > 0)
