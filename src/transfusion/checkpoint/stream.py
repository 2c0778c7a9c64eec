"""Writes safetensors files one tensor at a time, with their digest, so that no copy of all tensors is needed.

The format: eight bytes of header length, a JSON header with dtype, shape and byte range of each tensor, then
the bytes. Files are read with the safetensors library.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from transfusion.checkpoint.layout import FileRecord
from transfusion.files import hasher

_FLOAT_BYTES = 4
_ALIGNMENT = 8


def write_tensors(
    path: Path,
    shapes: Mapping[str, Sequence[int]],
    read: Callable[[str], Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
) -> FileRecord:
    """Write fp32 tensors of the given shapes, calling `read(name)` for each in turn, and fsync the file."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, shape in shapes.items():
        size = _FLOAT_BYTES * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    digest = hasher()
    written = 0
    with path.open("wb") as file:

        def write(block: bytes | memoryview) -> None:
            nonlocal written
            digest.update(block)
            written += file.write(block)

        write(len(text).to_bytes(8, "little"))
        write(text)
        for name, shape in shapes.items():
            tensor = read(name).detach().float().cpu().contiguous()
            if tensor.numel() != math.prod(shape):
                raise ValueError(f"{name}: got {tensor.numel()} elements for shape {tuple(shape)}")
            if tensor.numel():
                write(tensor.flatten().numpy().data.cast("B"))
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(bytes=written, blake2b=digest.hexdigest())
