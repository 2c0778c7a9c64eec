"""The members of a tar that may be torn, glued, lying or no tar at all: headers alone, read where they stand.

Python's tarfile takes damage for the end of the archive and believes every size; nothing here does. No memory
is claimed on a header's word, no link is followed, and reading goes on at the next whole header.
"""

from __future__ import annotations

import collections
import os
import re
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

BLOCK = 512
# Of long names and pax records; a header may claim any size.
MAX_EXTENSION = 1 << 20
# What writers fill an archive up to, and the most that any does. Zeros beyond it stand for what was never written.
_RECORD, _LARGEST_RECORD = 20 * BLOCK, 1 << 20

NO_END_MARKER, TRUNCATED, BAD_HEADER = "tar_no_end_marker", "tar_truncated", "tar_bad_header"
TRAILING_DATA, EMPTY, UNREADABLE = "tar_trailing_data", "tar_empty", "tar_unreadable"

_WINDOW = 1 << 18
_SEARCHED_AT_ONCE = 1 << 20
_ZEROS = bytes(BLOCK)
_MAGIC, _MAGIC_OFFSET = b"ustar", 257
# The word of eight bytes that the magic stands in: its number in a block, its value, and the bits that count.
_WORD = np.dtype("<u8")
_MAGIC_WORD, _BEFORE_MAGIC = divmod(_MAGIC_OFFSET, 8)
_MAGIC_VALUE, _MAGIC_BITS = (
    int.from_bytes(magic, "little") << 8 * _BEFORE_MAGIC for magic in (_MAGIC, b"\xff" * len(_MAGIC))
)
# Places of a header: size, checksum, what follows each, kind, and the prefix of a long name.
_SIZE, _AFTER_SIZE = slice(124, 135), slice(135, 136)
_CHECKSUM, _AFTER_CHECKSUM = slice(148, 154), slice(154, 156)
_KIND, _PREFIX = 156, 345
_REGULAR, _DIRECTORY = (b"0", b"\0", b"7"), b"5"
# Types without data whatever their size field says: hard and symbolic links, devices, pipes.
_NO_DATA = (b"1", b"2", b"3", b"4", b"6")
_PAX_RECORD = re.compile(rb"(\d{1,7}) ([^=]+)=")


class Member(NamedTuple):
    """A member: its name, where header and data stand, and how long the data is.

    regular: False for links, devices and sparse files. torn: why the data is not whole, else empty. before: the
    damage, or the end of an archive, that stands right before it, else empty.
    """

    name: bytes
    offset: int
    start: int
    size: int
    regular: bool
    torn: str
    before: str


class _Header(NamedTuple):
    name: bytes
    size: int
    kind: bytes


class _BadHeaderError(Exception):
    """This block is no header, or one that lies."""


class Window:
    """A file read in large pieces: most of what is read stands a little behind what was read last."""

    def __init__(self, descriptor: int) -> None:
        self.data, self.start = b"", 0
        self._descriptor = descriptor

    def read(self, position: int, size: int) -> bytes:
        """As os.pread."""
        place = position - self.start
        if not 0 <= place <= len(self.data) - size:
            if size > _WINDOW:
                return os.pread(self._descriptor, size, position)
            self.data = os.pread(self._descriptor, _WINDOW, position)
            self.start, place = position, 0
        return self.data[place : place + size]


class TarWalk:
    """Iterates over the members once.

    problems: by reason the offset of the first, complete when the walk has ended. latest: the last one so far.
    skipped: by reason the bytes that were passed over.
    """

    def __init__(self, descriptor: int) -> None:
        self.problems: dict[str, int] = {}
        self.skipped: collections.Counter[str] = collections.Counter()
        self.latest: tuple[str, int] = ("", -1)
        self._descriptor = descriptor
        self.length = os.fstat(descriptor).st_size
        self._window = Window(descriptor)
        # Of the window that begins at `_known_from`, by where they stand, with where the next stand.
        self._known: dict[int, tuple[Member, int]] = {}
        self._known_from = -1

    def __iter__(self) -> Iterator[Member]:
        position, found, before = 0, False, ""
        while True:
            if known := self._known.get(position) or self._look_around(position):
                member, position = known
                yield member._replace(before=before) if before else member
                found, before = True, ""
                continue
            place = self._next_header(position, found)
            if place is None:
                break
            if place != position:
                before = TRAILING_DATA
            try:
                member, following = self._member(place, before)
            except _BadHeaderError:
                self._note(BAD_HEADER, place)
                # Searched from the next block on: the size of a lying header says nothing.
                position, before = self._search(place + BLOCK), BAD_HEADER
                self.skipped[BAD_HEADER] += position - place
                continue
            if following is None:
                # Cut off here, or a lie: members behind it tell.
                following = self._search(place + BLOCK)
                member = member._replace(torn=TRUNCATED if following >= self.length else BAD_HEADER)
                self._note(member.torn, place)
                self.skipped[member.torn] += following - place
            found = True
            if member.name:
                yield member
            position, before = following, member.torn
        if not found:
            torn = TRUNCATED in self.problems and not self.skipped[TRUNCATED]
            if not self.length or torn or BAD_HEADER in self.problems:
                self.problems = {UNREADABLE: 0}
            elif self.length <= _RECORD:
                self.problems = {EMPTY: 0}
            else:
                # More zeros than an empty archive has: nobody wrote what was meant to be there.
                self.problems = {EMPTY: 0, TRUNCATED: 0}

    def _look_around(self, position: int) -> tuple[Member, int] | None:
        """The member whose header stands here, where nothing about it is in question, and where the next stands."""
        if len(self._block(position)) < BLOCK or self._known_from == self._window.start:
            return None
        self._known_from = self._window.start
        self._known = _plain_members(self._window.data, self._window.start, self.length)
        return self._known.get(position)

    def _next_header(self, position: int, found: bool) -> int | None:
        """Where the next header stands: here, or behind an end marker; None at the end."""
        left = self.length - position
        if left < BLOCK:
            if left > 0:
                self._note(TRUNCATED, position)
            elif found and not self.problems.keys() & {TRUNCATED, BAD_HEADER}:
                self._note(NO_END_MARKER, position)
            return None
        if self._block(position) != _ZEROS:
            return position
        place = self._behind_zeros(position)
        reason = TRAILING_DATA if place < self.length else TRUNCATED
        # Larger records than the usual are powers of two.
        record = max(_RECORD, min(_LARGEST_RECORD, self.length & -self.length))
        is_hole = place - position > record + 2 * BLOCK
        if is_hole:
            self.skipped[reason] += place - position
        if is_hole or place < self.length:
            self._note(reason, place)
        return place if place < self.length else None

    def _behind_zeros(self, position: int) -> int:
        """The first block from here on that is not all zeros, or the end."""
        while position < self.length:
            data = os.pread(self._descriptor, _SEARCHED_AT_ONCE, position)
            zeros = len(data) - len(data.lstrip(b"\0"))
            if zeros < len(data):
                place = position + zeros // BLOCK * BLOCK
                return place if self.length - place >= BLOCK else self.length
            position += len(data) or self.length
        return self.length

    def _search(self, position: int) -> int:
        """The next block that is a whole header, or the end."""
        while position < self.length:
            data = os.pread(self._descriptor, _SEARCHED_AT_ONCE, position)
            magic = data.find(_MAGIC, _MAGIC_OFFSET)
            while magic >= 0:
                start = magic - _MAGIC_OFFSET
                if start % BLOCK == 0 and _is_whole(data[start : start + BLOCK]):
                    return position + start
                magic = data.find(_MAGIC, magic + 1)
            position += len(data) or self.length
        return self.length

    def _member(self, place: int, before: str) -> tuple[Member, int | None]:
        """The member whose headers begin here, and where the next begin: None if its data is not all there.

        A directory has no name.
        """
        long_name, pax, position = b"", dict[bytes, bytes](), place
        while True:
            header = _parsed(self._block(position))
            data = position + BLOCK
            if header.kind not in (b"L", b"K", b"x", b"g"):
                break
            if header.size > min(MAX_EXTENSION, self.length - data):
                raise _BadHeaderError
            content = os.pread(self._descriptor, header.size, data)
            if header.kind == b"L":
                long_name = content.split(b"\0", 1)[0]
            elif header.kind == b"x":
                pax = _pax(content)
            position = data + _padded(header.size)
        size = header.size
        if b"size" in pax:
            digits = pax[b"size"]
            if not digits.isdigit() or len(digits) > 20:
                raise _BadHeaderError
            size = int(digits)
        sparse = pax and any(key.startswith(b"GNU.sparse.") for key in pax)
        regular = header.kind in _REGULAR and not sparse
        name = pax.get(b"path") or long_name or header.name
        if header.kind in _NO_DATA:
            size = 0
        if header.kind == _DIRECTORY or (regular and name.endswith(b"/")):
            name = b""
        member = Member(name, place, data, size, regular, "", before)
        if size > self.length - data:
            return member, None
        return member, min(data + _padded(size), self.length)

    def _block(self, position: int) -> bytes:
        return self._window.read(position, BLOCK)

    def _note(self, reason: str, offset: int) -> None:
        self.problems.setdefault(reason, offset)
        self.latest = (reason, offset)


def _plain_members(data: bytes, offset: int, length: int) -> dict[int, tuple[Member, int]]:
    """Regular members with one header, written as tools write it, by where they stand: all headers of `data` at once.

    With where the next stand. `TarWalk._member` would give the same. offset: of `data` in the shard. length: of the
    shard. Shape suffixes: H headers, B bytes.
    """
    blocks_HB = np.frombuffer(data, np.uint8, len(data) // BLOCK * BLOCK).reshape(-1, BLOCK)
    words = blocks_HB.view(_WORD)[:, _MAGIC_WORD] & _MAGIC_BITS
    numbers_H = np.flatnonzero(words == _MAGIC_VALUE)
    headers_HB = blocks_HB[numbers_H]
    starts_H = offset + (numbers_H + 1) * BLOCK
    sizes_H, plain_H = _octal(headers_HB, _SIZE, _AFTER_SIZE)
    claimed_H, whole_H = _octal(headers_HB, _CHECKSUM, _AFTER_CHECKSUM)
    field_HB = headers_HB[:, _CHECKSUM.start : _AFTER_CHECKSUM.stop]
    # The field itself counts as spaces.
    total_H = headers_HB.sum(axis=1, dtype=np.uint32) - field_HB.sum(axis=1, dtype=np.uint32) + 8 * ord(" ")
    kinds_H = headers_HB[:, _KIND]
    plain_H &= whole_H & (claimed_H == total_H) & ((kinds_H == ord("0")) | (kinds_H == 0))
    plain_H &= (headers_HB[:, _PREFIX] == 0) & (sizes_H <= length - starts_H)
    names_H = np.ascontiguousarray(headers_HB[plain_H, :100]).view("S100").ravel().tolist()
    starts_H, sizes_H = starts_H[plain_H], sizes_H[plain_H]
    ends_H = np.minimum(starts_H - (-sizes_H // BLOCK) * BLOCK, length)
    columns = zip(names_H, starts_H.tolist(), sizes_H.tolist(), ends_H.tolist(), strict=True)
    return {
        start - BLOCK: (Member._make((name, start - BLOCK, start, size, True, "", "")), end)
        for name, start, size, end in columns
        # A directory of old writers, and what stands behind the end of a name.
        if name and not name.endswith(b"/") and b"\0" not in name
    }


def _octal(
    headers_HB: NDArray[np.uint8], digits: slice, after: slice
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Numbers in octal digits, and whether they are that and nothing but spaces and zeros follows."""
    values_HB = headers_HB[:, digits].astype(np.int64) - ord("0")
    good_H = ((values_HB >> 3) == 0).all(axis=1) & ((headers_HB[:, after] & ~np.uint8(ord(" "))) == 0).all(
        axis=1
    )
    weights_B = 8 ** np.arange(values_HB.shape[1], dtype=np.int64)[::-1]
    return values_HB @ weights_B, good_H


def _parsed(block: bytes) -> _Header:
    if not _is_whole(block):
        raise _BadHeaderError
    name = block[:100].split(b"\0", 1)[0]
    # Only POSIX has a prefix there; GNU keeps times in the same place.
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    return _Header(name, _number(block[124:136]), block[156:157])


def _is_whole(block: bytes) -> bool:
    """Whether the block's checksum is its own; bytes count as unsigned, or as old writers had it, signed."""
    if len(block) < BLOCK:
        return False
    try:
        claimed = _number(block[148:156])
    except _BadHeaderError:
        return False
    # The field itself counts as spaces.
    total = _total(block[:148]) + 8 * ord(" ") + _total(block[156:334]) + _total(block[334:])
    if claimed == total:
        return True
    high = sum(byte > 127 for byte in block[:148]) + sum(byte > 127 for byte in block[156:])
    return claimed == total - 256 * high


def _total(data: bytes) -> int:
    """Sum of at most 256 bytes: the lower half of Adler-32 is one more, modulo 65,521, and ten times as fast."""
    return (zlib.adler32(data) & 0xFFFF) - 1


def _number(field: bytes) -> int:
    """A size in octal digits, or in base 256 with the highest bit set."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:])
    digits = field.strip(b" \0")
    if digits and not digits.isdigit():
        raise _BadHeaderError
    try:
        return int(digits or b"0", 8)
    except ValueError:
        raise _BadHeaderError from None


def _pax(content: bytes) -> dict[bytes, bytes]:
    """Records `LENGTH KEY=VALUE` and a line end. Of a malformed one nobody knows what it says."""
    records, position = {}, 0
    while match := _PAX_RECORD.match(content, position):
        end = position + int(match[1])
        if end > len(content) or end <= match.end() or content[end - 1 : end] != b"\n":
            raise _BadHeaderError
        records[match[2]] = content[match.end() : end - 1]
        position = end
    if content[position:].strip(b"\0"):
        raise _BadHeaderError
    return records


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
