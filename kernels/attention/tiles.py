"""Tile sizes of the Triton kernels: a table, looked up; nothing is tuned while a program runs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from transfusion_kernels.attention.layout import TILE_ROWS


@dataclass(frozen=True)
class Tile:
    """The rows that one program owns, the rows of the other side that it takes at a time, and how it is compiled.

    `rows` divides `layout.TILE_ROWS`; both are powers of two, 16 or more.
    """

    rows: int
    step: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        if TILE_ROWS % self.rows:
            raise ValueError(f"rows: got {self.rows}, takes a divisor of {TILE_ROWS}")


@dataclass(frozen=True)
class Tiles:
    """The tiles of the forward (queries x keys), the fused and the split backward for keys and values
    (keys x queries), and the split backward for queries (queries x keys)."""

    forward: Tile
    fused: Tile
    keys: Tile
    queries: Tile


_SMALL = Tiles(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1))
_MIDDLE = Tiles(Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(64, 32, 4, 2))
_AMPERE_128 = Tiles(Tile(128, 64, 8, 2), Tile(64, 32, 4, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2))
_HOPPER_64 = Tiles(Tile(128, 64, 4, 3), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2))
_HOPPER_128 = Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2))
_WIDE = Tiles(Tile(64, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1))

# By (major compute capability, padded head width), for 16-bit inputs. What is not listed runs on _MIDDLE, or _WIDE
# for heads of 256.
_TABLE = {
    (8, 64): Tiles(Tile(128, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    (8, 128): _AMPERE_128,
    (9, 32): _HOPPER_64,
    (9, 64): _HOPPER_64,
    (9, 128): _HOPPER_128,
}


def tiles_for(device: torch.device, padded_width: int, dtype: torch.dtype) -> Tiles:
    """The tiles for heads padded to `padded_width` on `device`. On a CPU, for the interpreter, the smallest."""
    if device.type == "cpu":
        return _SMALL
    if dtype == torch.float32:  # twice the bytes a tile, and no tensor cores in IEEE arithmetic
        return _WIDE if padded_width > 128 else _SMALL
    return _TABLE.get((_major_capability(device), padded_width), _WIDE if padded_width > 128 else _MIDDLE)


@cache
def _major_capability(device: torch.device) -> int:
    return 0 if torch.version.hip else torch.cuda.get_device_capability(device)[0]
