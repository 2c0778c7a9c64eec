"""Counter-based Gaussian noise: a function of (key, element), the same on every device, rank and batch size.

I images; arithmetic is modulo 2^64 in int64, so wrap-around is meant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# splitmix64 (Steele, Lea and Flood, 2014), constants as signed 64-bit integers.
_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """A Python integer wrapped into the range of int64; tensors wrap by themselves, Python's do not."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def counter_normal(key_I: Tensor, shape: Sequence[int], *, stream: int = 0) -> Tensor:
    """Standard normal fp32 [I, *shape]: image i's noise depends on key_I[i] (int64) and `stream` alone.

    Box-Muller on two uniforms from one hashed counter each; `stream` separates the draws of one key, such as
    the steps of a sampler.
    """
    elements = math.prod(shape)
    pairs = (elements + 1) // 2
    counter = torch.arange(2 * pairs, device=key_I.device, dtype=torch.int64)
    seed_I = _mix(_mix(key_I.to(torch.int64)) + _signed((stream + 1) * _GAMMA))
    bits = _mix(seed_I[:, None] + (counter + 1) * _GAMMA)
    # 53 random bits; the half keeps the logarithm finite.
    uniform = (_shift_right(bits, 11).double() + 0.5) * 2.0**-53
    radius = (-2.0 * uniform[:, :pairs].log()).sqrt()
    angle = (2.0 * math.pi) * uniform[:, pairs:]
    normal = torch.cat((radius * angle.cos(), radius * angle.sin()), dim=1)[:, :elements]
    return normal.float().view(-1, *shape)
