"""Long work on many items in chunks: a file each, so that a killed process goes on, and several processes share it.

N items, from whom arrays are made that begin with N.
"""

from __future__ import annotations

import json
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transfusion.errors import UserError
from transfusion.evaluate.progress_lines import ProgressLines, say
from transfusion.files import UNFINISHED, atomic_file, atomic_write_text, fingerprint, remove_folder

Arrays = dict[str, NDArray[Any]]
_WAIT_SECONDS = 1.0


class Chunks:
    """The chunks under FOLDER/FINGERPRINT, whose name changes with whatever the work is made of.

    identity: what that is, as plain values. size: items of a chunk. rank, ranks: this process takes chunk `rank`,
    `rank + ranks` and so on. The others are other processes', which see the same folder.
    """

    def __init__(
        self, folder: Path, identity: Mapping[str, Any], *, size: int, rank: int = 0, ranks: int = 1
    ) -> None:
        identity = {**identity, "chunk": size}
        self.folder = folder / fingerprint(identity)
        self._size, self._rank, self._ranks = size, rank, ranks
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(self.folder / "identity.json", json.dumps(identity, indent=2) + "\n")

    def fill(
        self, name: str, count: int, make: Callable[[range], Arrays], *, items_are: str = "images"
    ) -> None:
        """Make this process's chunks of `count` items that are not there yet."""
        for number, items in enumerate(self._parts(count)):
            path = self._path(name, number)
            if number % self._ranks != self._rank or path.exists():
                continue
            say(f"{name} {items_are} {items.start} to {items.stop - 1} of {count}")
            arrays: Any = make(items)
            with atomic_file(path) as unfinished, unfinished.open("wb") as file:
                np.savez(file, **arrays)

    def join(self, name: str, count: int) -> Arrays:
        """All chunks one after another. Waits for those of other processes."""
        found: list[Arrays] = []
        for number, _ in enumerate(self._parts(count)):
            path = self._path(name, number)
            if not path.exists():
                tell = ProgressLines(f"waiting for {path} of another process, which must see the same folder")
                while not path.exists():
                    time.sleep(_WAIT_SECONDS)
                    tell(number)
            found.append(_read(path))
        some = [chunk for chunk in found if all(map(len, chunk.values()))] or found[:1]
        return {key: np.concatenate([chunk[key] for chunk in some]) for key in some[0]}

    def keep_only(self) -> None:
        """Delete what was made of anything else, and what killed processes left."""
        for other in list(self.folder.parent.iterdir()):
            if other.is_dir() and other != self.folder:
                remove_folder(other)
        for path in list(self.folder.glob(f".*{UNFINISHED}-*")):
            path.unlink(missing_ok=True)

    def _parts(self, count: int) -> list[range]:
        return [range(start, min(start + self._size, count)) for start in range(0, count, self._size)]

    def _path(self, name: str, number: int) -> Path:
        return self.folder / f"{name}-{number:05d}.npz"


def _read(path: Path) -> Arrays:
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        raise UserError(f"{path} is damaged; delete it, and it is made again") from None
