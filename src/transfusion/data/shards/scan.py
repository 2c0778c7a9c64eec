"""What a shard holds: its good samples and where they stand, and every other one with the reason why not.

Nothing is extracted, no link followed, nothing opened that a shard names, and no pickle loaded. docs/reference/data.md
lists the reasons.
"""

from __future__ import annotations

import array
import collections
import functools
import logging
import operator
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from transfusion.config.sections import Verify
from transfusion.data.shards.sample import (
    CAPTION_BYTES,
    DOCUMENT_BYTES,
    Fault,
    RawSample,
    SampleError,
    document,
    json_object,
)
from transfusion.data.shards.shard import Shard
from transfusion.data.shards.tar import TarWalk
from transfusion.data.shards.validate import IMAGE_EXTENSIONS, Group, SampleValidator
from transfusion.errors import UserError, shown

log = logging.getLogger(__name__)

File = TypeVar("File", Path, Shard)
SHARD_EXTENSIONS = (".tar", ".jsonl")
# Files that stand beside shards and belong there, and those that hold samples nobody can read.
_OWN_FILES = (".index", ".compared", ".changed", "_latents.json")
_PACKED = (".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".lz4", ".zip", ".7z", ".rar")
# Of a key, and of what follows its dot: so what is added to a sample can always be read.
MAX_NAME = 255
LINES_TRUNCATED = "lines_truncated"

# JSON may spell each byte of a text in six.
_LONGEST_LINE = 6 * DOCUMENT_BYTES + CAPTION_BYTES
_UNSAFE_NAME = re.compile(r"^/|(?:^|/)\.\.(?:/|$)|\\|^[A-Za-z]:|[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
# Names as tools write them, about which nothing is in question: folders come apart from these.
_PLAIN_NAME = re.compile(r"([A-Za-z0-9_-]+)\.([a-z0-9.]+)")
# Members remembered from the first walk, about 300 bytes each; of a larger shard every header is read twice.
_MEMBERS_KEPT = 1 << 17
_EXTENSIONS_KEPT = 64
_NAME_REASONS = ("name_unsafe", "member_ignored")


def is_shard(path: Path | Shard) -> bool:
    """Whether the file's name says that it holds samples."""
    return path.suffix.lower() in SHARD_EXTENSIONS


def pick_shards(found: Sequence[File], who: str, extensions: Sequence[str] = SHARD_EXTENSIONS) -> list[File]:
    """The shards among these files. Warns of others, on behalf of `who`. Raises UserError for compressed ones."""
    picked, others = list[File](), list[File]()
    for file in found:
        is_picked = file.suffix.lower() in extensions
        if is_picked or not file.name.endswith(_OWN_FILES):
            (picked if is_picked else others).append(file)
    if packed := [file for file in others if file.name.lower().endswith(_PACKED)]:
        raise UserError(
            f"{who}: {len(packed)} of {len(found)} files are compressed and cannot be read, such as"
            f" {shown(packed[0])}; unpack them to .tar or .jsonl, or leave them out of `shards`"
        )
    if others:
        log.warning(
            "%s: %d of %d files are no %s and are not read, such as %s",
            who,
            len(others),
            len(found),
            " or ".join(extensions),
            shown(others[0]),
        )
    return picked


def scan(path: Path, verify: Verify = "none") -> Iterator[RawSample | Fault]:
    """Samples and faults of a .tar shard or a .jsonl file, in file order; what is wrong with the shard comes last.

    verify: sha256: an image must be the one whose `sha256` stands in its KEY.json, and KEY.txt say what `caption`
    there says. A downloader may have stated the hash of the original, so this is for shards whose writer did not.
    Raises OSError.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if path.suffix.lower() == ".jsonl":
            yield from _scan_lines(path.name, descriptor)
        else:
            yield from (found for _, found in scan_groups(path.name, descriptor, verify))
    finally:
        os.close(descriptor)


class Texts:
    """Texts and captions of all good samples, to train a tokenizer on. They may be read several times."""

    def __init__(self, paths: Iterable[Path]) -> None:
        """Raises UserError for compressed shards."""
        self._paths = pick_shards(list(paths), "texts")

    def __iter__(self) -> Iterator[str]:
        for path in self._paths:
            for found in scan(path):
                if isinstance(found, RawSample):
                    yield from found.texts


def _scan_lines(shard: str, descriptor: int) -> Iterator[RawSample | Fault]:
    offset = 0
    with open(descriptor, "rb", closefd=False) as stream:
        lines = iter(functools.partial(stream.readline, _LONGEST_LINE), b"")
        for number, line in enumerate(lines):
            start, whole = offset, line
            offset += len(line)
            while len(whole) == _LONGEST_LINE and not whole.endswith(b"\n"):
                whole = stream.readline(_LONGEST_LINE)
                offset += len(whole)
            key, notes = f"line {number}", list[str]()
            try:
                text = _text_of_line(line, notes)
                yield RawSample(key, (text,), offset=start, notes=tuple(notes))
            except SampleError as error:
                is_cut = not whole.endswith(b"\n") and str(error) in ("json_invalid", "text_encoding")
                # Zeros stand for lines that were never written.
                meant = round((offset - start) * number / start) if start and b"\0" in line else 1
                yield Fault(shard, key, LINES_TRUNCATED if is_cut else str(error), start, max(1, meant))
    if not offset:
        yield Fault(shard, "", "shard_empty")


def _text_of_line(line: bytes, notes: list[str]) -> str:
    if len(line) == _LONGEST_LINE:
        raise SampleError("text_oversize")
    if not line.strip():
        raise SampleError("line_blank")
    text = json_object(line).get("text")
    if not isinstance(text, str):
        raise SampleError("text_missing")
    return document(text, notes)


def scan_groups(
    shard: str, descriptor: int, verify: Verify = "none"
) -> Iterator[tuple[Group | None, RawSample | Fault]]:
    """As `scan` of an open tar, with the members of each good sample.

    Twice over the samples: first to find keys that come again, then to judge them one by one.
    """
    validator, walk = SampleValidator(descriptor, verify), TarWalk(descriptor)
    scattered, repeated, kept, count = _survey(groups(walk))
    met, told, lost = set[int](), set[str](), _lost(walk, count)
    if kept is None:
        walk = TarWalk(descriptor)
    for group in groups(walk) if kept is None else kept:
        mark = hash(group.key)
        if group.reason not in _NAME_REASONS and (mark in scattered or mark in repeated):
            if mark in met and mark in scattered:
                continue
            group.reason = (
                "not_adjacent" if mark in scattered else "duplicate_key" if mark in met else group.reason
            )
            met.add(mark)
        try:
            yield group, validator.sample(group)
        except SampleError as error:
            reason = str(error)
            meant = scattered[mark] if reason == "not_adjacent" else group.samples
            yield None, Fault(shard, group.key, reason, group.offset, max(lost.pop(reason, 0), meant))
            told.add(reason)
    for reason, offset in walk.problems.items():
        if reason not in told:
            yield None, Fault(shard, "", reason, offset, lost.get(reason, 1))


def _lost(walk: TarWalk, count: int) -> dict[str, int]:
    """By reason the samples that stood where a walk passed over bytes, if they were as large as the others."""
    read = walk.length - walk.skipped.total()
    return {
        reason: max(1, round(skipped * count / read)) if count and read > 0 else 1
        for reason, skipped in walk.skipped.items()
    }


def _survey(found: Iterable[Group]) -> tuple[dict[int, int], set[int], list[Group] | None, int]:
    """Keys (their hashes) whose members are scattered and the samples that were meant, keys that come again with the
    same kind of member, the groups themselves where they are not too many, and how many they are."""
    marks, kinds = array.array("q"), array.array("q")
    dotted: collections.Counter[int] = collections.Counter()
    kept: list[Group] | None = []
    members = 0
    for group in found:
        members += len(group.members) + 1
        if kept is not None:
            kept.append(group)
            kept = kept if members <= _MEMBERS_KEPT else None
        if group.reason in _NAME_REASONS:
            continue
        marks.append(hash(group.key))
        kinds.append(functools.reduce(operator.or_, map(_kind, group.members), 0))
        if meant := group.dotted:
            dotted[marks[-1]] += meant
    unique, counts = np.unique(np.frombuffer(marks, np.int64), return_counts=True)
    again = set(unique[counts > 1].tolist())
    first: dict[int, int] = {}
    repeated: set[int] = set()
    for mark, kind in zip(marks, kinds, strict=True) if again else ():
        if mark in again and first.setdefault(mark, 0) & kind:
            repeated.add(mark)
        elif mark in again:
            first[mark] |= kind
    return {mark: max(1, dotted[mark]) for mark in again - repeated}, repeated, kept, len(marks)


@functools.lru_cache(_EXTENSIONS_KEPT)
def _kind(extension: str) -> int:
    """A bit for each kind of member: all images are one kind."""
    return 1 if extension in IMAGE_EXTENSIONS else 2 << zlib.crc32(extension.encode()) % 61


def groups(walk: TarWalk) -> Iterator[Group]:
    """Runs of members of one key, as the index sees them.

    Each name that is refused or ignored is told once, as a group of its own.
    """
    group: Group | None = None
    aside: tuple[str, str] | None = None
    for member in walk:
        name = member.name.decode("utf-8", "surrogateescape").removeprefix("./")
        key, extension, reason = _split(name, len(member.name))
        if group is not None and member.before:
            group.damage = member.before
        if reason:
            if aside != (key, reason):
                aside = (key, reason)
                yield Group(key, member.offset, reason=reason)
            continue
        aside = None
        if group is None or group.key != key:
            if group is not None:
                yield group
            group = Group(key, member.offset, damage=member.before)
        group.add(extension, member)
    if group is not None:
        reason, offset = walk.latest
        if offset > group.offset:
            group.damage = group.damage or reason
        yield group


def _split(name: str, size: int) -> tuple[str, str, str]:
    """(key, extension in lower case, why a member of such a name is left out, else empty)."""
    plain = _PLAIN_NAME.fullmatch(name)
    if plain and size <= MAX_NAME:
        return plain[1], plain[2], ""
    # At whichever slash comes last.
    folder, slash, base = max((name.rpartition(sign) for sign in "/\\"), key=lambda parts: len(parts[0]))
    stem = _stem(base)
    extension = base[len(stem) + 1 :].lower()
    longest = max(len(part.encode("utf-8", "surrogateescape")) for part in (folder + slash + stem, extension))
    if longest > MAX_NAME or _UNSAFE_NAME.search(name):
        return folder + slash + stem, "", "name_unsafe"
    if stem.startswith(".") or not extension or "__MACOSX" in folder.split("/"):
        return folder + slash + stem, "", "member_ignored"
    return folder + slash + stem, extension, ""


def _stem(base: str) -> str:
    """Up to the first dot that does not lead."""
    leading = len(base) - len(base.lstrip("."))
    return base[:leading] + base[leading:].partition(".")[0]
