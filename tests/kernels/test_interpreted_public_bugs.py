"""Others' public bugs, looked for in the Triton kernels by Triton's interpreter. `test_public_bugs.py` names them.

Needs TRITON_INTERPRET=1, as `test_interpreted.py` does.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from public_bugs import (
    FILLS,
    Late,
    Noted,
    attend,
    attend_between_guards,
    changed_outside,
    errors,
    inputs_for,
    whole_tiles,
)
from torch import Tensor

from transfusion_kernels.attention.layout import TILE_ROWS
from transfusion_kernels.verification.testing import mask_of, poisoned_memory

triton = pytest.importorskip("triton", reason="triton is not installed")
import triton.language as tl  # noqa: E402

from transfusion_kernels.attention import backward, forward, rows, tiles  # noqa: E402
from transfusion_kernels.attention.tiles import Tile, Tiles  # noqa: E402

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(
        not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1 in a process of its own"
    ),
]
BAR = 5e-6
DETERMINISTIC = pytest.mark.parametrize("deterministic", [False, True])


def use_tiles(monkeypatch: pytest.MonkeyPatch, used: Tiles) -> None:
    for module in (forward, backward):
        monkeypatch.setattr(module, "tiles_for", lambda *_: used)


@DETERMINISTIC
@pytest.mark.parametrize("name", ["causal", "image"])
def test_gradients_at_head_dim_64_have_the_right_size(name: str, deterministic: bool) -> None:
    """flash-attention #2623."""
    images = [(10, 50), (60, 135)] if name == "image" else []
    mask = mask_of(140, [(0, 140)], images)
    inputs = inputs_for(mask, 64, group=2, batch=1)
    with poisoned_memory():
        results = attend("triton", inputs, mask, deterministic=deterministic)
    assert max(errors(results, inputs, mask).values()) < BAR


@DETERMINISTIC
def test_no_launch_overlaps_the_one_before_it(monkeypatch: pytest.MonkeyPatch, deterministic: bool) -> None:
    """flash-attention #2756."""
    launches: list[tuple[str, dict[str, Any]]] = []
    for name in ("_statistics_kernel", "_keys_kernel", "_queries_kernel"):
        monkeypatch.setattr(backward, name, Noted(name, getattr(backward, name), launches))
    mask = mask_of(40, [(0, 40)])
    attend("triton", inputs_for(mask, 32), mask, deterministic=deterministic)
    expected = ["_statistics_kernel", "_keys_kernel", "_queries_kernel"]
    assert [name for name, _ in launches] == expected[: 3 if deterministic else 2]
    assert not any(options.get("launch_pdl") for _, options in launches)


@pytest.mark.parametrize("late", ["statistics", "zeros"])
def test_a_backward_that_starts_early_is_noticed(monkeypatch: pytest.MonkeyPatch, late: str) -> None:
    statistics = Late(backward._statistics_kernel)
    if late == "statistics":
        monkeypatch.setattr(backward, "_statistics_kernel", statistics)
    else:
        monkeypatch.setattr(Tensor, "new_zeros", Tensor.new_empty)
    mask = mask_of(40, [(0, 40)])
    with poisoned_memory():
        results = attend("triton", inputs_for(mask, 32), mask)
    statistics.catch_up()
    assert bool(results[0].isfinite().all())
    assert bool(results[1].isnan().any())


def shipped_tiles() -> list[Tiles]:
    """Every set of tiles of the tables, those of like rows and steps once, as the interpreter sees no warps."""
    tables = [*tiles._EXACT.values(), *tiles._EXACT_CDNA.values(), *tiles._COMMON.values()]
    tables += itertools.chain.from_iterable(tiles._TABLE.values())
    found = {}
    for each in tables:
        shapes = [(tile.rows, tile.step) if tile else None for tile in vars(each).values()]
        found.setdefault(str(shapes), each)
    return list(found.values())


def sizes(each: Tiles) -> str:
    return "-".join(f"{tile.rows}x{tile.step}" if tile else "none" for tile in vars(each).values())


@DETERMINISTIC
@pytest.mark.parametrize("used", shipped_tiles(), ids=sizes)
def test_one_mask_serves_tiles_of_every_size(
    monkeypatch: pytest.MonkeyPatch, used: Tiles, deterministic: bool
) -> None:
    """flash-attention #2429: those of the forward and of the backward differ, and one mask is made for all of them."""
    use_tiles(monkeypatch, used)
    mask = mask_of(150, [(0, 20), (20, 150)], [(30, 140)], length=147)
    inputs = inputs_for(mask, 32, batch=1, heads=1)
    with poisoned_memory():
        results = attend("triton", inputs, mask, deterministic=deterministic)
    assert max(errors(results, inputs, mask).values()) < BAR


@pytest.mark.parametrize("rows_of_mask", [TILE_ROWS // 2, 2 * TILE_ROWS])
def test_a_mask_made_for_tiles_of_another_size_is_noticed(
    monkeypatch: pytest.MonkeyPatch, rows_of_mask: int
) -> None:
    mask = mask_of(300, [(0, 300)])
    with monkeypatch.context() as patched:
        patched.setattr("transfusion_kernels.attention.layout.TILE_ROWS", rows_of_mask)
        _ = mask.query_order, mask.key_order
    inputs = inputs_for(mask, 32, batch=1, heads=1)
    # Tiles past the last would be of a batch row past the last, whose memory is not ours.
    for order in (mask.query_order, mask.key_order):
        order.clamp_(max=-(-300 // TILE_ROWS) - 1)
    with poisoned_memory():
        results = attend("triton", inputs, mask)
    assert not max(errors(results, inputs, mask).values()) < 0.1


@DETERMINISTIC
def test_a_mask_with_nothing_to_hide_within_tiles_still_counts(deterministic: bool) -> None:
    """pytorch #188322."""
    mask = whole_tiles(2)
    inputs = inputs_for(mask, 32, batch=1, heads=1)
    document = slice(TILE_ROWS, 2 * TILE_ROWS)
    with poisoned_memory():
        results = attend("triton", inputs, mask, deterministic=deterministic)
        others = attend(
            "triton",
            changed_outside(inputs, document.start, document.stop, by=30.0),
            mask,
            deterministic=deterministic,
        )
    assert max(errors(results, inputs, mask).values()) < BAR
    for ours, again in zip(results, others, strict=True):
        assert torch.equal(ours[:, :, document], again[:, :, document])
        assert not torch.equal(ours, again)


# Those at which the accesses of #10573 were illegal: queries and keys of a step, whichever side a program owns.
WIDE_STEPS = [
    Tiles(Tile(32, 128, 4, 1), Tile(128, 32, 4, 1), Tile(128, 32, 4, 1), Tile(32, 128, 4, 1)),
    Tiles(Tile(64, 128, 4, 1), Tile(128, 64, 4, 1), Tile(128, 64, 4, 1), Tile(64, 128, 4, 1)),
]
DESCRIPTORS = pytest.mark.parametrize("descriptors", [True, False], ids=["descriptors", "pointers"])


def use_pointers(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (forward, backward):
        monkeypatch.setattr(module, "has_tma", lambda dtype: False)


@DETERMINISTIC
@DESCRIPTORS
@pytest.mark.parametrize(("size", "fill"), [(1, FILLS[0]), (33, FILLS[1]), (130, FILLS[0])])
@pytest.mark.parametrize("used", WIDE_STEPS, ids=sizes)
def test_nothing_outside_is_read_or_written_at_head_dim_32(
    monkeypatch: pytest.MonkeyPatch,
    used: Tiles,
    size: int,
    fill: float,
    descriptors: bool,
    deterministic: bool,
) -> None:
    """triton #10573, at lengths that no tile divides."""
    use_tiles(monkeypatch, used)
    if not descriptors:
        use_pointers(monkeypatch)
    mask = mask_of(size, [(0, size // 2), (size // 2, size)], [(size // 2, size)])
    inputs = inputs_for(mask, 32, group=2, batch=1)
    with poisoned_memory():
        results, intact = attend_between_guards("triton", inputs, mask, fill, deterministic=deterministic)
    assert intact
    assert max(errors(results, inputs, mask).values()) < BAR


@triton.jit
def _one_row_too_far(
    x, start, stride, size, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PADDED_WIDTH: tl.constexpr
):
    o_row = start + tl.arange(0, BLOCK)
    o_d = tl.arange(0, PADDED_WIDTH)
    pointers = x + o_row[:, None].to(tl.int64) * stride + o_d[None, :]
    return pointers, (o_row <= size)[:, None] & (o_d < WIDTH)[None, :]


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_an_access_one_row_too_far_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN is read from the guards and multiplied by a weight of 0, and what is written changes them."""
    use_pointers(monkeypatch)
    monkeypatch.setattr(rows, "_pointers", _one_row_too_far)
    mask = mask_of(33, [(0, 33)])
    inputs = inputs_for(mask, 32)
    with poisoned_memory():
        results, intact = attend_between_guards("triton", inputs, mask, FILLS[0])
    assert not intact
    assert not max(errors(results, inputs, mask).values()) < 0.1
