"""Columns and facts in one safetensors file, which is mapped.

Written here, since the library reads whole tensors into memory. Any reader of safetensors opens the file: the facts are
JSON under `facts` of its metadata, beside a CRC-32 of each column and a digest of all that the header says.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys
import weakref
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from transfusion.files import atomic_file, digest

_TYPES = {
    f"{kind}{8 * size}": f"<{code}{size}" for kind, code in (("U", "u"), ("I", "i")) for size in (1, 2, 4, 8)
}
_NAMES = {np.dtype(code): name for name, code in _TYPES.items()}
_ALIGNMENT = 8
_MAX_HEADER_BYTES = 1 << 24


class DamagedFile(Exception):  # noqa: N818  (no mistake of the program: the file must be made anew)
    """The file is cut short or was changed, or it is none of this kind."""


class Column(NamedTuple):
    """Where a column stands in the file."""

    dtype: np.dtype[Any]
    length: int
    offset: int
    checksum: int

    def values(self, file: Any) -> NDArray[Any]:
        """The column [N] of a mapped file, read from the disk where it is used."""
        if not self.length:
            return np.empty(0, self.dtype)
        values: NDArray[Any] = np.frombuffer(file, self.dtype, self.length, self.offset)
        values.flags.writeable = False
        return values


def map_file(stream: BinaryIO) -> Any:
    """All bytes of an open file as a buffer, read where they are used. It needs no descriptor once it is mapped.

    Python's own mapping keeps one until Python 3.13, and thousands of shards are more than a process may have.
    """
    if sys.version_info >= (3, 13):
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ, trackfd=False)
    size = os.fstat(stream.fileno()).st_size
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, stream.fileno(), 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), stream.name)
    buffer = (ctypes.c_ubyte * size).from_address(address)
    # Arrays over the buffer keep it.
    weakref.finalize(buffer, libc.munmap, address, size)
    return buffer


def write_columns(path: Path, columns: Mapping[str, NDArray[Any]], facts: Mapping[str, Any]) -> None:
    """Write little-endian integer columns [N], which may be mapped files, and plain facts, atomically."""
    # The widest first: then each begins where its type may be read.
    ordered = sorted(columns.items(), key=lambda column: -column[1].itemsize)
    places, offset = {}, 0
    for name, values in ordered:
        end = offset + values.nbytes
        places[name] = {"dtype": _NAMES[values.dtype], "shape": [len(values)], "data_offsets": [offset, end]}
        offset = end
    checksums = {name: zlib.crc32(values.data) for name, values in ordered}
    metadata = {"facts": json.dumps(facts), "checksums": json.dumps(checksums)}
    header = {"__metadata__": {**metadata, "digest": _digest(metadata, places)}, **places}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with atomic_file(path) as unfinished, unfinished.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, values in ordered:
            stream.write(values.data)


def read_header(stream: BinaryIO) -> tuple[dict[str, Any], dict[str, Column]]:
    """The facts, and where the columns stand, of an open file. Raises OSError, and DamagedFile."""
    size, length = int.from_bytes(stream.read(8), "little"), os.fstat(stream.fileno()).st_size
    text = stream.read(size) if size <= _MAX_HEADER_BYTES else b""
    try:
        places = json.loads(text)
        metadata = places.pop("__metadata__")
        if metadata.pop("digest") != _digest(metadata, places):
            raise DamagedFile
        facts, checksums = json.loads(metadata["facts"]), json.loads(metadata["checksums"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DamagedFile from None
    begin = 8 + size
    columns = {
        name: Column(
            np.dtype(_TYPES[place["dtype"]]),
            place["shape"][0],
            begin + place["data_offsets"][0],
            checksums[name],
        )
        for name, place in places.items()
    }
    if length != begin + max((place["data_offsets"][1] for place in places.values()), default=0):
        raise DamagedFile
    return facts, columns


def _digest(metadata: dict[str, str], places: dict[str, Any]) -> str:
    return digest(json.dumps([metadata, places]).encode())
