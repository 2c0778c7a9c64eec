"""Short lines on stderr, so that whoever waits for an evaluation sees what is done and how far it is."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from transfusion.observe.progress import SILENCE_SECONDS
from transfusion.parallel.environment import is_first_process

Item = TypeVar("Item")


def _on_stderr(line: str) -> None:
    """Of several processes only the first one speaks."""
    if is_first_process():
        print(line, file=sys.stderr, flush=True)


_hear: Callable[[str], object] = _on_stderr


def say(line: str) -> None:
    """Tell a line at once, on stderr unless `heard_by` says where."""
    _hear(line)


@contextlib.contextmanager
def heard_by(hear: Callable[[str], object]) -> Iterator[None]:
    """What is said meanwhile goes there, as in a training, which has a display of its own."""
    global _hear
    before, _hear = _hear, hear
    try:
        yield
    finally:
        _hear = before


class ProgressLines:
    """Says what begins, and how far it is whenever it has said nothing for ten seconds."""

    def __init__(
        self,
        doing: str,
        *,
        say: Callable[[str], None] = say,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._doing, self._say, self._now = doing, say, now
        say(doing)
        self._last = now()

    def __call__(self, done: int, total: int | None = None) -> None:
        """Note that so much is done."""
        if self._now() - self._last >= SILENCE_SECONDS:
            self._say(f"{self._doing}: {done:,}" + (f" of {total:,}" if total else ""))
            self._last = self._now()

    def each(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, each noted before it is given."""
        for done, item in enumerate(items):
            self(done)
            yield item
