"""Who this process is among all processes, and the start and end of their process group.

The only reader and writer of environment variables in the package; torch is imported when first needed, so
that the command line can use this module early.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from transfusion.errors import UserError

if TYPE_CHECKING:
    import torch

# A collective that waits longer than this has lost a process: better an error than a hang.
TIMEOUT = timedelta(minutes=10)
# SLURM gives no port; jobs of one machine get different ones from here on.
SLURM_FIRST_PORT = 20_000
SLURM_PORTS = 20_000
# Of mpirun and its like, which give no port either.
MPI_PORT = "29500"
# Rank, processes, rank on this machine, processes on this machine: Open MPI, MPICH and Intel MPI, Cray, MVAPICH.
MPI_VARIABLES = (
    tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),
    tuple(f"MV2_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
)
# So long a host's name may take to be known: containers of one job start one after another.
NAME_SECONDS = 60.0
# So long the others leave the first process to say what all of them would say, and to end: on a busy machine
# the end of a process alone can take ten seconds.
HEAD_START = 30.0
FLIGHT_RECORDS = "2000"
# Waits for the end of the process behind a descriptor, and then speaks. torchrun kills after thirty seconds.
_SAY_BELOW = """
import select, sys
select.select([int(sys.argv[1])], [], [], 60)
print(sys.argv[2], file=sys.stderr)
"""
# What this process has been in, if only for a while.
_groups_joined: list[Environment] = []


class Placement(NamedTuple):
    """This process's place, as its launcher tells it. variables: where the others are found, if it does not."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    variables: dict[str, str]


@dataclass(frozen=True)
class Environment:
    """One process of a run. threads: CPU threads that torch may use in it."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    threads: int

    @property
    def is_main(self) -> bool:
        """True in the one process that writes what is written once."""
        return self.rank == 0


def start(threads: int = 0, *, timeout: timedelta = TIMEOUT) -> Environment:
    """Find this process's place, pick its device, set its threads, and join the other processes.

    threads: CPU threads, 0 for the cores divided by the processes of this machine. The group is gloo, and NCCL
    too for tensors on CUDA; a single process has none. Raises UserError when the launcher's variables contradict each
    other or the other processes do not answer.
    """
    import torch

    place = placement(os.environ)
    cuda = torch.cuda.is_available()
    if cuda and place.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {place.local_rank} of this machine has no GPU of its own, "
            f"{torch.cuda.device_count()} found; start at most that many processes a machine, under SLURM without"
            " --gpus-per-task, so that each process sees all GPUs of its machine"
        )
    if cuda:
        torch.cuda.set_device(place.local_rank)
    else:
        # DeepSpeed guesses its accelerator from installed packages; without a GPU the guess may be wrong.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # What torch.distributed and DeepSpeed read.
    numbers = {"RANK": place.rank, "LOCAL_RANK": place.local_rank, "WORLD_SIZE": place.world_size}
    os.environ.update({name: str(number) for name, number in numbers.items()} | place.variables)
    # Collectives that are kept for `flight_recorder`.
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", FLIGHT_RECORDS)
    count = threads or max(1, len(os.sched_getaffinity(0)) // place.local_world_size)
    torch.set_num_threads(count)
    device = torch.device("cuda", place.local_rank) if cuda else torch.device("cpu")
    environment = Environment(place.rank, place.local_rank, place.world_size, device, count)
    if place.world_size > 1:
        join_group(environment, timeout=timeout)
    return environment


def join_group(environment: Environment, *, timeout: timedelta = TIMEOUT) -> None:
    """Start torch.distributed, if it is not running. A single process forms a group of one without a port."""
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return
    on_gpu = environment.device.type == "cuda"
    options: dict[str, Any] = {"timeout": timeout}
    if on_gpu:
        options["device_id"] = environment.device
    if environment.world_size == 1:
        options.update(store=dist.HashStore(), rank=0, world_size=1)
    else:
        _wait_for_name(os.environ["MASTER_ADDR"])
    try:
        # Beside NCCL a group of the hosts, for what is no work of the GPUs and must not wait for it.
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", **options)
        _groups_joined.append(environment)
    except (RuntimeError, ValueError, torch.distributed.DistError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"process {environment.rank} of {environment.world_size} could not reach the others at {address}"
            f" within {timeout.total_seconds():.0f} s ({reason}); check that all run and the port is free"
        ) from error


def _wait_for_name(host: str) -> None:
    """Return once the host has an address. torch itself would ask for ten minutes."""
    deadline = time.monotonic() + NAME_SECONDS
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"MASTER_ADDR={host} has no address here ({error.strerror}) after {NAME_SECONDS:.0f} s; give a name"
                    " or an address of the first machine that all others know"
                ) from None
            time.sleep(1.0)


def set_hub_access(*, download: bool) -> None:
    """Say whether the libraries of the Hugging Face hub may use the network. They need not be imported yet."""
    os.environ.update(
        {f"HF_{name}_OFFLINE": str(int(not download)) for name in ("HUB", "DATASETS", "EVALUATE")}
    )
    for name in ("huggingface_hub.constants", "datasets.config"):
        if name in sys.modules:
            vars(sys.modules[name])["HF_HUB_OFFLINE"] = not download


@contextlib.contextmanager
def as_single_process() -> Iterator[None]:
    """Meanwhile the launcher's variables tell of one process, for a library that would share its work by them."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    before = {name: os.environ.get(name) for name in alone}
    os.environ.update(alone)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def stop() -> None:
    """Leave the process group, if there is one."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End this process with `code`, after what is registered for its end has run.

    A process that was in a group skips the taking down of the interpreter. Threads of gloo outlive their group
    where DeepSpeed keeps a reference to it, and one that gives back a tensor while Python is taken down aborts
    the process (exit code -6): the launcher would call a finished run a failure.
    """
    if not _groups_joined:
        raise SystemExit(code)
    # As multiprocessing ends its own processes.
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def own_place() -> Placement:
    """This process's place, for work that is shared without a group. Raises UserError as `placement` does."""
    return placement(os.environ)


def own_device(name: str) -> str:
    """For work that is shared without a group: "auto" and "cuda" as this process's GPU, any other name as it is.

    Processes beyond the GPUs of their machine take turns on them.
    """
    import torch

    place = own_place()
    if name not in ("auto", "cuda") or place.world_size == 1 or not torch.cuda.is_available():
        return name
    return f"cuda:{place.local_rank % torch.cuda.device_count()}"


def is_first_process() -> bool:
    """Whether this is the one process that speaks for all of them, as its launcher tells it."""
    try:
        return placement(os.environ).rank == 0
    except UserError:
        return True


def say_once(message: str) -> None:
    """Print an error that ends this process, on stderr, and of all ranks that have the same one only once.

    A launcher ends all processes as soon as one of them fails. So the first speaks at once, while the others
    wait to be ended; they speak only if the first had nothing to say.
    """
    if is_first_process():
        print(f"transfusion: {message}", file=sys.stderr, flush=True)
        return
    time.sleep(HEAD_START)
    print(f"transfusion: rank {placement(os.environ).rank}: {message}", file=sys.stderr, flush=True)


def say_below_launcher(message: str) -> None:
    """Print a message on stderr again, once torchrun or deepspeed has ended: below what they say at their end.

    Without one of them, and where the system cannot tell of another process's end, nothing is printed.
    """
    launched = "TORCHELASTIC_RUN_ID" in os.environ or "CROSS_SIZE" in os.environ
    if not launched or not is_first_process() or not hasattr(os, "pidfd_open"):
        return
    with contextlib.suppress(OSError):
        launcher = os.pidfd_open(os.getppid())
        subprocess.Popen(
            [sys.executable, "-S", "-c", _SAY_BELOW, str(launcher), f"transfusion: {message}"],
            pass_fds=[launcher],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )


def without_launcher_arguments(arguments: Sequence[str]) -> list[str]:
    """Command line arguments without the `--local_rank=N` that the deepspeed launcher puts among them."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in ("--local_rank", "--local-rank"):
            skip = True
        elif not re.match(r"--local[_-]rank=", argument):
            kept.append(argument)
    return kept


def placement(variables: Mapping[str, str]) -> Placement:
    """Read the variables of torchrun or the deepspeed launcher, else of mpirun or srun, else assume one process.

    Raises UserError for variables that contradict each other or do not tell enough.
    """
    if "RANK" in variables or "WORLD_SIZE" in variables:
        return _from_torchrun(variables)
    # Before srun: in a job of SLURM mpirun starts its own servants with it, whose variables its processes see.
    for names in MPI_VARIABLES:
        if all(name in variables for name in names):
            return _from_mpirun(variables, names)
    # Only srun sets this one; an sbatch script itself also has SLURM_NTASKS but is a single process.
    if int(variables.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return _from_slurm(variables)
    if _integer(variables, "PMI_SIZE", 1) > 1:
        raise UserError(
            f"an MPI launcher started {variables['PMI_SIZE']} processes and does not tell which of them share this"
            " machine; use torchrun, or set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT"
        )
    return Placement(0, 0, 1, 1, {})


def _from_torchrun(variables: Mapping[str, str]) -> Placement:
    rank, world_size = _integer(variables, "RANK"), _integer(variables, "WORLD_SIZE")
    local_rank = _integer(variables, "LOCAL_RANK", rank)
    local_size = _integer(variables, "LOCAL_WORLD_SIZE", _integer(variables, "LOCAL_SIZE", world_size))
    if not 0 <= rank < world_size:
        raise UserError(f"RANK={rank} does not fit WORLD_SIZE={world_size}; use torchrun, or unset both")
    if world_size > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in variables:
                raise UserError(f"WORLD_SIZE={world_size} but {name} is not set; use torchrun, or set it")
    return Placement(rank, local_rank, world_size, local_size, {})


def _from_mpirun(variables: Mapping[str, str], names: Sequence[str]) -> Placement:
    rank, world_size, local_rank, local_size = (_integer(variables, name) for name in names)
    exported = {"MASTER_PORT": variables.get("MASTER_PORT", MPI_PORT)}
    if "MASTER_ADDR" not in variables:
        if local_size < world_size:
            raise UserError(
                f"mpirun started {world_size} processes on several machines, and MASTER_ADDR is not set;"
                " give all of them the first machine's name, as in mpirun -x MASTER_ADDR=HOST"
            )
        exported["MASTER_ADDR"] = "127.0.0.1"
    return Placement(rank, local_rank, world_size, local_size, exported)


def _from_slurm(variables: Mapping[str, str]) -> Placement:
    rank, world_size = _integer(variables, "SLURM_PROCID"), _integer(variables, "SLURM_STEP_NUM_TASKS")
    local_rank = _integer(variables, "SLURM_LOCALID")
    local_size = _tasks_on_node(
        variables.get("SLURM_STEP_TASKS_PER_NODE", str(world_size)), _integer(variables, "SLURM_NODEID", 0)
    )
    exported = {}
    if "MASTER_ADDR" not in variables:
        exported["MASTER_ADDR"] = _first_host(variables.get("SLURM_STEP_NODELIST", "localhost"))
    if "MASTER_PORT" not in variables:
        job = _integer(variables, "SLURM_JOB_ID", 0)
        exported["MASTER_PORT"] = str(SLURM_FIRST_PORT + job % SLURM_PORTS)
    return Placement(rank, local_rank, world_size, local_size, exported)


def _integer(variables: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = variables.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise UserError(
            f"the environment variable {name} must be an integer, got {text!r}; use torchrun, or unset it"
        ) from None


def _tasks_on_node(listing: str, node: int) -> int:
    """Tasks of node number `node` from SLURM's listing, such as `4(x2),3`."""
    counts: list[int] = []
    for part in listing.split(","):
        count, _, repeat = part.partition("(x")
        counts += [int(count)] * int(repeat.rstrip(")") or 1)
    return counts[min(node, len(counts) - 1)]


def _first_host(listing: str) -> str:
    """First host of SLURM's listing, such as `rack[0-1]node[03-07,9]-ib,other`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", listing)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0] if first else listing)


def find_device(name: torch.device | str) -> torch.device:
    """The named device, CUDA where there is one for "auto". Raises UserError for one that is not there."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name!r} does not exist; choose auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {name!r} is not available: PyTorch finds no CUDA device; use auto or cpu")
    return device
