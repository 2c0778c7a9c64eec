"""`transfusion doctor --cluster`: one table that compares the processes of a run, with remedies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from transfusion.cli.doctor import Finding, print_table
from transfusion.errors import UserError
from transfusion.parallel import cluster, environment
from transfusion.parallel.cluster import Bandwidth
from transfusion.parallel.environment import Environment

# Names and times of files come from the machines' clocks; make, tar and object stores compare them.
MAX_SKEW = 1.0
# Below it gathers of ZeRO-3 take longer than the computation they feed (docs/reference/distributed.md).
MIN_GPU_GB_S = 5.0
EXIT_UNFIT = 2


def main(folder: Path) -> int:
    """Look, on all ranks together; the first prints. Returns 0, or 2 where a run should not be started."""
    here = environment.start(1)
    try:
        if here.world_size == 1:
            raise UserError(
                "doctor --cluster compares processes, and only one was started; start it like a run:"
                " torchrun --nproc-per-node 2 -m transfusion doctor --cluster, or srun"
            )
        findings = look(here, folder)
    finally:
        environment.stop()
    unfit = any(finding.state == "missing" for finding in findings)
    if here.is_main:
        print_table(findings)
        print(
            "\nThese processes cannot train together yet: see what is MISSING."
            if unfit
            else "\nThese processes can train together."
        )
    return EXIT_UNFIT if unfit else 0


def look(here: Environment, folder: Path) -> list[Finding]:
    """All findings, the same on every rank."""
    hosts = cluster.hosts()
    return [
        *_processes(hosts),
        *_versions(cluster.versions(here), hosts),
        *_clocks(cluster.clock_offsets(here), hosts),
        *_storage(cluster.storage_problems(here, folder), folder),
        *_bandwidths(cluster.bandwidths(here), gpu=here.device.type == "cuda"),
    ]


def _processes(hosts: Sequence[str]) -> Iterator[Finding]:
    counts = {host: hosts.count(host) for host in dict.fromkeys(hosts)}
    text = f"{len(hosts)} on {len(counts)} machine(s): " + ", ".join(f"{h} {n}" for h, n in counts.items())
    even = len(set(counts.values())) == 1
    remedy = "" if even else "start the same number on each machine, or some GPUs are idle"
    yield Finding("processes", "good" if even else "note", text, remedy)


def _versions(versions: Sequence[dict[str, str]], hosts: Sequence[str]) -> Iterator[Finding]:
    first = versions[0]
    # By machine and name, the first rank that differs.
    different: dict[tuple[str, str], int] = {}
    for rank, found in enumerate(versions):
        for name in dict.fromkeys([*first, *found]):
            if found.get(name) != first.get(name):
                different.setdefault((hosts[rank], name), rank)
    if not different:
        yield Finding("versions", "good", ", ".join(f"{name} {value}" for name, value in first.items()))
    for (host, name), rank in different.items():
        one, other = (found.get(name, "none") for found in (versions[rank], first))
        text = f"{name} is {one} on {host} (rank {rank}) and {other} on {hosts[0]}"
        hardware = name in ("gpu", "gpu memory", "machine")
        remedy = "use machines of one kind" if hardware else "install the same environment on every machine"
        yield Finding("versions", "note" if hardware else "missing", text, remedy)


def _clocks(offsets: Sequence[float], hosts: Sequence[str]) -> Iterator[Finding]:
    rank = max(range(len(offsets)), key=lambda rank: abs(offsets[rank]))
    text = f"at most {abs(offsets[rank]) * 1e3:.1f} ms apart"
    if abs(offsets[rank]) <= MAX_SKEW:
        yield Finding("clocks", "good", text)
    else:
        text = f"{hosts[rank]} (rank {rank}) is {offsets[rank]:+.1f} s off {hosts[0]}"
        yield Finding(
            "clocks", "missing", text, "synchronise them: chronyc makestep, or timedatectl set-ntp true"
        )


def _storage(problems: Sequence[str], folder: Path) -> Iterator[Finding]:
    if not problems:
        yield Finding(
            "storage",
            "good",
            f"{folder.resolve()}: every rank sees the files that the others write and rename",
        )
    for problem in problems:
        yield Finding(
            "storage",
            "missing",
            problem,
            "set run.dir to a folder that is mounted on all machines, and name it here",
        )


def _bandwidths(found: Sequence[Bandwidth], *, gpu: bool) -> Iterator[Finding]:
    for collective in dict.fromkeys(each.collective for each in found):
        sizes = [each for each in found if each.collective == collective]
        text = ", ".join(
            f"{each.bytes / 2**20:g} MiB {each.milliseconds:.2f} ms {each.bus_gb_s:.2f} GB/s"
            for each in sizes
        )
        slow = gpu and sizes[-1].bus_gb_s < MIN_GPU_GB_S
        remedy = (
            "run with NCCL_DEBUG=INFO, and name the fast network with NCCL_SOCKET_IFNAME and NCCL_IB_HCA"
            if slow
            else ""
        )
        yield Finding(collective, "note" if slow else "good", text, remedy)
