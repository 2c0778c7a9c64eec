"""`interval_attention`: the public function, its argument checks, and the custom op under it.

Shape suffixes: B batch, H query heads, K key heads (H is a multiple of K), S queries, N keys, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transfusion_kernels import rivals
from transfusion_kernels.attention import cpu
from transfusion_kernels.attention.checks import check_arguments, checked_scale
from transfusion_kernels.attention.layout import IntervalMask
from transfusion_kernels.attention.reference import accumulation_dtype, reference_attention
from transfusion_kernels.attention.second import (
    add_gradient,
    check_second,
    merge,
    pick,
    places,
    validate_second,
)
from transfusion_kernels.dispatch import backward_implementation, choose

__all__ = ["check_arguments", "interval_attention"]


def interval_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: IntervalMask,
    *,
    second: tuple[Tensor, IntervalMask] | None = None,
    scale: float | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention in which each query sees the keys `[first_key, end_key)` of `mask`, and some a second interval.

    Args:
        q: Queries [B, H, S, D] of any floating dtype, with any strides, the last being 1.
        k: Keys [B, K, N, D], with dtype, device and strides as for `q`. H is a multiple of K.
        v: Values, of the shape of `k`.
        mask: Over S queries and N keys, with B rows or one that all share.
        second: Queries that see more keys, integers [B, M] or [1, M], each at most once in a row, and their mask over M
            queries and N keys. Its intervals share no key with those that the same queries have in `mask`, and where
            one is empty nothing is added. On a GPU none of this is checked, since nothing waits for the device there.
        scale: Of the scores, above 0. None takes 1 / sqrt(D).
        deterministic: Gradients with the same bits on every run. On a GPU this costs two more products backward. The
            other implementations always give them.
        return_lse: Return the log-sum-exp too.
        backend: "auto", "hopper", "triton", "cpu", "reference", "flex" or "cudnn", as in `explain`.

    Returns:
        The output [B, H, S, D] in the dtype of `q`, laid out as [B, S, H, D] so that joining the heads copies nothing.
            With `return_lse` also the natural log-sum-exp [B, H, S] of the scaled scores, without gradient. It is
            float32, or float64 for float64 inputs, and minus infinity where a query sees nothing.

    Raises:
        ValueError: With the argument's name, for shapes, dtypes and devices that do not fit, and on CPU tensors for
            bounds that `mask.validate` refuses. `mask.validate(k, v)` tells whether keys and values are finite.
    """
    check_arguments(q, k, v, mask)
    if second is not None:
        check_second(q, mask, *second)
    implementation = choose(backend, q).implementation
    scale = checked_scale(q, scale)
    if mask.device.type == "cpu" and not torch.compiler.is_compiling():
        if implementation != "cpu":
            mask.validate()  # the CPU implementation does so once for each new mask
        if second is not None:
            validate_second(mask, *second)
    if implementation == "reference":
        out, lse = reference_attention(q, k, v, mask, scale, second)
    elif implementation in rivals.NAMES:
        out, lse = rivals.attention(implementation, q, k, v, mask, scale, deterministic, second)
    else:
        needs_columns = implementation in ("hopper", "triton")
        rows, other = second or (None, None)
        out, lse = _interval_attention(
            q,
            k,
            v,
            *_tensors(mask, needs_columns),
            rows,
            *_tensors(other, needs_columns),
            scale,
            deterministic,
            needs_columns and mask.narrow,
            needs_columns and other is not None and other.narrow,
            implementation,
        )
    return (out, lse.detach()) if return_lse else out


def _tensors(mask: IntervalMask | None, needs_columns: bool) -> tuple[Tensor | None, ...]:
    """What the operators take of a mask: its bounds, and for GPUs what is derived from them."""
    if mask is None:
        return (None,) * 6
    if not needs_columns:
        return mask.first_key, mask.end_key, None, None, None, None
    return (
        mask.first_key,
        mask.end_key,
        mask.first_query,
        mask.end_query,
        mask.query_order,
        mask.key_order,
    )


def empty_heads(batch: int, heads: int, positions: int, like: Tensor) -> Tensor:
    """An uninitialised [B, H, S, D] laid out as [B, S, H, D], with the width, dtype and device of `like`."""
    return like.new_empty(batch, positions, heads, like.shape[-1]).transpose(1, 2)


@torch.library.custom_op("transfusion::interval_attention", mutates_args=())
def _interval_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first_key: Tensor,
    end_key: Tensor,
    first_query: Tensor | None,
    end_query: Tensor | None,
    query_order: Tensor | None,
    key_order: Tensor | None,
    rows: Tensor | None,
    second_first_key: Tensor | None,
    second_end_key: Tensor | None,
    second_first_query: Tensor | None,
    second_end_query: Tensor | None,
    second_query_order: Tensor | None,
    second_key_order: Tensor | None,
    scale: float,
    deterministic: bool,
    narrow: bool,
    second_narrow: bool,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    out, lse = _forward(q, k, v, (first_key, end_key, query_order), scale, narrow, implementation)
    if rows is None or rows.numel() == 0:
        return out, lse
    at = places(rows, q.shape[0], q.shape[2])
    second = (second_first_key, second_end_key, second_query_order)
    second_out, second_lse = _forward(pick(q, at), k, v, second, scale, second_narrow, implementation)
    return merge(out, lse, second_out, second_lse, at)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: tuple[Tensor | None, ...],
    scale: float,
    narrow: bool,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """One call of an implementation. mask: first_key, end_key and, on a GPU, query_order."""
    first_key, end_key, query_order = mask
    assert first_key is not None and end_key is not None
    if implementation == "cpu":
        return cpu.attention_forward(q, k, v, first_key, end_key, scale)
    assert query_order is not None
    if implementation == "hopper":
        from transfusion_kernels.attention import hopper

        return hopper.attention_forward(q, k, v, first_key, end_key, query_order, scale)
    from transfusion_kernels.attention.forward import attention_forward

    return attention_forward(q, k, v, first_key, end_key, query_order, scale, narrow)


@torch.library.custom_op("transfusion::interval_attention_backward", mutates_args=())
def _interval_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    first_key: Tensor,
    end_key: Tensor,
    first_query: Tensor | None,
    end_query: Tensor | None,
    query_order: Tensor | None,
    key_order: Tensor | None,
    rows: Tensor | None,
    second_first_key: Tensor | None,
    second_end_key: Tensor | None,
    second_first_query: Tensor | None,
    second_end_query: Tensor | None,
    second_query_order: Tensor | None,
    second_key_order: Tensor | None,
    scale: float,
    deterministic: bool,
    narrow: bool,
    second_narrow: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    mask = (first_key, end_key, first_query, end_query, query_order, key_order)
    dq, dk, dv = _backward(grad_out, q, k, v, out, lse, mask, scale, deterministic, narrow, implementation)
    if rows is None or rows.numel() == 0:
        return dq, dk, dv
    at = places(rows, q.shape[0], q.shape[2])
    named = (pick(x, at) for x in (grad_out, q, out, lse[..., None]))
    second = (
        second_first_key,
        second_end_key,
        second_first_query,
        second_end_query,
        second_query_order,
        second_key_order,
    )
    grad_named, q_named, out_named, lse_named = named
    more_q, more_k, more_v = _backward(
        grad_named, q_named, k, v, out_named, lse_named[..., 0].contiguous(), second, scale, deterministic,
        second_narrow, implementation,
    )  # fmt: skip
    return add_gradient(dq, more_q, at), dk.add_(more_k), dv.add_(more_v)


def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: tuple[Tensor | None, ...],
    scale: float,
    deterministic: bool,
    narrow: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """One call of an implementation. mask: the six tensors of `_tensors`."""
    first_key, end_key, first_query, end_query, query_order, key_order = mask
    assert first_key is not None and end_key is not None
    if implementation == "cpu":
        return cpu.attention_backward(grad_out, q, k, v, out, lse, first_key, end_key, scale)
    assert first_query is not None and end_query is not None
    assert query_order is not None and key_order is not None
    if backward_implementation(implementation, q.shape[-1], deterministic) == "hopper":
        from transfusion_kernels.attention import hopper

        return hopper.attention_backward(
            grad_out, q, k, v, out, lse, first_query, end_query, key_order, scale
        )
    from transfusion_kernels.attention.backward import attention_backward

    bounds = (first_key, end_key, first_query, end_query)
    return attention_backward(
        grad_out, q, k, v, out, lse, bounds, (query_order, key_order), scale, deterministic, narrow
    )


@_interval_attention.register_fake
def _forward_fake(q: Tensor, k: Tensor, v: Tensor, first_key: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    batch, heads, queries, _ = q.shape
    lse = q.new_empty(batch, heads, queries, dtype=accumulation_dtype(q.dtype))
    return empty_heads(batch, heads, queries, like=q), lse


@_interval_attention_backward.register_fake
def _backward_fake(grad_out: Tensor, q: Tensor, k: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, queries, _ = q.shape
    dq = empty_heads(batch, heads, queries, like=q)
    dk, dv = (empty_heads(batch, k.shape[1], k.shape[2], like=k) for _ in range(2))
    return dq, dk, dv


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, scale, deterministic, narrow, second_narrow, implementation = inputs
    q, k, v, *mask_tensors = tensors
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, *mask_tensors)
    ctx.mark_non_differentiable(lse)
    ctx.settings = (scale, deterministic, narrow, second_narrow, implementation)


def _gradients(ctx: Any, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = _interval_attention_backward(grad_out, *ctx.saved_tensors, *ctx.settings)
    return (*gradients, *(None for _ in range(18)))


def _no_second_derivatives(ctx: Any, *gradients: Tensor | None) -> None:
    raise RuntimeError(
        "interval_attention: got a second backward pass through its gradients, but its kernels have no second "
        "derivatives; backend='reference' has them"
    )


_interval_attention.register_autograd(_gradients, setup_context=_save_for_backward)
_interval_attention_backward.register_autograd(_no_second_derivatives)
