"""What all ranks agree on, errors of one that end all, and signals that ask for a stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from transfusion.errors import UserError, describe
from transfusion.parallel.collectives import (
    Signals,
    broadcast_from_main,
    gather,
    raise_together,
    reduce_decision,
)
from transfusion.schema import Decision

# Three ranks. In each case "work" fails on the ranks that it names. Each rank writes down what it saw.
RANK = """
import json, sys
from datetime import timedelta
from pathlib import Path
import torch.distributed as dist
from transfusion.errors import UserError, describe
from transfusion.parallel.collectives import broadcast_from_main, gather, raise_together
folder, rank, cases = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
dist.init_process_group(
    "gloo", store=dist.FileStore(str(folder / "store"), 3), rank=rank, world_size=3,
    timeout=timedelta(seconds=60),
)
def work(failing):
    kind = failing.get(str(rank))
    if kind == "disk":
        raise OSError(28, "No space left on device", f"file_{rank}")
    if kind:
        raise UserError(kind)
    return rank
def tried(collective, failing):
    try:
        return collective(lambda: work(failing))
    except UserError as error:
        return str(error)
seen = [[tried(raise_together, case), tried(broadcast_from_main, case), gather(rank)] for case in cases]
(folder / f"seen_{rank}.json").write_text(json.dumps(seen))
# Threads of gloo that outlive it abort the process, now and then.
dist.destroy_process_group()
"""


def test_alone_everyone_agrees() -> None:
    assert reduce_decision(Decision.SAVE_AND_STOP, 3, 4) == (Decision.SAVE_AND_STOP, (3, 4))
    assert raise_together(lambda: 3) == broadcast_from_main(lambda: 3) == 3
    assert gather("mine") == ["mine"]


def test_alone_an_error_of_the_system_is_told_with_its_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^No such file or directory \({tmp_path}/gone\)$"):
        raise_together((tmp_path / "gone").read_bytes)
    with pytest.raises(ZeroDivisionError):
        raise_together(lambda: 1 // 0)


@pytest.mark.slow
@pytest.mark.dist
def test_the_first_error_of_any_rank_is_raised_on_all(tmp_path: Path) -> None:
    # What fails on which rank, what `raise_together` then sees on all (none: the rank), and `broadcast_from_main`.
    cases: list[tuple[dict[str, str], str | None, int | str]] = [
        ({}, None, 0),
        ({"1": "disk"}, describe(OSError(28, "No space left on device", "file_1")), 0),
        ({"2": "third", "1": "second"}, "second", 0),
        ({"0": "first"}, "first", "first"),
    ]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    failing = json.dumps([case[0] for case in cases])
    command = [sys.executable, "-c", RANK, str(tmp_path)]
    ranks = [subprocess.Popen([*command, str(rank), failing], env=variables) for rank in range(3)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0, 0]
    for rank in range(3):
        seen = json.loads((tmp_path / f"seen_{rank}.json").read_text())
        assert seen == [
            [rank if together is None else together, main, [0, 1, 2]] for _, together, main in cases
        ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_asks_for_a_stop_and_handlers_come_back(number: signal.Signals) -> None:
    former = signal.getsignal(number)
    with Signals() as signals:
        assert signals.take() is Decision.CONTINUE
        os.kill(os.getpid(), signal.SIGUSR2)
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGUSR2)
        assert [signals.take(), signals.take()] == [Decision.SAVE_AND_STOP] * 2
    assert signal.getsignal(number) == former


def test_a_save_is_asked_for_once() -> None:
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGUSR2)
        assert [signals.take(), signals.take()] == [Decision.SAVE, Decision.CONTINUE]
