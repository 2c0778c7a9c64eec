"""Files written atomically, and digests. Nobody writes a file that others read, or hashes contents, by hand.

A file is written under another name, `.NAME.tmp-PROCESS`, and takes its own once it is complete and on the disk. So
a reader sees the former file or all of the new one, two writers do not meet, and a full disk costs nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from transfusion.errors import UserError

UNFINISHED = ".tmp"
DIGEST_BYTES = 16
FINGERPRINT_BYTES = 6
_READ_BYTES = 1 << 24


def unfinished_path(path: Path, writer: object = "") -> Path:
    """The hidden name under which `path` is written by this process, or by the named writer."""
    return path.with_name(f".{path.name}{UNFINISHED}-{writer or os.getpid()}")


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Gives another name to write to. The file takes its own when all went well, and vanishes otherwise."""
    unfinished = unfinished_path(path)
    try:
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def atomic_write_text(path: Path, text: str) -> None:
    """Write a small UTF-8 file atomically."""
    with atomic_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def atomic_copy(source: Path, path: Path) -> None:
    """Copy a file atomically."""
    with atomic_file(path) as unfinished:
        shutil.copyfile(source, unfinished)


def remove_unfinished(folder: Path, names: Collection[str]) -> None:
    """Delete what killed processes left of files with these names. Nobody else may be writing them."""
    for entry in folder.iterdir():
        name, unfinished, _ = entry.name.removeprefix(".").rpartition(f"{UNFINISHED}-")
        if unfinished and name in names:
            entry.unlink(missing_ok=True)


def replace_folder(unfinished: Path, folder: Path) -> None:
    """Give a finished folder its name. What stood there is deleted only afterwards, under another name."""
    aside = _aside(folder)
    if folder.exists():
        remove_leftover(aside)
        folder.rename(aside)
    unfinished.rename(folder)
    sync_folder(folder.parent)
    remove_leftover(aside)


def remove_folder(folder: Path) -> None:
    """Delete a folder under a name that no reader takes for complete, whenever the process is killed."""
    aside = _aside(folder)
    remove_leftover(aside)
    folder.rename(aside)
    remove_leftover(aside)


def remove_leftover(folder: Path) -> None:
    """Delete what a killed process left under a name of ours, if there is any."""
    if folder.exists():
        shutil.rmtree(folder)


def lock(stream: IO[Any], *, wait: bool = True) -> bool:
    """Keep other processes out until the file is closed. False, without `wait`, where one has it.

    Raises UserError where the file system has no locks.
    """
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise
        raise UserError(
            f"{stream.name}: this file system has no locks ({error.strerror}); name a folder on another one,"
            " or mount it with locks (Lustre: -o flock)"
        ) from None
    return True


def sync_folder(folder: Path) -> None:
    """Make renames and new files in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hasher(size: int = DIGEST_BYTES) -> hashlib.blake2b:
    """The project's hash, for what arrives in parts. size: of the digest, in bytes."""
    return hashlib.blake2b(digest_size=size)


def digest(data: bytes, size: int = DIGEST_BYTES) -> str:
    """Hash of some bytes, two hex digits for each byte of `size`."""
    return hashlib.blake2b(data, digest_size=size).hexdigest()


def file_digest(path: Path) -> str:
    """Hash of a file's contents, 32 hex digits."""
    found = hasher()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            found.update(block)
    return found.hexdigest()


def file_state(path: Path | int) -> dict[str, int]:
    """What changes whenever a file, or that of an open descriptor, is written or replaced: cheap, and no proof.

    Setting its time back changes it too. A copy of the same bytes has another state. The number of the device is left
    out, since it differs between machines.
    """
    status = os.stat(path)
    return {
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
        "inode": status.st_ino,
    }


def known_digest(path: Path, state: Mapping[str, int]) -> str:
    """As `file_digest`; a file in the same state is read once a process."""
    return _known_digest(path.resolve(), tuple(state.items()))


@functools.lru_cache(maxsize=1 << 16)
def _known_digest(path: Path, state: tuple[tuple[str, int], ...]) -> str:
    return file_digest(path)


def fingerprint(values: Any, size: int = FINGERPRINT_BYTES) -> str:
    """Hex digits, two for each byte of `size`, that change whenever one of the plain values does."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return digest(text.encode(), size)


def name_hash(name: str) -> int:
    """64 bits that stand for a name: what random numbers are drawn for, a source, a parameter."""
    return int.from_bytes(bytes.fromhex(digest(name.encode("utf-8", "surrogatepass"), 8)), "little")


def sha256(data: bytes) -> str:
    """SHA-256 as the `sha256` of a sample's KEY.json states it."""
    return hashlib.sha256(data).hexdigest()


def _aside(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.former{UNFINISHED}")
