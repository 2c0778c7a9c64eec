"""One shard from its address into a file: with a timeout between bytes, tried several times, and verified."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import subprocess
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from transfusion.data.shards.webdataset import open_address
from transfusion.errors import UserError
from transfusion.files import hasher
from transfusion.urls import redacted

_CHUNK = 1 << 20
# Between two looks at whether the download is still wanted.
_GLANCE_SECONDS = 0.1
_LONGEST_PAUSE = 60.0
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class ShardDigest(NamedTuple):
    """What a shard held when it was indexed: bytes, and their blake2b."""

    size: int
    checksum: str


class DownloadFailed(OSError):  # noqa: N818  (an OSError, so that the shard's samples are faults like any unreadable)
    """A shard that could not be had; strerror: the reason in a few words, without the address."""

    def __init__(self, reason: str) -> None:
        super().__init__(errno.EIO, reason)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.strerror,)


class ShardChanged(DownloadFailed):
    """What the address gives is no longer what was indexed."""

    def __init__(self, reason: str = "changed since it was indexed") -> None:
        super().__init__(reason)


class Stopped(Exception):  # noqa: N818  (no mistake: nobody wants it any more)
    """The download was given up because its process ends."""


class RetryPolicy(NamedTuple):
    """attempts: tries of a shard. timeout: seconds without a byte. pause: before the second try, then doubled."""

    attempts: int
    timeout: float
    pause: float


def download(
    address: str,
    path: Path,
    retry: RetryPolicy,
    *,
    wanted: ShardDigest | None,
    reserve: Callable[[int], int],
    stop: threading.Event,
) -> ShardDigest:
    """Download into an existing file, from its start in each try; returns what it holds then.

    wanted: what it must hold, and the file's size already; None: whatever comes, and `reserve` is asked for room
    for so many more bytes and answers for how many there is. Raises DownloadFailed, ShardChanged where two tries
    agree on other bytes, UserError for a full disk or an address that nothing here opens, Stopped.
    """
    reason, seen = "", set[ShardDigest]()
    for attempt in range(retry.attempts):
        if attempt and stop.wait(min(_LONGEST_PAUSE, retry.pause * 2 ** (attempt - 1))):
            raise Stopped
        try:
            found = _once(address, path, retry.timeout, wanted, reserve, stop)
        except DownloadFailed as error:
            reason = str(error.strerror)
            continue
        if wanted is None or found == wanted:
            return found
        if found in seen:
            raise ShardChanged
        seen.add(found)
        reason = "cut short" if found.size < wanted.size else "other bytes than were indexed"
    raise DownloadFailed(f"download failed: {reason}")


def _once(
    address: str,
    path: Path,
    timeout: float,
    wanted: ShardDigest | None,
    reserve: Callable[[int], int],
    stop: threading.Event,
) -> ShardDigest:
    digest, size, room = hasher(), 0, wanted.size if wanted else 0
    # One byte more than wanted tells enough.
    most, shown = wanted.size + 1 if wanted else 1 << 62, redacted(address)
    with path.open("r+b", buffering=0) as file, contextlib.closing(_chunks(address, timeout, stop)) as chunks:
        for chunk in chunks:
            chunk = chunk[: most - size]
            digest.update(chunk)
            size += len(chunk)
            if size == most:
                break
            if size > room:
                room += reserve(size - room)
                file.truncate(room)
            rest = memoryview(chunk)
            with writing(shown):
                while rest:
                    rest = rest[file.write(rest) :]
        with writing(shown):
            file.truncate(size)
            # A copy that has its name is whole, also after a power cut.
            os.fsync(file.fileno())
    return ShardDigest(size, digest.hexdigest())


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
    """Raises UserError for a disk that is full or cannot be written."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise UserError(
                f"the disk is full while {what} is cached; free some space, lower data.cache.gigabytes,"
                " or name another folder with data.cache.folder"
            ) from None
        raise UserError(
            f"cannot write {what} into the cache: {error.strerror}; name another data.cache.folder"
        ) from None


def _chunks(address: str, timeout: float, stop: threading.Event) -> Generator[bytes]:
    """The bytes of the address. Raises DownloadFailed when they do not all come; errors name no address."""
    try:
        stream = open_address(address)
    except OSError as error:
        raise DownloadFailed(error.strerror or type(error).__name__) from None
    process: subprocess.Popen[bytes] | None = getattr(stream, "proc", None)
    try:
        yield from _read(stream, process, timeout, stop)
        if process is not None and (status := process.wait(timeout)):
            raise DownloadFailed(f"{_program(process)} ended with status {status}")
    except subprocess.TimeoutExpired:
        raise DownloadFailed(f"nothing came for {timeout:g} s") from None
    except DownloadFailed:
        raise
    except OSError as error:
        raise DownloadFailed(error.strerror or type(error).__name__) from None
    finally:
        if process is not None and process.poll() is None:
            process.kill()
        # Webdataset's pipes complain at their end in words that hold the whole command.
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            stream.close()


def _read(
    stream: Any, process: subprocess.Popen[bytes] | None, timeout: float, stop: threading.Event
) -> Generator[bytes]:
    source: Any = process.stdout if process is not None else stream
    try:
        descriptor = source.fileno()
    except (AttributeError, OSError, ValueError):
        # Libraries for object stores have timeouts of their own.
        while chunk := source.read(_CHUNK):
            yield chunk
            if stop.is_set():
                raise Stopped from None
        return
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while True:
        last = time.monotonic()
        while not poll.poll(_GLANCE_SECONDS * 1e3):
            if stop.is_set():
                raise Stopped
            if time.monotonic() - last > timeout:
                raise DownloadFailed(f"nothing came for {timeout:g} s")
        if stop.is_set():
            raise Stopped
        if not (chunk := os.read(descriptor, _CHUNK)):
            return
        yield chunk


def _program(process: subprocess.Popen[bytes]) -> str:
    """The first word of what was run; a whole command line goes through a shell and may hold secrets."""
    words = process.args
    return str(words[0]) if isinstance(words, list) else "the command"
