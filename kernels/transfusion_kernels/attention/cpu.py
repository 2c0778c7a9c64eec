"""The CPU implementation: PyTorch's flash attention for CPUs, on the parts of the mask that it can take.

Packed rows are cut into their documents, and documents of like length gathered into one call: short ones with a
small explicit mask each, long ones with the causal flag, which skips the hidden half. What the tokens of a long
document's images see beyond themselves is a second call over all images of one length, merged by log-sum-exp. A
flash backward that is given the merged output and log-sum-exp is exact for its own keys, so that the gradients of
the calls add. No tensor is [S, S] over a row.

Other masks (a block of queries against a cache, a sliding window) are cut into blocks of queries, each against the
window of keys that it sees.

Shape suffixes: B batch, H query heads, K key heads, S queries, N keys, D head width; R = B * S rows of the batch,
C documents or images of one call, L their padded length, G = C * L slots; W keys of a window, Q its queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from transfusion_kernels.attention.cpu_plan import Bucket, Images, Plan, plan_for
from transfusion_kernels.attention.layout import validate_bounds
from transfusion_kernels.attention.reference import accumulation_dtype
from transfusion_kernels.attention.second import merge_rows

# The binding, since the operator's own call takes longer over its arguments.
flash_forward: Callable[..., tuple[Tensor, Tensor]] = torch._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

QUERY_BLOCK = 256
# PyTorch's backward for 16-bit types packs each block anew. Up to so many keys float32 is faster, up to five times.
SHORT = 256


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, first_key: Tensor, end_key: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The output [B, H, S, D], laid out as [B, S, H, D], and the log-sum-exp [B, H, S].

    Raises ValueError if the bounds are not those of an interval mask.
    """
    plan = _plan(q, k, first_key, end_key)
    if plan is None:
        return windowed_forward(q, k, v, first_key, end_key, scale)
    return _packed_forward(q, k, v, plan, scale)


def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    first_key: Tensor,
    end_key: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, laid out as [B, S, H, D], from what the forward returned."""
    if grad_out.stride(3) != 1:  # as of a sum, whose gradient is one expanded number
        grad_out = grad_out.contiguous()
    plan = _plan(q, k, first_key, end_key)
    if plan is None:
        return _windowed_backward(grad_out, q, k, v, out, lse, first_key, end_key, scale)
    return _packed_backward(grad_out, q, k, v, out, lse, plan, scale)


def _plan(q: Tensor, k: Tensor, first_key: Tensor, end_key: Tensor) -> Plan | None:
    if q.shape[2] == k.shape[2] and q.numel():
        return plan_for(first_key, end_key, q.shape[0])
    validate_bounds(first_key, end_key, k.shape[2])
    return None


# Packed rows


def _packed_forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
    batch, heads, size, _ = q.shape
    k, v = _each_query_head(k, heads), _each_query_head(v, heads)
    if plan.gathers:
        q, k, v = (_by_position(x) for x in (q, k, v))
    results: list[Tensor] = []
    for bucket in plan.buckets:
        inputs = (_documents(x, bucket) for x in (q, k, v))
        bias = _typed(bucket.bias, q)
        bucket_results = flash_forward(*inputs, 0.0, bias is None, attn_mask=bias, scale=scale)
        results = _collect(results, bucket_results, bucket, batch * size)
    out_RHD, lse_RH = (x[: batch * size] for x in results)
    if plan.empty_rows is not None:
        out_RHD.index_fill_(0, plan.empty_rows, 0.0)
        lse_RH.index_fill_(0, plan.empty_rows, float("-inf"))
    for images in plan.images:
        _merge_images(out_RHD, lse_RH, (_rows(q), _rows(k), _rows(v)), images, scale)
    out = out_RHD.view(batch, size, heads, -1).transpose(1, 2)
    return out, lse_RH.view(batch, size, heads).transpose(1, 2).contiguous()


def _merge_images(
    out_RHD: Tensor, lse_RH: Tensor, rows: tuple[Tensor, Tensor, Tensor], images: Images, scale: float
) -> None:
    """Add to the output and log-sum-exp of causal calls, in place, what images see beyond themselves."""
    q_RHD, k_RHD, v_RHD = rows
    query_rows_G = images.query_rows_G
    out, lse = flash_forward(
        _image(q_RHD, query_rows_G, images.count),
        _image(k_RHD, images.key_rows_G, images.count),
        _image(v_RHD, images.key_rows_G, images.count),
        0.0,
        False,
        attn_mask=_typed(images.bias, q_RHD),
        scale=scale,
    )
    merge_rows(out_RHD, lse_RH, _rows(out), _rows(lse), query_rows_G)


def _packed_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, size, _ = q.shape
    key_heads = k.shape[1]
    k, v = _each_query_head(k, heads), _each_query_head(v, heads)
    lse_BHS1 = lse[..., None]
    if plan.gathers:
        grad_out, q, k, v, out, lse_BHS1 = (_by_position(x) for x in (grad_out, q, k, v, out, lse_BHS1))
    results: list[Tensor] = []
    for bucket in plan.buckets:
        grad_b, q_b, k_b, v_b, out_b = (_documents(x, bucket) for x in (grad_out, q, k, v, out))
        lse_b = _documents(lse_BHS1, bucket)[..., 0]
        if bucket.padding is not None:  # then grad_b was gathered anew, and this changes no input
            _rows(grad_b).index_fill_(0, bucket.padding, 0.0)
        bias = _typed(bucket.bias, q)
        gradients = _flash_backward(grad_b, q_b, k_b, v_b, out_b, lse_b, bias, bias is None, scale)
        results = _collect(results, gradients, bucket, batch * size)
    sums_RHD = [x[: batch * size] for x in results]
    if plan.empty_rows is not None:
        for sum_RHD in sums_RHD:
            sum_RHD.index_fill_(0, plan.empty_rows, 0.0)
    for images in plan.images:
        rows = tuple(_rows(x) for x in (grad_out, q, k, v, out, lse_BHS1))
        _add_image_gradients(sums_RHD, rows, images, scale)
    dq, dk, dv = (x.view(batch, size, heads, -1).transpose(1, 2) for x in sums_RHD)
    return dq, _sum_query_heads(dk, key_heads), _sum_query_heads(dv, key_heads)


def _add_image_gradients(
    sums_RHD: list[Tensor], rows: tuple[Tensor, ...], images: Images, scale: float
) -> None:
    """Add to the gradients of causal calls, in place, those of what images see beyond themselves."""
    grad_RHD, q_RHD, k_RHD, v_RHD, out_RHD, lse_RH1 = rows
    query_rows_G, key_rows_G = images.query_rows_G, images.key_rows_G
    gradients = _flash_backward(
        _image(grad_RHD, query_rows_G, images.count),
        _image(q_RHD, query_rows_G, images.count),
        _image(k_RHD, key_rows_G, images.count),
        _image(v_RHD, key_rows_G, images.count),
        _image(out_RHD, query_rows_G, images.count),
        _image(lse_RH1, query_rows_G, images.count)[..., 0],
        _typed(images.bias, q_RHD),
        False,
        scale,
    )
    rows_of_each = (query_rows_G, key_rows_G, key_rows_G)
    for sum_RHD, rows_G, gradient in zip(sums_RHD, rows_of_each, gradients, strict=True):
        sum_RHD.index_add_(0, rows_G, _rows(gradient))


def _flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, ...]:
    """The gradients of q, k and v of one call, in their dtype."""
    inputs = [grad, q, k, v, out]
    if q.dtype.itemsize == 2 and k.shape[2] <= SHORT:
        inputs = [x.float() for x in inputs]
    gradients = _backward(*inputs, lse, 0.0, is_causal, attn_mask=bias, scale=scale)
    return tuple(gradient.to(q.dtype) for gradient in gradients)


def _documents(x_BHSD: Tensor, bucket: Bucket) -> Tensor:
    """[C, H, L, D]: the documents of a bucket."""
    if bucket.rows_G is None:
        return x_BHSD
    picked_GHD = _rows(x_BHSD).index_select(0, bucket.rows_G)
    return picked_GHD.unflatten(0, (bucket.documents, bucket.length)).transpose(1, 2)


def _image(x_RHD: Tensor, rows_G: Tensor, count: int) -> Tensor:
    """[C, H, L, D]: rows of `count` images."""
    return x_RHD.index_select(0, rows_G).unflatten(0, (count, -1)).transpose(1, 2)


def _by_position(x: Tensor) -> Tensor:
    """[B, H, S, ...] of which `_rows` is a view: the same where it is one already, else a copy."""
    if x.shape[0] == 1 or x.stride(0) == x.shape[2] * x.stride(2):
        return x
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _rows(x: Tensor) -> Tensor:
    """[B * S, H, ...] from [B, H, S, ...]."""
    return x.transpose(1, 2).flatten(0, 1)


def _collect(collected: list[Tensor], results: tuple[Tensor, ...], bucket: Bucket, rows: int) -> list[Tensor]:
    """The results of one call, [C, H, L, ...] each, put among those of the calls before, [rows + 1, H, ...].

    Rows that no call gives hold anything. Where one call gives all rows its results are not copied, unless PyTorch
    laid them out by heads, as it does for inputs that are.
    """
    if bucket.into_G is None:
        return [_rows(result).contiguous() for result in results]
    if not collected:
        collected = [x.new_empty(rows + 1, x.shape[1], *x.shape[3:]) for x in results]
    for target, result in zip(collected, results, strict=True):
        target.index_copy_(0, bucket.into_G, _rows(result))
    return collected


def _typed(bias: Tensor | None, like: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(accumulation_dtype(like.dtype))


def _each_query_head(x_BKND: Tensor, heads: int) -> Tensor:
    """[B, H, N, D]: keys or values repeated for the query heads that share them."""
    group = heads // x_BKND.shape[1]
    if group == 1:
        return x_BKND
    return x_BKND.transpose(1, 2).repeat_interleave(group, dim=2).transpose(1, 2)


def _sum_query_heads(gradient_BHND: Tensor, key_heads: int) -> Tensor:
    """[B, K, N, D]: the gradients of keys or values, summed over the query heads that share them."""
    if gradient_BHND.shape[1] == key_heads:
        return gradient_BHND
    return gradient_BHND.transpose(1, 2).unflatten(2, (key_heads, -1)).sum(3).transpose(1, 2)


# Any mask, in blocks of queries


@dataclass(frozen=True)
class _Window:
    """A block of queries and the keys that any of them sees.

    bias: [B or 1, 1, Q, W], or None where every query sees all of the window. empty: bool [B or 1, 1, Q], queries
    that see nothing, to which the bias shows everything because the softmax of nothing is NaN; or None.
    """

    queries: slice
    keys: slice
    bias: Tensor | None
    empty: Tensor | None


def windows(first_key: Tensor, end_key: Tensor, dtype: torch.dtype) -> Iterator[_Window]:
    if first_key.numel() == 0:
        return
    for start in range(0, first_key.shape[1], QUERY_BLOCK):
        queries = slice(start, start + QUERY_BLOCK)
        first_BQ, end_BQ = first_key[:, queries], end_key[:, queries]
        # The bounds never decrease along a row, so its extremes stand at its ends.
        low, high = int(first_BQ[:, 0].min()), int(end_BQ[:, -1].max())
        if low >= high:
            continue
        if int(first_BQ[:, -1].max()) == low and int(end_BQ[:, 0].min()) == high:
            yield _Window(queries, slice(low, high), None, None)
            continue
        key_W = torch.arange(low, high, dtype=torch.int32)
        visible_BQW = (key_W >= first_BQ[..., None]) & (key_W < end_BQ[..., None])
        empty_BQ = first_BQ == end_BQ
        hidden_BQW = ~(visible_BQW | empty_BQ[..., None])
        bias_BQW = torch.zeros(hidden_BQW.shape, dtype=dtype).masked_fill_(hidden_BQW, float("-inf"))
        empty = empty_BQ[:, None] if bool(empty_BQ.any()) else None
        yield _Window(queries, slice(low, high), bias_BQW[:, None], empty)


def windowed_forward(
    q: Tensor, k: Tensor, v: Tensor, first_key: Tensor, end_key: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The output [B, H, S, D], laid out as [B, S, H, D], and the log-sum-exp [B, H, S], for valid bounds."""
    batch, heads, size, width = q.shape
    key_heads = k.shape[1]
    out = q.new_zeros(batch, size, heads, width).transpose(1, 2)
    lse = q.new_full((batch, heads, size), float("-inf"), dtype=accumulation_dtype(q.dtype))
    for window in windows(first_key, end_key, lse.dtype):
        out_w, lse_w = flash_forward(
            fold(q[:, :, window.queries], key_heads),
            k[:, :, window.keys],
            v[:, :, window.keys],
            0.0,
            False,
            attn_mask=folded_bias(window.bias, heads // key_heads),
            scale=scale,
        )
        out_w, lse_w = unfold(out_w, heads), unfold(lse_w[..., None], heads)[..., 0]
        if window.empty is not None:
            out_w = out_w.masked_fill(window.empty[..., None], 0.0)
            lse_w = lse_w.masked_fill(window.empty, float("-inf"))
        out[:, :, window.queries], lse[:, :, window.queries] = out_w, lse_w
    return out, lse


def _windowed_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    first_key: Tensor,
    end_key: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, size, width = q.shape
    key_heads, num_keys = k.shape[1], k.shape[2]
    # Windows overlap, so gradients of keys are summed in float32 or better.
    dq, dk, dv = (
        q.new_zeros(batch, positions, x_heads, width, dtype=dtype).transpose(1, 2)
        for positions, x_heads, dtype in (
            (size, heads, q.dtype),
            (num_keys, key_heads, lse.dtype),
            (num_keys, key_heads, lse.dtype),
        )
    )
    for window in windows(first_key, end_key, lse.dtype):
        lse_w = lse[:, :, window.queries]
        if window.empty is not None:
            # With a log-sum-exp of plus infinity the backward gives queries that see nothing weights of exactly 0.
            # What they have may be that of a second interval.
            lse_w = lse_w.masked_fill(window.empty, float("inf"))
        dq_w, dk_w, dv_w = _flash_backward(
            fold(grad_out[:, :, window.queries], key_heads),
            fold(q[:, :, window.queries], key_heads),
            k[:, :, window.keys],
            v[:, :, window.keys],
            fold(out[:, :, window.queries], key_heads),
            fold(lse_w[..., None], key_heads)[..., 0],
            folded_bias(window.bias, heads // key_heads),
            False,
            scale,
        )
        dq[:, :, window.queries] = unfold(dq_w, heads)
        dk[:, :, window.keys] += dk_w
        dv[:, :, window.keys] += dv_w
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def fold(x_BHQD: Tensor, key_heads: int) -> Tensor:
    """[B, K, group * Q, D]: query heads that share keys laid end to end, so that no key is copied."""
    return x_BHQD if x_BHQD.shape[1] == key_heads else x_BHQD.unflatten(1, (key_heads, -1)).flatten(2, 3)


def unfold(x_BKGD: Tensor, heads: int) -> Tensor:
    """[B, H, Q, D]: the reverse of `fold`."""
    key_heads = x_BKGD.shape[1]
    return x_BKGD if key_heads == heads else x_BKGD.unflatten(2, (heads // key_heads, -1)).flatten(1, 2)


def folded_bias(bias_B1QW: Tensor | None, group: int) -> Tensor | None:
    return bias_B1QW if bias_B1QW is None or group == 1 else bias_B1QW.repeat(1, 1, group, 1)
