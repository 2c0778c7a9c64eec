"""Which process am I: the variables of every launcher, and what is wrong with them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from datetime import timedelta

import pytest
import torch

from transfusion.errors import UserError
from transfusion.parallel import environment
from transfusion.parallel.environment import Environment, placement, without_launcher_arguments

TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "head",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "123456",
}


def test_without_a_launcher_there_is_one_process() -> None:
    assert placement({})[:4] == (0, 0, 1, 1)


def test_torchrun() -> None:
    place = placement(TORCHRUN)
    assert place[:4] == (5, 1, 8, 4)
    assert place.variables == {}


def test_deepspeed_launcher_sets_no_local_size() -> None:
    variables = {name: value for name, value in TORCHRUN.items() if name != "LOCAL_WORLD_SIZE"}
    assert placement({**variables, "LOCAL_SIZE": "2"})[:4] == (5, 1, 8, 2)
    assert placement(variables)[:4] == (5, 1, 8, 8)


def test_srun() -> None:
    place = placement(SRUN)
    assert place[:4] == (5, 1, 7, 3)
    assert place.variables == {"MASTER_ADDR": "gpu07", "MASTER_PORT": "23456"}


def test_an_sbatch_script_itself_is_one_process() -> None:
    assert placement({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"})[:4] == (0, 0, 1, 1)


@pytest.mark.parametrize(
    ("listing", "node", "tasks"), [("4(x2),3", 0, 4), ("4(x2),3", 1, 4), ("4(x2),3", 2, 3), ("2", 0, 2)]
)
def test_tasks_of_a_slurm_node(listing: str, node: int, tasks: int) -> None:
    assert environment._tasks_on_node(listing, node) == tasks


@pytest.mark.parametrize(
    ("listing", "host"),
    [
        ("a1,a2", "a1"),
        ("gpu[03-07,9],other", "gpu03"),
        ("rack2-n[1,4]", "rack2-n1"),
        ("x", "x"),
        ("rack[0-1]node[0-7]", "rack0node0"),
        ("node[1-2]-ib,x[3-4]", "node1-ib"),
        ("r[10,12-13]c[2-3]n[001-064]-opa.cluster", "r10c2n001-opa.cluster"),
    ],
)
def test_first_host_of_slurm_nodes(listing: str, host: str) -> None:
    assert environment._first_host(listing) == host


MPIRUN = {
    "Open MPI": [f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")],
    "MPICH, Intel": ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"],
    "Cray": ["PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"],
    "MVAPICH": [f"MV2_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")],
}


@pytest.mark.parametrize("names", MPIRUN.values(), ids=MPIRUN)
def test_mpirun(names: list[str]) -> None:
    alone = dict(zip(names, ("1", "2", "1", "2"), strict=True))
    place = placement(alone)
    assert place[:4] == (1, 1, 2, 2)
    assert place.variables["MASTER_ADDR"] == "127.0.0.1" and place.variables["MASTER_PORT"] == "29500"
    several = dict(zip(names, ("5", "8", "1", "4"), strict=True))
    with pytest.raises(UserError, match="MASTER_ADDR is not set; give all of them the first machine's name"):
        placement(several)
    place = placement({**several, "MASTER_ADDR": "head", "MASTER_PORT": "1234"})
    assert place[:4] == (5, 1, 8, 4)
    assert "MASTER_ADDR" not in place.variables and place.variables["MASTER_PORT"] == "1234"


def test_mpirun_in_a_job_of_slurm_goes_by_its_own_variables() -> None:
    inside = dict(zip(MPIRUN["Open MPI"], ("3", "4", "3", "4"), strict=True))
    assert placement({**SRUN, **inside})[:4] == (3, 3, 4, 4)
    # srun --mpi=pmi2 sets these two besides its own.
    assert placement({**SRUN, "PMI_RANK": "5", "PMI_SIZE": "7"})[:4] == (5, 1, 7, 3)


def test_an_mpi_launcher_that_tells_too_little_is_refused() -> None:
    with pytest.raises(UserError, match="does not tell which of them share this machine; use torchrun"):
        placement({"PMI_RANK": "0", "PMI_SIZE": "2"})
    assert placement({"PMI_RANK": "0", "PMI_SIZE": "1"})[:4] == (0, 0, 1, 1)


def test_a_name_without_an_address_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "NAME_SECONDS", 0.0)
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    with pytest.raises(UserError, match=r"MASTER_ADDR=no-such-host\.invalid has no address here"):
        environment.join_group(Environment(1, 1, 2, torch.device("cpu"), 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": "8"}, "RANK=8 does not fit WORLD_SIZE=8"),
        ({"RANK": None}, "RANK must be an integer, got None"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE must be an integer, got 'many'"),
        ({"MASTER_PORT": None}, "MASTER_PORT is not set; use torchrun"),
    ],
)
def test_contradicting_variables_are_told(changes: dict[str, str | None], message: str) -> None:
    variables = {name: value for name, value in {**TORCHRUN, **changes}.items() if value is not None}
    with pytest.raises(UserError, match=message):
        placement(variables)


def test_launcher_arguments_are_ignored() -> None:
    given = ["--local_rank=1", "train", "a.yaml", "--local-rank", "3", "run.dir=x", "--local_rank", "0"]
    assert without_launcher_arguments(given) == ["train", "a.yaml", "run.dir=x"]


def test_a_library_that_would_share_its_work_sees_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = {"RANK": "1", "WORLD_SIZE": "2"}
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ZeroDivisionError), environment.as_single_process():
        assert (os.environ["RANK"], os.environ["LOCAL_RANK"], os.environ["WORLD_SIZE"]) == ("0", "0", "1")
        _ = 1 / 0
    assert {name: os.environ[name] for name in launcher} == launcher and "LOCAL_RANK" not in os.environ


def test_start_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in (*TORCHRUN, "DS_ACCELERATOR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    try:
        here = environment.start(1)
        assert here == Environment(0, 0, 1, torch.device("cpu"), 1)
        assert here.is_main
        assert torch.get_num_threads() == 1
        assert os.environ["DS_ACCELERATOR"] == "cpu"
        assert not torch.distributed.is_initialized()
        assert environment.start().threads == len(os.sched_getaffinity(0))
        environment.stop()
    finally:
        torch.set_num_threads(threads)


# A group that something keeps, as DeepSpeed does, and work that its threads have not given back yet.
ENDS_WITH_WORK_IN_GLOO = """
import atexit
import torch, torch.distributed as dist
from transfusion.parallel import environment
atexit.register(print, "at exit")
environment.join_group(environment.start(1))
kept = dist.distributed_c10d._get_default_group()
for _ in range(400):
    dist.all_reduce(torch.ones(1_000_000), async_op=True)
environment.stop()
environment.leave(75)
"""


def test_threads_that_outlive_their_group_do_not_abort_the_end() -> None:
    command = [sys.executable, "-c", ENDS_WITH_WORK_IN_GLOO]
    alone = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
    for _ in range(2):
        ended = subprocess.run(command, env=alone, capture_output=True, text=True, timeout=120, check=False)
        assert (ended.returncode, ended.stdout) == (75, "at exit\n"), ended.stderr


def test_a_process_that_was_in_no_group_ends_as_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_groups_joined", [])
    with pytest.raises(SystemExit) as ended:
        environment.leave(2)
    assert ended.value.code == 2


def test_missing_processes_are_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    changes = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in {**TORCHRUN, **changes}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        UserError, match=rf"process 1 of 2 could not reach the others at 127.0.0.1:{port} within 1 s"
    ):
        environment.start(1, timeout=timedelta(seconds=1))


def test_importing_is_light() -> None:
    """The command line imports this module before torch, and the engines without DeepSpeed."""
    code = (
        "import sys, transfusion.parallel.environment; assert 'torch' not in sys.modules;"
        "import transfusion.parallel.zero, transfusion.checkpoint.save; assert 'deepspeed' not in sys.modules"
    )
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    subprocess.run([sys.executable, "-c", code], env=variables, check=True)


def test_of_all_ranks_the_first_speaks_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    for rank in ("0", "3"):
        for name, value in {**TORCHRUN, "RANK": rank}.items():
            monkeypatch.setenv(name, value)
        environment.say_once("no data")
    assert capsys.readouterr().err == "transfusion: no data\ntransfusion: rank 3: no data\n"
    assert waited == [environment.HEAD_START]


def test_a_process_that_shares_work_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert environment.own_device("auto") == "auto", "a single process"
    for local_rank, device in (("1", "cuda:1"), ("2", "cuda:0")):
        for name, value in {**TORCHRUN, "LOCAL_RANK": local_rank}.items():
            monkeypatch.setenv(name, value)
        assert environment.own_device("auto") == environment.own_device("cuda") == device
    assert environment.own_device("cpu") == "cpu" and environment.own_device("cuda:1") == "cuda:1"
