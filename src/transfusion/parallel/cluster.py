"""What the processes of a run are to each other: clocks, versions, bandwidth, and the storage that they share.

Every function is called by all ranks together and gives every rank the same answer.
"""

from __future__ import annotations

import platform
import secrets
import socket
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from transfusion.files import atomic_write_text, remove_leftover
from transfusion.parallel.collectives import broadcast_from_main, gather, group_device
from transfusion.parallel.environment import Environment

PACKAGES = ("transfusion-mm", "torch", "deepspeed", "triton", "numpy", "safetensors", "sentencepiece")
# Bytes that each rank puts in.
SIZES = (1 << 20, 1 << 24, 1 << 27)
SIZES_ON_CPU = (1 << 16, 1 << 20, 1 << 23)
REPEATS = 5
# So long a file may take to be seen elsewhere: NFS asks for a folder's changes once a minute at most.
STORAGE_SECONDS = 10.0


class Bandwidth(NamedTuple):
    """One collective at one size; bus_gb_s: 10^9 bytes a second over the slowest link, whatever the ranks."""

    collective: str
    bytes: int
    milliseconds: float
    bus_gb_s: float


def hosts() -> list[str]:
    """Each rank's machine."""
    return gather(socket.gethostname())


def versions(here: Environment) -> list[dict[str, str]]:
    """What each rank runs on."""
    found = {"python": platform.python_version(), "machine": platform.machine(), **_packages()}
    if here.device.type == "cuda":
        gpu = torch.cuda.get_device_properties(here.device)
        found |= {"gpu": gpu.name, "gpu memory": f"{gpu.total_memory / 2**30:.0f} GiB"}
        found["cuda"] = str(torch.version.cuda)
    return gather(found)


def clock_offsets(here: Environment) -> list[float]:
    """Seconds by which each rank's clock is ahead of the first rank's, from the quickest of some round trips."""
    offsets = [0.0]
    for other in range(1, here.world_size):
        trips = [_trip(here, other) for _ in range(REPEATS)]
        # Of a round trip the middle is the moment at which the other looked at its clock.
        offsets.append(min(trips)[1])
    return broadcast_from_main(lambda: offsets)


def _trip(here: Environment, other: int) -> tuple[float, float]:
    """Seconds that a message and its answer took, and the offset that they show; zeros on ranks without a part."""
    message = torch.zeros(1, dtype=torch.int64, device=group_device())
    if here.rank == 0:
        begin = time.time_ns()
        dist.send(message, other)
        dist.recv(message, other)
        there, end = int(message.item()), time.time_ns()
        return (end - begin) / 1e9, (there - (begin + end) / 2) / 1e9
    if here.rank == other:
        dist.recv(message, 0)
        message.cpu()  # arrived
        message.fill_(time.time_ns())
        dist.send(message, 0)
    return 0.0, 0.0


def bandwidths(here: Environment, sizes: Sequence[int] = ()) -> list[Bandwidth]:
    """all_reduce and all_gather at several sizes: the median of some, as slow as the slowest rank saw it."""
    ranks = here.world_size
    found = []
    for size in sizes or (SIZES if here.device.type == "cuda" else SIZES_ON_CPU):
        part = torch.ones(size // 4, device=group_device())
        whole = torch.empty(ranks * part.numel(), device=group_device())
        for name, collective, tensors, moved in (
            ("all_reduce", dist.all_reduce, (part,), 2 * (ranks - 1) / ranks * size),
            ("all_gather", dist.all_gather_into_tensor, (whole, part), (ranks - 1) * size),
        ):
            seconds = _slowest([_timed(collective, *tensors) for _ in range(REPEATS + 1)])
            found.append(Bandwidth(name, size, 1e3 * seconds, moved / seconds / 1e9))
    return found


def _timed(collective: Any, *tensors: torch.Tensor) -> float:
    dist.barrier()
    begin = time.perf_counter()
    collective(*tensors)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def _slowest(mine: Sequence[float]) -> float:
    """The median over repeats of what the slowest rank took; the first repeat opens connections."""
    seconds = torch.tensor(mine[1:], dtype=torch.float64, device=group_device())
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return float(seconds.median())


def storage_problems(here: Environment, folder: Path) -> list[str]:
    """What stands in the way of checkpoints in `folder`, one line a rank that sees something else; [] if nothing.

    Each rank writes a file under another name and renames it, as checkpoints are written, and waits for the files
    of all others.
    """
    name = broadcast_from_main(lambda: f".doctor-{secrets.token_hex(4)}")
    place = folder / name
    problems = gather(_share(here, place))
    dist.barrier()
    if here.is_main:
        remove_leftover(place)
    return [f"rank {rank}: {text}" for rank, text in enumerate(problems) if text]


def _share(here: Environment, place: Path) -> str | None:
    text = f"{place.name} {{}}\n"
    mine = place / f"rank_{here.rank:05d}"
    trouble = None
    try:
        place.mkdir(parents=True, exist_ok=True)
        atomic_write_text(mine, text.format(here.rank))
    except OSError as error:
        trouble = f"cannot write in {place.parent}: {error.strerror}"
    dist.barrier()
    deadline = time.monotonic() + STORAGE_SECONDS
    unseen = set(range(here.world_size))
    while unseen and time.monotonic() < deadline:
        unseen = {rank for rank in unseen if not _reads(place / f"rank_{rank:05d}", text.format(rank))}
        if unseen:
            time.sleep(0.1)
    # Nobody takes its files away while another looks for them.
    dist.barrier()
    if trouble or not unseen:
        return trouble
    return f"does not see what rank {min(unseen)} wrote in {place.parent} within {STORAGE_SECONDS:.0f} s"


def _reads(path: Path, text: str) -> bool:
    try:
        return path.read_text(encoding="utf-8") == text
    except OSError:
        return False


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
