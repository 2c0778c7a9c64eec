"""The log on the terminal and in the run folder."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

from transfusion.observe.runfolder import RunFolder

LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to whatever sys.stderr is at that moment: a live progress line replaces it while it shows."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        return


def start_logging(folder: RunFolder | None, *, rank: int = 0) -> None:
    """Send the package's log to stderr, and in the main process to log.txt of its run folder.

    Other ranks show warnings only, with their rank. Calling it again replaces the former destinations.
    """
    logger = logging.getLogger("transfusion")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    screen = _Stderr()
    screen.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    screen.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"rank {rank}: %(message)s"))
    logger.addHandler(screen)
    if folder is not None and rank == 0:
        folder.path.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(folder.log, encoding="utf-8")
        file.setFormatter(logging.Formatter(LOG_FORMAT))
        logger.addHandler(file)
