"""What is left and told when memory runs out: a snapshot of what was held, and the settings that need less."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import torch

from transfusion.config import Config
from transfusion.data.loading.loader import rows_per_rank
from transfusion.errors import UserError

# Allocations and releases that are remembered, newest last.
REMEMBERED = 100_000


def remember_allocations(device: torch.device) -> None:
    """From now on note which code allocates what on a GPU; costs a few per cent of a step's host time."""
    if device.type == "cuda":
        torch.cuda.memory._record_memory_history(max_entries=REMEMBERED, stacks="python")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a tensor found no room, on a GPU or on the host."""
    # The host's allocator has no class of its own for it.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator: " in str(error)
    )


def out_of_memory(
    error: BaseException, config: Config, folder: Path, *, rank: int, world_size: int, step: int
) -> UserError:
    """Write FOLDER/rank_00000.pickle and .txt, on a GPU, and say in one line what to change.

    The snapshot is for docs.pytorch.org/memory_viz; with log.memory_history it names the code.
    """
    kept = _write(folder, rank) if isinstance(error, torch.OutOfMemoryError) else ""
    wanted = " ".join(str(error).split()).partition(". ")[0][:160]
    return UserError(
        f"rank {rank} ran out of memory in step {step} ({wanted}); {'; or '.join(advice(config, world_size))}"
        + (f"; {kept}" if kept else "")
    )


def advice(config: Config, world_size: int) -> Iterator[str]:
    """The settings that need less memory than those at hand, the cheapest first."""
    data, train = config.data, config.train
    micro_batch_size = data.micro_batch_size or rows_per_rank(data.global_batch_size, world_size)
    if micro_batch_size > 1:
        yield f"set data.micro_batch_size={micro_batch_size // 2}, which changes no result"
    if train.activation_checkpointing != "block":
        yield "set train.activation_checkpointing=block"
    if train.precision == "fp32":
        yield "set train.precision=bf16"
    if world_size > 1 and train.zero.stage < 3:
        yield "set train.zero.stage=3"
    if train.zero.offload_optimizer == "none":
        yield "set train.zero.offload_optimizer=cpu, which is slow"
    yield "use more processes, which share the weights and the optimiser"


def _write(folder: Path, rank: int) -> str:
    path = folder / f"rank_{rank:05d}.pickle"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(torch.cuda.memory._snapshot()))
        path.with_suffix(".txt").write_text(torch.cuda.memory_summary(), encoding="utf-8")
    except (OSError, RuntimeError) as problem:
        return f"the memory snapshot could not be written: {problem}"
    return f"{path} and .txt show what used the memory"
