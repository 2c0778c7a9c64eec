"""Others' public bugs that only a GPU can show: races, illegal accesses, and what a compiler for it makes of a mask.

`test_public_bugs.py` names them. An illegal access ends the process's use of the GPU, so what looks for one comes last:
where it fails, run `-k head_dim_32` alone.
"""

from __future__ import annotations

import pytest
import torch
from public_bugs import (
    FILLS,
    NAMES,
    attend,
    attend_between_guards,
    bounds_of_documents,
    changed_outside,
    differing,
    errors,
    inputs_for,
    whole_tiles,
)
from torch import Tensor

from transfusion_kernels import IntervalMask
from transfusion_kernels.attention.layout import TILE_ROWS
from transfusion_kernels.verification.testing import mask_of, poisoned_memory, relative_error

DEVICE = "cuda"
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="needs a GPU of compute capability 9",
)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# Whose kernels, and whether gradients must have the same bits on every run.
KERNELS = pytest.mark.parametrize(
    ("implementation", "deterministic"),
    [("triton", False), ("triton", True), pytest.param("hopper", False, marks=needs_hopper)],
)
BARS = {torch.float32: 5e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def moved(mask: IntervalMask) -> IntervalMask:
    return mask.to(DEVICE)


@KERNELS
@HALF
@pytest.mark.parametrize("name", ["causal", "image"])
def test_gradients_at_head_dim_64_have_the_right_size(
    name: str, dtype: torch.dtype, implementation: str, deterministic: bool
) -> None:
    """flash-attention #2623: with the tiles of wide intervals, over many of them."""
    images = [(100, 1200), (1300, 2600)] if name == "image" else []
    mask = moved(mask_of(2700, [(0, 2700)], images))
    assert not mask.narrow
    inputs = inputs_for(mask, 64, group=2, dtype=dtype)
    with poisoned_memory():
        results = attend(implementation, inputs, mask, deterministic=deterministic)
    assert max(errors(results, inputs, mask).values()) < BARS[dtype]


@KERNELS
@pytest.mark.parametrize("width", [64, 128])
def test_a_thousand_backwards_in_a_row_read_only_their_own(
    width: int, implementation: str, deterministic: bool
) -> None:
    """flash-attention #2756, which showed in one launch of a hundred to a thousand.

    Two inputs take turns and memory is poisoned. What a launch reads too early is then never what it would have read,
    left there by the launch before. Nothing waits for the device, so that launches follow as closely as they can.
    """
    mask = moved(mask_of(2000, [(0, 900), (900, 2000)], [(100, 600), (950, 1300)]))
    turns = [inputs_for(mask, width, group=2, dtype=torch.bfloat16, seed=seed) for seed in range(2)]
    turns[1] = tuple(3 * x for x in turns[1])  # type: ignore[assignment]
    with poisoned_memory():
        first = [attend(implementation, inputs, mask, deterministic=deterministic) for inputs in turns]
        for results, inputs in zip(first, turns, strict=True):
            assert max(errors(results, inputs, mask).values()) < BARS[torch.bfloat16]
        differences: list[Tensor] = []
        for turn in range(1000):
            again = attend(implementation, turns[turn % 2], mask, deterministic=deterministic)
            pairs = zip(again, first[turn % 2], strict=True)
            differences.append(torch.stack([(ours.float() - right.float()).norm() for ours, right in pairs]))
        worst = dict(zip(NAMES, torch.stack(differences).amax(0).tolist(), strict=True))
    # The gradient of the queries is added up in any order, unless runs must agree.
    bar = 0.0 if deterministic else 1e-2 * min(float(results[1].float().norm()) for results in first)
    assert worst.pop("dq") <= bar
    assert worst == dict.fromkeys(worst, 0.0)


@KERNELS
def test_a_mask_with_nothing_to_hide_within_tiles_still_counts(
    implementation: str, deterministic: bool
) -> None:
    """pytorch #188322."""
    mask = moved(whole_tiles(4))
    inputs = inputs_for(mask, 64, group=2, dtype=torch.bfloat16)
    document = slice(TILE_ROWS, 2 * TILE_ROWS)
    others = changed_outside(inputs, document.start, document.stop, by=30.0)
    with poisoned_memory():
        results = attend(implementation, inputs, mask, deterministic=deterministic)
        again = attend(implementation, others, mask, deterministic=deterministic)
    assert max(errors(results, inputs, mask).values()) < BARS[torch.bfloat16]
    for name, ours, theirs in zip(NAMES, results, again, strict=True):
        ours, theirs = ours[:, :, document], theirs[:, :, document]
        # In tiles of half the size two programs add to a query, in any order.
        assert torch.equal(ours, theirs) or (name == "dq" and relative_error(ours, theirs) < 1e-2)


@pytest.mark.parametrize("mode", ["default", "max-autotune-no-cudagraphs"])
def test_a_compiled_mask_is_the_mask(mode: str) -> None:
    """lerobot #4179: one compilation for short rows of any length, and for rows whose sums are made in parts."""
    torch.compiler.reset()
    compiled = torch.compile(bounds_of_documents, fullgraph=True, dynamic=True, mode=mode)
    for seed, (rows, size) in enumerate([(3, 7), (2, 33), (4, 129), (2, 300), (4, 1025), (2, 5000)]):
        assert differing(compiled, seed, rows, size, DEVICE) == []


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [1, 31, 33, 130, 1000, 1537])
def test_nothing_outside_is_read_or_written_at_head_dim_32(
    size: int, dtype: torch.dtype, deterministic: bool
) -> None:
    """triton #10573, at lengths that no tile divides, with the tiles of narrow and of wide intervals."""
    mask = moved(mask_of(size, [(0, size // 8), (size // 8, size)], [(size // 8, size)]))
    assert mask.narrow == (size < 1500)
    for seed in range(10):
        inputs = inputs_for(mask, 32, group=2, dtype=dtype, seed=seed)
        with poisoned_memory():
            results, intact = attend_between_guards(
                "triton", inputs, mask, FILLS[seed % 2], deterministic=deterministic
            )
        assert intact
        assert max(errors(results, inputs, mask).values()) < BARS[dtype]
