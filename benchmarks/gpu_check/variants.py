"""Variants of the kernels that can be had without editing them: other tiles, other rings, other heads side by side."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

from transfusion_kernels.attention import hopper, tiles
from transfusion_kernels.attention.hopper import Ring
from transfusion_kernels.attention.tiles import Tile


@dataclass(frozen=True)
class Variant:
    """One way to compute attention.

    Attributes:
        name: What it is called.
        implementation: "hopper" or "triton". On a CPU also "cpu", for rehearsals.
        head_dim: Width of a head.
        deterministic: Which backward.
        tiles: Fields of `tiles.Tiles` for wide intervals that differ.
        forward: The ring of the Hopper forward, if another.
        backward: That of the backward.
        together: How many heads are taken side by side, if divisible. As the kernels choose if 0.
        a_program_each: Whether each tile of the Hopper forward has a program of its own.
    """

    name: str
    implementation: str
    head_dim: int
    deterministic: bool = False
    tiles: dict[str, Tile | None] = field(default_factory=dict)
    forward: Ring | None = None
    backward: Ring | None = None
    together: int = 0
    a_program_each: bool = False


def _tile(tile: Tile) -> str:
    return f"{tile.rows}x{tile.step} w{tile.warps} s{tile.stages}"


def _forward(head_dim: int, tile: Tile) -> Variant:
    return Variant(f"triton {head_dim}, forward {_tile(tile)}", "triton", head_dim, tiles={"forward": tile})


def _fused(head_dim: int, tile: Tile | None) -> Variant:
    name = f"triton {head_dim}, fused {_tile(tile) if tile else 'off'}"
    return Variant(name, "triton", head_dim, tiles={"fused": tile})


def _split(head_dim: int, field: str, tile: Tile) -> Variant:
    name = f"triton {head_dim}, {field} {_tile(tile)}"
    return Variant(name, "triton", head_dim, deterministic=True, tiles={field: tile})


# As they are shipped, and then the largest gain predicted first.
VARIANTS = (
    Variant("hopper 128", "hopper", 128),
    Variant("hopper 128, a program for every tile", "hopper", 128, a_program_each=True),
    Variant("hopper 128, all heads together", "hopper", 128, together=16),
    Variant("hopper 128, 4 heads together", "hopper", 128, together=4),
    Variant("triton 128", "triton", 128),
    _fused(128, Tile(64, 64, 4, 2)),
    _fused(128, Tile(64, 64, 8, 2)),
    _forward(128, Tile(64, 64, 4, 2)),
    _forward(128, Tile(128, 64, 8, 3)),
    Variant("triton 128, all heads together", "triton", 128, together=16),
    Variant("hopper 128, ring of 64 x 4 forward", "hopper", 128, forward=Ring(64, 4)),
    Variant("hopper 64", "hopper", 64),
    Variant("hopper 64, all heads together", "hopper", 64, together=32),
    Variant("hopper 64, ring of 64 x 4 forward", "hopper", 64, forward=Ring(64, 4)),
    Variant("hopper 64, ring of 64 x 3 backward", "hopper", 64, backward=Ring(64, 3)),
    Variant("triton 64", "triton", 64),
    _fused(64, None),
    _fused(64, Tile(64, 64, 4, 3)),
    _forward(64, Tile(128, 128, 8, 3)),
    _forward(64, Tile(64, 128, 4, 3)),
    _split(128, "keys", Tile(128, 32, 8, 2)),
)


@contextlib.contextmanager
def applied(variant: Variant) -> Iterator[None]:
    """The kernels are launched as the variant says, by this process and as long as this lasts."""
    with contextlib.ExitStack() as stack:
        if variant.tiles:
            key = "sm_90", variant.head_dim
            wide, narrow = tiles._TABLE[key]
            fields: dict[str, Any] = dict(variant.tiles)
            changed = replace(wide, **fields)
            stack.enter_context(mock.patch.dict(tiles._TABLE, {key: (changed, narrow)}))
        for table, ring in ((hopper.FORWARD, variant.forward), (hopper.BACKWARD, variant.backward)):
            if ring:
                stack.enter_context(mock.patch.dict(table, {variant.head_dim: ring}))
        if variant.together:
            stack.enter_context(mock.patch.multiple(tiles, CACHE_BYTES=0, LEAST_TOGETHER=variant.together))
        if variant.a_program_each:
            stack.enter_context(mock.patch.object(hopper, "processors", lambda device: sys.maxsize))
        yield
