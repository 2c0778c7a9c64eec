"""A shard, wherever it stands: one protocol, kept by local files here and by `remote.cache.RemoteShard`.

Facts are what an index file states of its shard: plain values, by which it is told whether the shard is still the one
that was indexed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from transfusion.files import digest, file_state, known_digest

Facts = Mapping[str, Any]

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

    def state(self) -> dict[str, int]:
        """What tells cheaply that it may be another one, a part of its facts; empty where nothing does."""

    def nominal_bytes(self) -> int:
        """Its size, or what it counts for where that is not known yet."""

    def whole(self) -> AbstractContextManager[tuple[Path, dict[str, Any]]]:
        """The file as it is now, to be read from end to end, and its facts. Raises OSError, and UserError."""

    def has_changed(self, facts: Facts, *, read: bool = False) -> bool:
        """Whether it is known to be another one than these facts are of. Raises OSError where it is gone.

        read: compare all bytes of a local one, though its state is that of the facts.
        """

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
        # In one line, whatever letters it has.
        path = str(self.path)
        return path if path.isprintable() else ascii(path)

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
        state = file_state(self.path)
        yield self.path, {**state, "digest": known_digest(self.path, state)}

    def state(self) -> dict[str, int]:
        return file_state(self.path)

    def has_changed(self, facts: Facts, *, read: bool = False) -> bool:
        state = file_state(self.path)
        if state["size"] != facts["size"]:
            return True
        # A copy has another state but the same bytes.
        doubtful = read or state != state_of(facts)
        return doubtful and known_digest(self.path, state) != facts["digest"]

    def fetch(self, facts: Facts, *, must: bool = True, stop: threading.Event | None = None) -> bool:
        return True

    def open(self, facts: Facts) -> int:
        descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        if file_state(descriptor) != state_of(facts) and self.has_changed(facts):
            os.close(descriptor)
            raise OSError(errno.ESTALE, "changed since it was indexed", str(self.path))
        return descriptor

    def copy_name(self, facts: Facts) -> str:
        return self.name


def state_of(facts: Facts) -> dict[str, Any]:
    """The part of a local shard's facts that `file_state` tells."""
    return {name: facts.get(name) for name in ("size", "mtime_ns", "ctime_ns", "inode")}
