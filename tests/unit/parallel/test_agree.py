"""Agreement without other ranks, and signals that ask for a stop (with other ranks: tests/dist)."""

from __future__ import annotations

import os
import signal

import pytest

from transfusion.parallel.agree import StopRequest, agree
from transfusion.schema import Decision


def test_alone_everyone_agrees() -> None:
    assert agree(Decision.SAVE, 3, 4) == (Decision.SAVE, (3, 4))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_asks_for_a_stop_and_handlers_come_back(number: signal.Signals) -> None:
    former = signal.getsignal(number)
    with StopRequest() as request:
        assert request.decision is Decision.CONTINUE
        os.kill(os.getpid(), number)
        assert request.decision is Decision.SAVE_AND_STOP
        assert request.received == number
    assert signal.getsignal(number) == former
