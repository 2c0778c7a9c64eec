"""Kernels of others behind the same operator, for those who ask for them by name.

`flex` is PyTorch's FlexAttention. `cudnn` is NVIDIA's `cudnn.flex_attention`, from the optional package
nvidia-cudnn-frontend. Both must plan for a mask before they attend, which the kernels of this package need not. A plan
is kept with its mask, so that all layers share it.
"""

from __future__ import annotations

from torch import Tensor

from transfusion_kernels.attention.layout import IntervalMask
from transfusion_kernels.rivals import cudnn, flex

__all__ = ["NAMES", "attention", "problem"]

NAMES = ("flex", "cudnn")


def problem(name: str, q: Tensor) -> str:
    """Tell why a rival cannot run for these queries.

    Args:
        name: One of `NAMES`.
        q: Queries [B, H, S, D], of which the device, the dtype and the shape count.

    Returns:
        The reason, with what to do about it. Nothing if the rival can run.
    """
    return flex.problem(q) if name == "flex" else cudnn.problem(q)


def attention(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: IntervalMask,
    scale: float,
    deterministic: bool,
    second: tuple[Tensor, IntervalMask] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend with a rival.

    Args:
        name: One of `NAMES`.
        q: Queries [B, H, S, D].
        k: Keys [B, K, N, D].
        v: Values, of the shape of `k`.
        mask: Over S queries and N keys.
        scale: Of the scores.
        deterministic: Whether every run must give the same gradients. FlexAttention's always do.
        second: Queries that see more keys, and their mask, as in `interval_attention`.

    Returns:
        The output [B, H, S, D], differentiable, and the natural log-sum-exp [B, H, S], without gradient. A query that
        sees nothing gets 0 and minus infinity.
    """
    if name == "flex":
        return flex.attention(q, k, v, mask, scale, second)
    return cudnn.attention(q, k, v, mask, scale, second, deterministic=deterministic)
