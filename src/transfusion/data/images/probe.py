"""What an image's bytes tell without decoding it: format, size, whether it is whole, and whether it is a bomb.

A walk over the markers of a JPEG, the chunks of a PNG (with their checksums) or of a WebP costs a fraction of
decoding and holds nothing but the bytes themselves.
"""

from __future__ import annotations

import re
import struct
import zlib
from typing import Literal, NamedTuple

from transfusion.data.shards.sample import SampleError
from transfusion.sequence.sizes import MAX_ASPECT as MAX_ASPECT

MAX_PIXELS = 50_000_000
MIN_SIDE = 8
# Chunks or segments of a file. Real ones have thousands at most, and each costs a turn of a loop.
_MAX_PIECES = 1 << 16
# Pillow refuses more in one text or profile, so more is refused here, before it is decoded.
MAX_METADATA = 1 << 20

_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
# Of a PNG: sixteen bits of red, green and blue.
_DEEP_COLOUR = bytes((16, 2))
# Of a PNG: length and kind of a chunk, and its checksum.
CHUNK, CHECKSUM = struct.Struct(">I4s"), struct.Struct(">I")
_WEBP_CHUNK = struct.Struct("<4sI")
# Start of frame: all of C0 to CF but the tables (C4), a reserved one (C8) and arithmetic conditioning (CC).
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# Markers that stand alone: restarts and TEM.
_ALONE = frozenset((*range(0xD0, 0xD8), 0x01))
_MARKER = re.compile(rb"\xff[^\x00\xff]")
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
# Chunks of a PNG with a text or profile that may be compressed.
_COMPRESSED = (b"zTXt", b"iCCP", b"iTXt")


class ImageFacts(NamedTuple):
    """Size as stored (before any rotation), and whether it holds more than one frame."""

    width: int
    height: int
    animated: bool = False


def probe(data: bytes) -> ImageFacts:
    """Facts of a JPEG, PNG or WebP, by content. Raises SampleError: broken, cut short, or outside the limits."""
    if not data:
        raise SampleError("image_empty")
    try:
        if data.startswith(_PNG):
            return _png(data)
        if data.startswith(_JPEG):
            return _jpeg(data)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _webp(data)
    except (IndexError, zlib.error):
        raise SampleError("image_corrupt") from None
    raise SampleError("image_corrupt")


def _checked(width: int, height: int) -> ImageFacts:
    if not width or not height:
        raise SampleError("image_corrupt")
    if width * height > MAX_PIXELS:
        raise SampleError("image_too_large")
    if min(width, height) < MIN_SIDE:
        raise SampleError("image_too_small")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise SampleError("image_aspect")
    return ImageFacts(width, height)


def _png(data: bytes) -> ImageFacts:
    facts, position, animated, has_pixels, pieces = None, len(_PNG), False, False, 0
    view, size = memoryview(data), len(data)
    while position + CHUNK.size <= size:
        pieces += 1
        if pieces > _MAX_PIECES:
            raise SampleError("image_corrupt")
        length, kind = CHUNK.unpack_from(data, position)
        body, end = position + 8, position + 12 + length
        if facts is None:
            # Judged first: what is too large or too small is so however it goes on.
            if kind != b"IHDR" or length != 13:
                raise SampleError("image_truncated" if size < 33 else "image_corrupt")
            facts = _checked(_integer(data, body, 4, "big"), _integer(data, body + 4, 4, "big"))
        if end > size:
            break
        if zlib.crc32(view[position + 4 : end - 4]) != CHECKSUM.unpack_from(data, end - 4)[0]:
            raise SampleError("image_corrupt")
        if kind == b"IDAT":
            has_pixels = True
        elif kind == b"tRNS" and data[24:26] == _DEEP_COLOUR:
            # Which of the pixels are meant only their lower bits tell, which decoders drop.
            raise SampleError("image_transparency")
        elif kind == b"IEND":
            if not has_pixels:
                raise SampleError("image_corrupt")
            return facts._replace(animated=animated)
        elif kind in _COMPRESSED:
            _refuse_bomb(kind, data[body : end - 4])
        elif kind == b"acTL":
            animated = True
        position = end
    raise SampleError("image_truncated")


def _refuse_bomb(kind: bytes, body: bytes) -> None:
    _, _, rest = body.partition(b"\0")
    if kind == b"iTXt":
        if rest[:1] != b"\1":
            return
        # A flag and a method, then language and translated keyword, each up to a zero.
        rest = rest[2:].partition(b"\0")[2].partition(b"\0")[2]
    else:
        # A method.
        rest = rest[1:]
    inflater = zlib.decompressobj()
    try:
        inflated = inflater.decompress(rest, MAX_METADATA)
    except zlib.error:
        # Not needed for the pixels, and decoders pass over it.
        return
    if len(inflated) >= MAX_METADATA:
        raise SampleError("image_metadata_bomb")


def _jpeg(data: bytes) -> ImageFacts:
    facts, position, pieces = None, 2, 0
    while position + 4 <= len(data):
        if data[position] != 0xFF or data[position + 1] in (0x00, 0xFF):
            # Between markers libjpeg passes over whatever stands there.
            found = _MARKER.search(data, position + 1)
            if found is None:
                break
            position = found.start()
            continue
        pieces += 1
        if pieces > _MAX_PIECES:
            raise SampleError("image_corrupt")
        marker = data[position + 1]
        if marker in _ALONE:
            position += 2
            continue
        length = int.from_bytes(data[position + 2 : position + 4])
        if marker in _FRAMES:
            height, width = (_integer(data, position + at, 2, "big") for at in (5, 7))
            facts = _checked(width, height)
        if marker == _START_OF_SCAN:
            if facts is None:
                raise SampleError("image_corrupt")
            # Inside a scan FF is always followed by 00 or a restart, so this is no pixel.
            if data.find(b"\xff\xd9", position + 2 + length) < 0:
                raise SampleError("image_truncated")
            return facts
        if length < 2 or marker == _END_OF_IMAGE:
            raise SampleError("image_corrupt")
        position += 2 + length
    raise SampleError("image_truncated")


def _webp(data: bytes) -> ImageFacts:
    facts, position, animated, has_pixels, pieces = None, 12, False, False, 0
    end = 8 + int.from_bytes(data[4:8], "little")
    while position + 8 <= min(end, len(data)):
        pieces += 1
        if pieces > _MAX_PIECES:
            raise SampleError("image_corrupt")
        kind, length = _WEBP_CHUNK.unpack_from(data, position)
        body = position + 8
        if kind == b"VP8X" and facts is None:
            width, height = (1 + _integer(data, body + at, 3, "little") for at in (4, 7))
            animated = bool(data[body] & 2)
            facts = _checked(width, height)
        elif kind == b"VP8 " and facts is None:
            if data[body + 3 : body + 6] != b"\x9d\x01\x2a":
                raise SampleError("image_corrupt")
            width, height = (_integer(data, body + at, 2, "little") & 0x3FFF for at in (6, 8))
            facts = _checked(width, height)
        elif kind == b"VP8L" and facts is None:
            if data[body] != 0x2F:
                raise SampleError("image_corrupt")
            bits = _integer(data, body + 1, 4, "little")
            facts = _checked((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
        has_pixels |= kind in (b"VP8 ", b"VP8L", b"ANMF")
        position = body + length + (length & 1)
    if facts is None:
        raise SampleError("image_truncated" if end > len(data) else "image_corrupt")
    if end > len(data) or position > len(data) + 1:
        raise SampleError("image_truncated")
    if not has_pixels:
        raise SampleError("image_corrupt")
    return facts._replace(animated=animated)


def _integer(data: bytes, position: int, count: int, order: Literal["little", "big"]) -> int:
    if position + count > len(data):
        raise SampleError("image_truncated")
    return int.from_bytes(data[position : position + count], order)
