"""Local copies of remote shards: bounded, shared by the processes of a machine, whole or not there at all.

A copy is called by its address and its contents, so a shard that was indexed anew is another file. Beside the copies
stand `.NAME.tmp-PROCESS` (downloads under way, as large as they will be), `locks/` (one download of a shard at a
time), `leases/` (which copies each living process needs soon, which none may remove) and `failed/` (shards given
up a short while ago, and why). A dead process holds no lock: its leases and unfinished files are cleared by others.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from transfusion.config import CacheConfig
from transfusion.data.remote.download import (
    DownloadFailed,
    RetryPolicy,
    ShardChanged,
    ShardDigest,
    Stopped,
    download,
    writing,
)
from transfusion.data.shards.shard import Facts
from transfusion.errors import UserError
from transfusion.files import UNFINISHED, lock, unfinished_path
from transfusion.urls import file_name, identity, redacted

log = logging.getLogger(__name__)

# Where a shard's size is not known, room for it is made in steps of at most so many bytes.
_STEP_BYTES = 64 << 20
# A shard that was given up is not asked for again so soon: each of its samples would wait for all tries.
FORGIVEN_SECONDS = 120.0
_GLANCE_SECONDS = 0.05
_FOLDERS = ("locks", "leases", "failed")
# What a shard of unknown size counts for beside others.
_NOMINAL_BYTES = 1 << 22
# A copy may be removed between its arrival and its opening, by a process that needs room.
_OPENINGS = 3


@dataclass(frozen=True, slots=True)
class CacheSettings:
    """Where copies are kept and how they are fetched; `max_bytes` of all of them together."""

    folder: Path
    max_bytes: int
    connections: int
    retry: RetryPolicy

    @classmethod
    def of(cls, config: CacheConfig, fallback: Path) -> CacheSettings:
        """fallback: the folder, where the configuration names none."""
        return cls(
            folder=Path(config.folder) if config.folder else fallback,
            max_bytes=int(config.gigabytes * 1e9),
            connections=config.connections,
            retry=RetryPolicy(config.attempts, config.timeout, config.pause),
        )


@dataclass(frozen=True)
class RemoteShard:
    """A shard that an address names, read through a cache: a `Shard`."""

    address: str = field(repr=False)
    settings: CacheSettings
    is_remote = True
    folder = None

    def __str__(self) -> str:
        return redacted(self.address)

    @cached_property
    def name(self) -> str:
        return file_name(self.address)

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix

    @cached_property
    def identity(self) -> str:
        """Sixteen hex digits of the address without what signs it."""
        return identity(self.address)

    @property
    def cache(self) -> ShardCache:
        return shard_cache(self.settings)

    @property
    def siblings(self) -> str:
        return str(self)

    def nominal_bytes(self) -> int:
        return _NOMINAL_BYTES

    def copy_name(self, facts: Facts) -> str:
        return f"{Path(self.name).stem}.{self.identity}.{facts['checksum'][:16]}{self.suffix.lower()}"

    @contextlib.contextmanager
    def whole(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        with self.cache.fetched_new(self) as (copy, digest):
            yield copy, digest._asdict()

    def state(self) -> dict[str, int]:
        return {}

    def has_changed(self, facts: Facts, *, read: bool = False) -> bool:
        """What stands at the address now is not asked: each copy is compared when it is downloaded."""
        return False

    def fetch(self, facts: Facts, *, must: bool = True, stop: threading.Event | None = None) -> bool:
        digest = ShardDigest(facts["size"], facts["checksum"])
        return self.cache.fetch(self, digest, must=must, stop=stop)

    def open(self, facts: Facts) -> int:
        flags, path = os.O_RDONLY | os.O_CLOEXEC, self.settings.folder / self.copy_name(facts)
        for _ in range(_OPENINGS):
            with contextlib.suppress(FileNotFoundError):
                return os.open(path, flags)
            self.fetch(facts)
        return os.open(path, flags)


class _Copy(NamedTuple):
    """A file of the cache. used: when it was last needed."""

    used: float
    size: int
    path: Path


class ShardCache:
    """This process's view of a cache folder."""

    def __init__(self, settings: CacheSettings) -> None:
        """Clears what dead processes left. Raises UserError when the folder cannot be written."""
        self.settings = settings
        # For those who measure: bytes that this process downloaded, and the most that it saw in the folder.
        self.downloaded_bytes, self.peak_bytes = 0, 0
        self._token = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._held: dict[object, frozenset[str]] = {}
        self._folder = settings.folder
        try:
            for name in _FOLDERS:
                (self._folder / name).mkdir(parents=True, exist_ok=True)
            # Locked: no other may find the lease before it is held.
            with self._locked():
                self._lease = (self._folder / "leases" / self._token).open("w+", encoding="utf-8")
                lock(self._lease)
                self._of_others()
                self._copies_of_living()
        except OSError as error:
            raise UserError(
                f"cannot write the cache folder {self._folder}: {error.strerror}; name another data.cache.folder"
            ) from None

    def path(self, shard: RemoteShard, digest: ShardDigest) -> Path:
        """Where the copy stands, if it is there."""
        return self._folder / shard.copy_name(digest._asdict())

    def pin(self, holder: object, names: Iterable[str]) -> None:
        """The copies that a holder needs soon, in place of those it named before: no process removes them."""
        with self._locked():
            self._held[holder] = frozenset(names)
            if not self._held[holder]:
                del self._held[holder]
            with writing(str(self._folder)):
                self._lease.seek(0)
                self._lease.truncate()
                self._lease.write("\n".join(sorted(self._own())))
                self._lease.flush()

    def fetch(
        self,
        shard: RemoteShard,
        digest: ShardDigest,
        *,
        must: bool = True,
        stop: threading.Event | None = None,
    ) -> bool:
        """See that the copy is there; False: there is no room for it now.

        must: even above the bound. Raises DownloadFailed, UserError, Stopped.
        """
        path, stop = self.path(shard, digest), stop or threading.Event()
        with self._one_at_a_time(shard, stop):
            if self._touch(path, digest):
                return True
            self._refuse_failed(shard, digest)
            with self._locked():
                if not self._make_room(digest.size, must=must):
                    return False
                unfinished = self._begin(path, digest.size)
            try:
                self._download(shard, unfinished, digest, stop)
            except DownloadFailed as error:
                # Where it cannot be noted, others only try for themselves.
                with contextlib.suppress(OSError):
                    self._failed(shard, digest).write_text(str(error.strerror), encoding="utf-8")
                log.warning("%s: %s", shard, _advice(error, self.settings.retry.attempts))
                raise
        return True

    @contextlib.contextmanager
    def fetched_new(self, shard: RemoteShard) -> Iterator[tuple[Path, ShardDigest]]:
        """Download whatever the address gives now, and hold it while the caller reads. Raises as `fetch`."""
        holder, never = object(), threading.Event()
        with self._one_at_a_time(shard, never):
            unfinished = self._begin(self._folder / f"{shard.identity}{shard.suffix}", 0)
            digest = self._download(shard, unfinished, None, never, holder)
        try:
            yield self.path(shard, digest), digest
        finally:
            self.pin(holder, ())

    def trim(self) -> None:
        """Come back below the bound, if copies that a step needed at once went above it."""
        with self._locked():
            self._make_room(0, must=True)

    def used_bytes(self) -> int:
        """Bytes of the copies, unfinished ones too."""
        return sum(copy.size for copy in self._copies())

    def clear_failures(self) -> None:
        """Shards that were given up are tried again at once."""
        for path in (self._folder / "failed").iterdir():
            path.unlink(missing_ok=True)

    def _download(
        self,
        shard: RemoteShard,
        unfinished: Path,
        wanted: ShardDigest | None,
        stop: threading.Event,
        holder: object | None = None,
    ) -> ShardDigest:
        try:
            digest = download(
                shard.address,
                unfinished,
                self.settings.retry,
                wanted=wanted,
                reserve=self._reserve,
                stop=stop,
            )
            self.downloaded_bytes += digest.size
            if holder is not None:
                self.pin(holder, [shard.copy_name(digest._asdict())])
            with self._locked():
                unfinished.replace(self.path(shard, digest))
            return digest
        finally:
            unfinished.unlink(missing_ok=True)

    def _begin(self, path: Path, size: int) -> Path:
        """An empty unfinished file that already counts as many bytes as it will have."""
        unfinished = unfinished_path(path, self._token)
        with writing(str(self._folder)), unfinished.open("wb") as stream:
            stream.truncate(size)
        return unfinished

    def _reserve(self, wanted: int) -> int:
        """Room for a file of unknown size that grows by at least so many bytes; returns how much was made."""
        step = max(wanted, min(_STEP_BYTES, self.settings.max_bytes // 8))
        with self._locked():
            self._make_room(step, must=True)
        return step

    def _failed(self, shard: RemoteShard, digest: ShardDigest) -> Path:
        return self._folder / "failed" / shard.copy_name(digest._asdict())

    def _refuse_failed(self, shard: RemoteShard, digest: ShardDigest) -> None:
        marker = self._failed(shard, digest)
        try:
            age = time.time() - marker.stat().st_mtime
            reason = marker.read_text(encoding="utf-8")
        except OSError:
            return
        if age < FORGIVEN_SECONDS:
            raise ShardChanged(reason) if reason == ShardChanged().strerror else DownloadFailed(reason)

    def _touch(self, path: Path, digest: ShardDigest) -> bool:
        """Whether the copy is there, which is now the one used last. One of another size is none."""
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_size == digest.size:
                os.utime(path)
                return True
            path.unlink()
        return False

    def _make_room(self, size: int, *, must: bool) -> bool:
        """Remove copies that nobody needs soon, least recently used first, until `size` bytes fit below the bound.

        Where they cannot, no copy is removed, unless `must`. Called with the folder locked.
        """
        kept = self._own() | self._of_others()
        copies = self._copies_of_living()
        total, bound = sum(copy.size for copy in copies) + size, self.settings.max_bytes
        free = sorted(
            copy for copy in copies if copy.path.name not in kept and not copy.path.name.startswith(".")
        )
        if total - sum(copy.size for copy in free) > bound and not must:
            return False
        for copy in free:
            if total <= bound:
                break
            copy.path.unlink(missing_ok=True)
            total -= copy.size
        self.peak_bytes = max(self.peak_bytes, total)
        return True

    def _copies(self) -> list[_Copy]:
        found = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    if entry.is_file(follow_symlinks=False) and entry.name != ".lock":
                        status = entry.stat(follow_symlinks=False)
                        found.append(_Copy(status.st_mtime, status.st_size, Path(entry.path)))
        return found

    def _own(self) -> frozenset[str]:
        return frozenset().union(*self._held.values())

    def _of_others(self) -> frozenset[str]:
        """Names that living processes hold; leases of dead ones are removed.

        A process that died while it started another one counts as alive until that other runs its program.
        """
        names: set[str] = set()
        for lease in (self._folder / "leases").iterdir():
            if lease.name == self._token:
                continue
            with contextlib.suppress(FileNotFoundError), lease.open(encoding="utf-8") as stream:
                if lock(stream, wait=False):
                    lease.unlink(missing_ok=True)
                else:
                    names.update(stream.read().split("\n"))
        return frozenset(names)

    def _copies_of_living(self) -> list[_Copy]:
        """All copies but unfinished ones without a lease, which are removed."""
        alive = {lease.name for lease in (self._folder / "leases").iterdir()}
        living = []
        for copy in self._copies():
            _, unfinished, token = copy.path.name.rpartition(f"{UNFINISHED}-")
            if unfinished and token not in alive:
                copy.path.unlink(missing_ok=True)
            else:
                living.append(copy)
        return living

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Only one process and thread at a time counts, removes and publishes."""
        with (self._folder / ".lock").open("w") as stream:
            lock(stream)
            yield

    @contextlib.contextmanager
    def _one_at_a_time(self, shard: RemoteShard, stop: threading.Event) -> Iterator[None]:
        """One download of a shard; who waited finds the copy. Raises Stopped."""
        with (self._folder / "locks" / shard.identity).open("w") as stream:
            while not lock(stream, wait=False):
                if stop.wait(_GLANCE_SECONDS):
                    raise Stopped
            yield


def _advice(error: DownloadFailed, attempts: int) -> str:
    if isinstance(error, ShardChanged):
        return f"{error.strerror}; its images count as bad samples: index it again and start a new run"
    return (
        f"{error.strerror} ({attempts} tries); its images count as bad samples: check the address and the network,"
        " or raise data.cache.attempts"
    )


@functools.cache
def shard_cache(settings: CacheSettings) -> ShardCache:
    """One of these a process for each folder and bound."""
    return ShardCache(settings)
