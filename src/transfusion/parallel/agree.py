"""What all ranks decide together, in one small collective a step, and the signals that ask for a stop."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from transfusion.schema import Decision

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Agreement(NamedTuple):
    """decision: the greatest of any rank; counts: summed over ranks."""

    decision: Decision
    counts: tuple[int, ...]


def agree(decision: Decision, *counts: int) -> Agreement:
    """Take the most urgent decision of all ranks and the sums of their counts, the same on every rank.

    Every rank must call it with as many counts. One collective; without a process group it answers at once.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return Agreement(decision, counts)
    mine = torch.tensor([int(decision), *counts], dtype=torch.int64, device=group_device())
    all_ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(all_ranks, mine)
    table = torch.stack(all_ranks).cpu()
    return Agreement(Decision(int(table[:, 0].max())), tuple(table[:, 1:].sum(0).tolist()))


def group_device() -> torch.device:
    """The device whose tensors the process group can exchange."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


class StopRequest:
    """Turns SIGTERM and SIGUSR1 into `Decision.SAVE_AND_STOP`, to be asked at a step boundary.

    A context manager of the main thread: the former handlers come back at its end.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._former: dict[signal.Signals, Any] = {}

    @property
    def decision(self) -> Decision:
        """SAVE_AND_STOP once a signal has come, CONTINUE before."""
        return Decision.CONTINUE if self.received is None else Decision.SAVE_AND_STOP

    def __enter__(self) -> StopRequest:
        for number in STOP_SIGNALS:
            self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
