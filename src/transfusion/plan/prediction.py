"""The whole plan of a run on a number of GPUs: parameters, operations, memory, communication, time, and warnings."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from transfusion.config import Config
from transfusion.families.build import compute_dtype
from transfusion.observe.flops import FlopModel, Work, Workload
from transfusion.plan.communication import Communication, communicate
from transfusion.plan.machines import GPUS, Gpu
from transfusion.plan.memory import Memory, load_of_rank, local_memory, zero_memory
from transfusion.plan.network import Network
from transfusion.plan.speed import Seconds, step_seconds
from transfusion.plan.tracing import Trace, trace_step
from transfusion.plan.workload import Division, DocumentMix
from transfusion.sequence.tokenizer import Tokenizer

# The paper's, taken where neither the configuration nor a tokenizer says it.
DEFAULT_VOCABULARY = 32_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is predicted of a run. load, work: of one rank's micro-batch. document_mix: the documents assumed.

    assumes_vocabulary: neither the configuration nor a tokenizer says how many pieces there are.
    """

    config: Config
    assumes_vocabulary: bool
    gpu: Gpu
    document_mix: DocumentMix
    division: Division
    network: Network
    load: Workload
    work: Work
    memory: Memory
    communication: Communication
    seconds: Seconds

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.gpu.usable

    @property
    def tokens_of_step(self) -> int:
        return self.config.data.global_batch_size * self.config.data.sequence_length

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_of_step / self.seconds.total

    @property
    def hours(self) -> float:
        """Wall time of the whole run, without evaluation, samples and checkpoints."""
        return self.config.train.steps * self.seconds.total / 3600

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.division.gpus

    def operations(self, convention: str) -> float:
        """Of a step on all GPUs, by a convention of `observe.flops`."""
        total: float = getattr(self.work, convention).total
        return total * self.division.micro_batches * self.division.gpus

    def share_of_peak(self, convention: str) -> float:
        """MFU: operations by a convention of `observe.flops` over those of the GPU's published peak."""
        operations = getattr(self.work, convention).total * self.division.micro_batches
        return float(operations / (self.seconds.total * self.gpu.peak))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        conventions = [field.name for field in fields(self.work)]
        return {
            "run": self.config.run.name,
            "gpu": self.gpu.name,
            "gpus": self.division.gpus,
            "assumed_documents": asdict(self.document_mix),
            "vocabulary": self.config.model.vocabulary,
            "vocabulary_is_assumed": self.assumes_vocabulary,
            "parameters": {**self.network.parts, "total": self.network.elements},
            "division": asdict(self.division),
            "micro_batch_of_a_rank": {**asdict(self.load), "operations": asdict(self.work)},
            "operations_of_a_step": {name: self.operations(name) for name in conventions},
            "memory_bytes": {**asdict(self.memory), "total": self.memory.total, "usable": self.gpu.usable},
            "fits": self.fits,
            "communication": asdict(self.communication),
            "seconds_of_a_step": {**asdict(self.seconds), "total": self.seconds.total},
            "share_of_peak": {name: self.share_of_peak(name) for name in conventions},
            "tokens_of_a_step": self.tokens_of_step,
            "tokens_per_second": self.tokens_per_second,
            "steps": self.config.train.steps,
            "hours": self.hours,
            "gpu_hours": self.gpu_hours,
        }


def make_plan(config: Config, gpus: int, gpu: str = "h200", document_mix: DocumentMix | None = None) -> Plan:
    """Predict a run. Reads its tokenizer, where that is there already.

    Raises UserError for rows of a step that so many GPUs cannot share, or a file that is no tokenizer.
    """
    has_tokenizer = bool(config.data.tokenizer) and Path(config.data.tokenizer).exists()
    if has_tokenizer:
        config = config.with_vocabulary(Tokenizer(config.data.tokenizer).vocabulary)
    assumes_vocabulary = not config.model.vocabulary
    if assumes_vocabulary:
        config = config.with_vocabulary(DEFAULT_VOCABULARY)
    document_mix, kind = document_mix or DocumentMix(), GPUS[gpu]
    division = Division.of(config, gpus)
    load = load_of_rank(document_mix.workload(config, division.micro_batch_size), division.sequence_ranks)
    local = config.train.engine == "local"
    network = Network.of(config)
    trace = _trace(_traced_part(config), load, division.micro_batches > 1, local)
    communication = Communication() if local else communicate(config, division, network, load.positions, kind)
    flops = FlopModel(config)
    work = flops.work(load)
    return Plan(
        config=config,
        assumes_vocabulary=assumes_vocabulary,
        gpu=kind,
        document_mix=document_mix,
        division=division,
        network=network,
        load=load,
        work=work,
        memory=local_memory(config, network, trace) if local else zero_memory(config, network, trace, gpus),
        communication=communication,
        seconds=step_seconds(config, division, work, trace, communication, network.elements, kind),
    )


def _traced_part(config: Config) -> str:
    """What a trace depends on, as one value: plans that differ elsewhere share it."""
    plain = Config()
    train = config.train.model_copy(update={"zero": plain.train.zero, "steps": plain.train.steps})
    data = plain.data.model_copy(update={"sequence_length": config.data.sequence_length})
    same = {"model": config.model, "codec": config.codec, "modalities": config.modalities}
    traced = plain.model_copy(update={**same, "train": train, "data": data})
    return traced.model_dump_json()


@functools.lru_cache(maxsize=64)
def _trace(traced_part: str, load: Workload, accumulates: bool, whole: bool) -> Trace:
    config = Config.model_validate_json(traced_part)
    return trace_step(config, load, dtype=compute_dtype(config), accumulates=accumulates, whole=whole)
