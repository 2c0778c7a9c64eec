"""A shard, wherever it stands: one protocol, kept by local files here and by `remote.cache.RemoteShard`.

Facts are what an index file states of its shard: plain values, by which it is told whether the shard is still the one
that was indexed.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from transfusion.files import digest, hasher

Facts = Mapping[str, Any]

_ENDS, _PLACES, _PLACE = 1 << 16, 62, 1 << 12
_PATH_DIGEST_BYTES = 4


class Shard(Protocol):
    """A file of samples. Printed as it may be shown, without credentials."""

    @property
    def name(self) -> str:
        """File name."""

    @property
    def suffix(self) -> str:
        """Of the name."""

    @property
    def is_remote(self) -> bool:
        """Whether it has to be fetched before it is read."""

    @property
    def identity(self) -> str:
        """Hex digits that tell it from shards of the same name elsewhere."""

    @property
    def folder(self) -> Path | None:
        """Where its index may stand beside it, or None."""

    @property
    def siblings(self) -> str:
        """What names it and others like it on a command line."""

    def nominal_bytes(self) -> int:
        """Its size, or what it counts for where that is not known yet."""

    def whole(self) -> AbstractContextManager[tuple[Path, dict[str, Any]]]:
        """The file as it is now, to be read from end to end, and its facts. Raises OSError, and UserError."""

    def has_changed(self, facts: Facts) -> bool:
        """Whether it is known to be another one than these facts are of. Raises OSError where it is gone."""

    def fetch(self, facts: Facts, *, must: bool = True, stop: threading.Event | None = None) -> bool:
        """See that it can be opened. False says that there is no room now. See `remote.cache.ShardCache.fetch`."""

    def open(self, facts: Facts) -> int:
        """A descriptor to read from. Raises OSError."""

    def copy_name(self, facts: Facts) -> str:
        """What the file that `open` reads is called."""


@dataclass(frozen=True)
class LocalShard:
    """A file on this machine."""

    path: Path
    is_remote = False

    def __str__(self) -> str:
        return str(self.path)

    def __fspath__(self) -> str:
        return os.fspath(self.path)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def suffix(self) -> str:
        return self.path.suffix

    @property
    def identity(self) -> str:
        return digest(os.fsencode(self.path.resolve()), _PATH_DIGEST_BYTES)

    @property
    def folder(self) -> Path:
        return self.path.parent

    @property
    def siblings(self) -> str:
        return str(self.path.with_name("*" + self.suffix))

    def nominal_bytes(self) -> int:
        return self.path.stat().st_size

    @contextlib.contextmanager
    def whole(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        status = self.path.stat()
        yield (
            self.path,
            {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "digest": _sampled_digest(self.path)},
        )

    def has_changed(self, facts: Facts) -> bool:
        status = self.path.stat()
        if status.st_size != facts["size"]:
            return True
        # A copy has another time but the same bytes.
        return bool(status.st_mtime_ns != facts["mtime_ns"] and _sampled_digest(self.path) != facts["digest"])

    def fetch(self, facts: Facts, *, must: bool = True, stop: threading.Event | None = None) -> bool:
        return True

    def open(self, facts: Facts) -> int:
        return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)

    def copy_name(self, facts: Facts) -> str:
        return self.name


def _sampled_digest(shard: Path) -> str:
    """Of the head, the tail and places between: whatever rewrites a shard changes one of them."""
    with shard.open("rb", buffering=0) as stream:
        length = os.fstat(stream.fileno()).st_size
        sampled = hasher(8)
        sampled.update(str(length).encode())
        spans: Mapping[int, int] = {0: _ENDS, max(0, length - _ENDS): _ENDS} | {
            length * place // _PLACES: _PLACE for place in range(1, _PLACES) if length > 2 * _ENDS
        }
        for offset, size in sorted(spans.items()):
            sampled.update(os.pread(stream.fileno(), size, offset))
    return sampled.hexdigest()
