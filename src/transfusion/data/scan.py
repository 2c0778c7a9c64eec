"""One pass over a shard: which samples it holds and where, and what is wrong with the others.

Nothing is extracted, no link followed and nothing opened that a shard names.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from transfusion.data.decode import DecodeFault, check_header

PICTURE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
# The key ends at the first dot of the file name, as webdataset has it.
_MEMBER_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")
_BLOCK = 512


@dataclass(frozen=True, slots=True)
class Fault:
    """A sample that is left out, and why. The reason is short and the same for all of its kind."""

    shard: str
    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class RawSample:
    """A text (no picture: size 0), or a caption and where its picture stands in the shard."""

    key: str
    text: str
    picture_offset: int = 0
    picture_size: int = 0


class _SampleError(Exception):
    """Carries the reason why a sample is left out."""


@dataclass(frozen=True, slots=True)
class _Member:
    offset: int
    size: int


def scan(path: Path) -> Iterator[RawSample | Fault]:
    """Samples and faults of a .tar shard or a .jsonl file, in file order."""
    with path.open("rb") as stream:
        yield from _scan_lines(path, stream) if path.suffix == ".jsonl" else _scan_tar(path, stream)


def texts(paths: Iterable[Path]) -> Iterator[str]:
    """Texts and captions of all good samples, to train a tokenizer on."""
    for path in paths:
        for found in scan(path):
            if isinstance(found, RawSample):
                yield found.text


def _scan_lines(path: Path, stream: BinaryIO) -> Iterator[RawSample | Fault]:
    for number, line in enumerate(stream):
        key = f"line {number}"
        try:
            yield RawSample(key, _text_of_line(line))
        except _SampleError as error:
            yield Fault(path.name, key, str(error))


def _text_of_line(line: bytes) -> str:
    try:
        value = json.loads(line)
    except UnicodeDecodeError:
        raise _SampleError("not UTF-8") from None
    except (ValueError, RecursionError):
        raise _SampleError("not JSON") from None
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise _SampleError("missing text")
    return _checked(text, "empty text")


def _scan_tar(path: Path, stream: BinaryIO) -> Iterator[RawSample | Fault]:
    length = os.fstat(stream.fileno()).st_size
    try:
        archive = tarfile.open(fileobj=stream, mode="r:")  # noqa: SIM115  (the stream is closed by the caller)
    except (tarfile.TarError, EOFError):
        yield Fault(path.name, "", "not a tar")
        return
    key, torn = "", False
    members: dict[str, _Member] = {}
    try:
        for entry in archive:
            match = _MEMBER_NAME.fullmatch(entry.name)
            if not entry.isfile() or match is None:
                continue
            if match[1] != key and members:
                yield _judge(path, stream, key, members)
                members = {}
            key = match[1]
            if torn := entry.offset_data + entry.size > length:
                members = {}
                break
            members[match[2].lower()] = _Member(entry.offset_data, entry.size)
    except (tarfile.TarError, OSError, ValueError):
        torn = True
    # tarfile takes a torn or damaged header for the end; a whole archive ends with a block of zeros.
    torn = torn or os.pread(stream.fileno(), _BLOCK, archive.offset) != bytes(_BLOCK)
    last = _judge(path, stream, key, members) if members else None
    # What a tear may have taken members from is good only if it is a whole pair.
    if last is not None and (not torn or (isinstance(last, RawSample) and last.picture_size)):
        yield last
        key = ""
    if torn:
        yield Fault(path.name, key, "truncated tar")


def _judge(path: Path, stream: BinaryIO, key: str, members: dict[str, _Member]) -> RawSample | Fault:
    try:
        picture = next((members[name] for name in PICTURE_EXTENSIONS if name in members), None)
        if picture is None:
            return RawSample(key, _checked(_text_member(stream, members), "empty text"))
        caption = _checked(_caption(stream, members).strip(), "empty caption")
        check_header(_read(stream, picture))
        return RawSample(key, caption, picture.offset, picture.size)
    except (_SampleError, DecodeFault) as error:
        return Fault(path.name, key, str(error))


def _text_member(stream: BinaryIO, members: dict[str, _Member]) -> str:
    # A text document is a .txt alone; with a .json beside it, it is a pair that lost its picture.
    if "txt" not in members:
        raise _SampleError("missing member")
    if "json" in members:
        raise _SampleError("missing picture")
    return _utf8(_read(stream, members["txt"]))


def _caption(stream: BinaryIO, members: dict[str, _Member]) -> str:
    if "txt" in members:
        return _utf8(_read(stream, members["txt"]))
    if "json" not in members:
        raise _SampleError("missing caption")
    try:
        value = json.loads(_utf8(_read(stream, members["json"])))
    except (ValueError, RecursionError):
        raise _SampleError("not JSON") from None
    caption = value.get("caption") if isinstance(value, dict) else None
    if not isinstance(caption, str):
        raise _SampleError("missing caption")
    return caption


def _checked(text: str, reason_if_empty: str) -> str:
    if not text.strip():
        raise _SampleError(reason_if_empty)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _SampleError("not UTF-8") from None
    return text


def _utf8(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise _SampleError("not UTF-8") from None


def _read(stream: BinaryIO, member: _Member) -> bytes:
    return os.pread(stream.fileno(), member.size, member.offset)
