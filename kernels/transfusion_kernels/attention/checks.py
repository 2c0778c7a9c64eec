"""What every public function asks of its arguments: each refusal names the argument, what it got and what it takes.

Shapes, dtypes, devices and strides only: no value is looked at, so that nothing waits for a device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from transfusion_kernels.attention.layout import IntervalMask, check_tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_arguments(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask) -> None:
    """Raise ValueError, naming the argument, unless these can be attended with. Looks at no values."""
    check_queries(q)
    check_keys_and_values(q, ("k", k), ("v", v), batch=q.shape[0], rows="keys")
    check_mask(q, mask)
    if mask.num_keys != k.shape[2]:
        raise ValueError(f"mask: got num_keys {mask.num_keys}, takes the number of keys in k, {k.shape[2]}")


def check_queries(q: Tensor) -> None:
    """Raise ValueError unless these are queries."""
    check_tensor("q", q)
    if q.dim() != 4 or q.shape[1] == 0 or q.shape[3] == 0:
        raise ValueError(f"q: got shape {tuple(q.shape)}, takes [batch, heads, queries, head_dim]")
    if q.dtype not in DTYPES:
        raise ValueError(f"q: got {q.dtype}, takes a floating dtype, one of {DTYPES}")
    _check_last_stride("q", q)


def check_keys_and_values(
    q: Tensor,
    keys: tuple[str, Tensor],
    values: tuple[str, Tensor],
    *,
    batch: int | None,
    rows: str,
    like: str = "q",
) -> None:
    """Raise ValueError unless these keys and values, each given with its name, fit the queries.

    batch: their first dimension, or None where it counts pages. rows: what their third dimension counts. like: the
    name of `q`.
    """
    head_dim = q.shape[3]
    for name, tensor in (keys, values):
        check_tensor(name, tensor)
        if tensor.dim() != 4 or tensor.shape[3] != head_dim or batch not in (None, tensor.shape[0]):
            # Said here, and not before: a compiler that does not know the batch cannot write it down.
            first = "pages" if batch is None else batch
            raise ValueError(
                f"{name}: got shape {tuple(tensor.shape)}, takes [{first}, key heads, {rows}, {head_dim}] as {like} is "
                f"{tuple(q.shape)}"
            )
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name}: got {tensor.dtype}, takes {like}'s dtype, {q.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name}: got device {tensor.device}, takes {like}'s, {q.device}")
    (key_name, k), (value_name, v) = keys, values
    if v.shape != k.shape:
        raise ValueError(f"{value_name}: got shape {tuple(v.shape)}, takes {key_name}'s, {tuple(k.shape)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] != 0:
        raise ValueError(
            f"{key_name}: got {k.shape[1]} heads, takes a number that divides {like}'s {q.shape[1]}"
        )
    for name, tensor in (keys, values):
        _check_last_stride(name, tensor)


def check_mask(q: Tensor, mask: IntervalMask) -> None:
    """Raise ValueError unless the mask has these queries."""
    if not isinstance(mask, IntervalMask):
        raise ValueError(f"mask: got {type(mask).__name__}, takes an IntervalMask")
    batch, _, queries, _ = q.shape
    if mask.first_key.shape[0] not in (1, batch) or mask.first_key.shape[1] != queries:
        raise ValueError(
            f"mask: got bounds of shape {tuple(mask.first_key.shape)}, takes [{batch} or 1, {queries}] as q is "
            f"{tuple(q.shape)}"
        )
    if mask.device != q.device:
        raise ValueError(f"mask: got device {mask.device}, takes q's, {q.device}")


def checked_scale(q: Tensor, scale: float | None) -> float:
    """The scale of the scores, 1 / sqrt(head_dim) unless given. Raises ValueError for what cannot be one."""
    if scale is None:
        return float(q.shape[-1] ** -0.5)
    # The kernels scale the maxima of the scores rather than the scores, so its sign matters.
    if not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise ValueError(
            f"scale: got {scale!r}, takes a finite number above 0, or None for 1 / sqrt(head_dim)"
        )
    return float(scale)


def refuse_gradients(*named: tuple[str, Tensor], why: str) -> None:
    """Raise ValueError if gradients are on and one of these tensors, given with its name, asks for one."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in named:
        if tensor.requires_grad:
            raise ValueError(f"{name}: got a tensor that requires a gradient, takes one without, for {why}")


def _check_last_stride(name: str, tensor: Tensor) -> None:
    if tensor.shape[3] > 1 and tensor.stride(3) != 1:
        raise ValueError(f"{name}: got last stride {tensor.stride(3)}, takes a contiguous last dimension")
