"""What all ranks decide together: one small collective a step, errors that end all of them, stop signals."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from transfusion.errors import UserError, describe
from transfusion.losses.loss import Loss
from transfusion.schema import Batch, Decision

log = logging.getLogger(__name__)

T = TypeVar("T")
# A launcher passes Ctrl-C on to processes that had it from the terminal already. After so many seconds it is another.
SECOND_INTERRUPT_SECONDS = 2.0
DECISION_OF_SIGNAL = {
    signal.SIGINT: Decision.SAVE_AND_STOP,
    signal.SIGTERM: Decision.SAVE_AND_STOP,
    signal.SIGUSR1: Decision.SAVE_AND_STOP,
    signal.SIGUSR2: Decision.SAVE,
}


class Agreement(NamedTuple):
    """decision: the greatest of any rank; counts: summed over ranks."""

    decision: Decision
    counts: tuple[int, ...]


def reduce_decision(decision: Decision, *counts: int) -> Agreement:
    """Take the most urgent decision of all ranks and the sums of their counts, the same on every rank.

    Every rank must call it with as many counts. One collective between hosts, which waits for no GPU; without a
    process group it answers at once.
    """
    if not _is_shared():
        return Agreement(decision, counts)
    mine = torch.tensor([int(decision), *counts], dtype=torch.int64)
    all_ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(all_ranks, mine)
    table = torch.stack(all_ranks)
    return Agreement(Decision(int(table[:, 0].max())), tuple(table[:, 1:].sum(0).tolist()))


def raise_together(work: Callable[[], T]) -> T:
    """Do this rank's part and return its result, once all ranks have done theirs.

    Every rank must call it, and `work` may hold no collective: a rank that fails does not reach it. Where the
    part of a rank fails with a UserError or an OSError, every rank raises the same UserError, the message of
    the first that failed; so no rank runs on into a collective that another never joins.
    """
    failure: UserError | OSError | None = None
    try:
        result = work()
    except (UserError, OSError) as error:
        failure = error
    message = describe(failure) if isinstance(failure, OSError) else failure and str(failure)
    first = next((told for told in gather(message) if told is not None), None)
    if first is not None:
        raise UserError(first) from failure
    return result


def broadcast_from_main(work: Callable[[], T]) -> T:
    """What `work` gives on the main process, on every rank. Errors as those of `raise_together`."""
    if not _is_shared():
        return raise_together(work)
    answer = [raise_together(lambda: work() if dist.get_rank() == 0 else None)]
    dist.broadcast_object_list(answer, src=0, device=torch.device("cpu"))
    found: T = answer[0]  # type: ignore[assignment]
    return found


def gather(value: T) -> list[T]:
    """Every rank's value, in the order of ranks, on every rank. The values are pickled, so keep them small."""
    if not _is_shared():
        return [value]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def sum_over_ranks(figures: Tensor) -> Tensor:
    """The sum of every rank's tensor, on the device that the process group exchanges fastest."""
    if _is_shared():
        figures = figures.to(group_device())
        dist.all_reduce(figures)
    return figures


def global_counts(batches: Sequence[Batch], loss: Loss) -> dict[str, Tensor]:
    """Count what this rank's micro-batches of one step hold, and sum it over all ranks in one collective.

    By the names of the loss's terms, float32 without a dimension. The loss of every micro-batch is divided by these, so
    that neither the number of ranks nor that of micro-batches changes the gradient.
    """
    # float64: a global batch of images has more elements than float32 counts exactly.
    mine = [loss.counts(batch) for batch in batches]
    counts = torch.stack([torch.stack([each[name] for each in mine]).sum() for name in mine[0]])
    return dict(zip(mine[0], sum_over_ranks(counts).float(), strict=True))


def group_device() -> torch.device:
    """The device of this process, whose tensors the process group exchanges fastest."""
    if "nccl" in dist.get_backend():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _is_shared() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


class Signals:
    """Turns signals into decisions, to be asked at a step boundary: Ctrl-C (SIGINT), SIGTERM and SIGUSR1 into
    `Decision.SAVE_AND_STOP`, SIGUSR2 into `Decision.SAVE`.

    A second Ctrl-C raises KeyboardInterrupt. A context manager of the main thread: the former handlers come back at
    its end.
    """

    def __init__(self) -> None:
        self._decision = Decision.CONTINUE
        self._interrupted = math.inf
        self._former: dict[signal.Signals, Any] = {}

    @property
    def stop(self) -> bool:
        """Whether a stop was asked for."""
        return self._decision == Decision.SAVE_AND_STOP

    def take(self) -> Decision:
        """The most urgent decision asked for. SAVE is told once, SAVE_AND_STOP from then on."""
        decision = self._decision
        if decision == Decision.SAVE:
            self._decision = Decision.CONTINUE
        return decision

    def __enter__(self) -> Signals:
        for number in DECISION_OF_SIGNAL:
            self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if time.monotonic() - self._interrupted > SECOND_INTERRUPT_SECONDS:
                raise KeyboardInterrupt
            if self._interrupted == math.inf:
                self._interrupted = time.monotonic()
                log.info("saving after this step; Ctrl-C again ends at once, without saving")
        self._decision = max(self._decision, DECISION_OF_SIGNAL[signal.Signals(number)])
