"""A run cut in two goes on exactly as if it had not been, also when it was killed while saving."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from handmade import make_batch, same_state, small_config, state_of, train_step

from transfusion.checkpoint.layout import find_latest
from transfusion.checkpoint.resume import resume
from transfusion.checkpoint.save import save
from transfusion.parallel.environment import Environment
from transfusion.parallel.local import LocalEngine
from transfusion.schema import TrainState

ALONE = Environment(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"), threads=1)
SAVES_FOR_EVER = """
import sys
sys.path.append(sys.argv[2])
from handmade import *
from transfusion.checkpoint.save import save
from transfusion.parallel.environment import start
from transfusion.parallel.local import LocalEngine
from transfusion.schema import TrainState
engine = LocalEngine(small_config(optimizer__ema_decay=0.5), start(1))
for step in range(1, 100_000):
    save(sys.argv[1], engine, TrainState(step=step), keep=2)
"""


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_three_and_three_steps_are_six(tmp_path: Path, precision: str) -> None:
    config = small_config(train__precision=precision, optimizer__ema_decay=0.9)
    whole, first, second = (LocalEngine(config, ALONE) for _ in range(3))
    expected = [train_step(whole, [make_batch("mixed", step)]) for step in range(6)]
    got = [train_step(first, [make_batch("mixed", step)]) for step in range(3)]
    save(tmp_path, first, TrainState(step=3), keep=1)
    state = resume(tmp_path, second)
    assert state is not None
    got += [train_step(second, [make_batch("mixed", step)]) for step in range(state.step, 6)]
    for (terms, result), (wanted_terms, wanted) in zip(got, expected, strict=True):
        assert result == wanted
        assert terms.sums.keys() == wanted_terms.sums.keys()
        assert all(torch.equal(each, wanted_terms.sums[name]) for name, each in terms.sums.items())
        assert all(torch.equal(each, wanted_terms.counts[name]) for name, each in terms.counts.items())
    assert same_state(state_of(second), state_of(whole))


@pytest.mark.slow
def test_killed_while_saving(tmp_path: Path) -> None:
    """SIGKILL at moments nobody chose: what is found afterwards is complete and loads."""
    handmade = Path(__file__).parents[1] / "dist"
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    engine = LocalEngine(small_config(optimizer__ema_decay=0.5), ALONE)
    for delay in (0.0, 0.013):
        former = find_latest(tmp_path)
        process = subprocess.Popen(
            [sys.executable, "-c", SAVES_FOR_EVER, str(tmp_path), str(handmade)], env=variables
        )
        try:
            waited = time.monotonic()
            while find_latest(tmp_path) == former and time.monotonic() - waited < 60:
                time.sleep(0.001)
            time.sleep(delay)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        latest = find_latest(tmp_path)
        state = resume(tmp_path, engine)
        assert latest is not None and state is not None
        assert latest.name == f"step_{state.step:08d}"
