"""Offsets that 32 bits cannot hold: views on more than 2^31 elements of memory that is mostly never touched.

The strides themselves fit into 32 bits, so that it is the kernels that must widen them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from transfusion_kernels import (
    IntervalMask,
    append_to_kvcache,
    interval_attention,
    interval_attention_with_kvcache,
)
from transfusion_kernels.verification.testing import exact_attention, mask_of, relative_error

FAR = 2**30 + 64
WIDTH = 32
INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["triton"] if INTERPRETS else ["cpu", "reference"]


@pytest.fixture
def far() -> Iterator[Tensor]:
    """Float16 numbers that reach far beyond 2^31; pages that no one writes to take no memory."""
    yield torch.empty(6 * FAR, dtype=torch.float16)


def spread(far: Tensor, shape: tuple[int, int, int, int], along: int, begin: int) -> Tensor:
    """A view [B, H, S, D] from `begin` on, of which dimension `along` reaches beyond 2^31 elements."""
    strides = [shape[1] * shape[2] * WIDTH, shape[2] * WIDTH, WIDTH, 1]
    strides[along] = FAR
    return far.as_strided(shape, strides, begin).copy_(torch.randn(shape))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("along", [0, 1, 2])
def test_training(far: Tensor, along: int, backend: str) -> None:
    size = [20, 20, 3][along]
    begins = [begin * 9 * size * WIDTH for begin in range(3)]
    q, k, v = (spread(far, (3, 3, size, WIDTH), along, begin).requires_grad_() for begin in begins)
    mask = mask_of(size, [(0, size // 2), (size // 2, size)], [(size // 2, size)])
    grad_out = torch.randn(3, 3, size, WIDTH, dtype=torch.float16)
    exact, _, exact_gradients = exact_attention(q, k, v, mask, grad_out)
    out = interval_attention(q, k, v, mask, backend=backend)
    gradients = torch.autograd.grad(out, (q, k, v), grad_out)
    for ours, right in zip((out, *gradients), (exact, *exact_gradients), strict=True):
        assert relative_error(ours, right) < 2e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_paged", [False, True])
@pytest.mark.parametrize("along", [0, 1, 2])
def test_cache(far: Tensor, along: int, is_paged: bool, backend: str) -> None:
    """What is appended to a cache that reaches beyond 2^31 is what is read from it."""
    slots, new = [20, 20, 4][along], 3
    k_cache, v_cache = (
        spread(far, (3, 3, slots, WIDTH), along, begin * 9 * slots * WIDTH) for begin in range(2)
    )
    table = torch.tensor([[2], [0], [1]], dtype=torch.int32) if is_paged else None
    k, v = torch.randn(2, 3, 3, new, WIDTH, dtype=torch.float16).unbind()
    position = (torch.arange(new) + slots - new).expand(3, -1)
    append_to_kvcache(k, v, k_cache, v_cache, position, block_table=table)
    order = [2, 0, 1] if is_paged else [0, 1, 2]
    k_rows, v_rows = k_cache[order].clone(), v_cache[order].clone()
    assert torch.equal(k_rows[:, :, -new:], k)
    assert torch.equal(v_rows[:, :, -new:], v)
    q = spread(far, (3, 6, new, WIDTH), along, 18 * slots * WIDTH)
    mask = IntervalMask(torch.zeros(3, new, dtype=torch.int32), (position + 1).int(), num_keys=slots)
    exact, _, _ = exact_attention(q, k_rows, v_rows, mask, torch.zeros_like(q))
    for parts in (1, 2):
        out = interval_attention_with_kvcache(
            q, k_cache, v_cache, mask, block_table=table, num_splits=parts, backend=backend
        )
        assert relative_error(out, exact) < 1e-3


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETS, reason="starts the interpreter's own")
def test_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", str(Path(__file__)), "-q", "-p", "no:cacheprovider"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
