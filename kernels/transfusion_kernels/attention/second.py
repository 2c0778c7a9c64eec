"""A second interval for some queries: two calls of any implementation, merged by log-sum-exp.

A softmax over two disjoint sets of keys is the mean of the softmaxes over each, weighted by the sums of their
exponentials. A flash backward that is given the merged output and log-sum-exp is exact for the keys of its own call,
so that the gradients of both calls add.

Shape suffixes: B batch, H heads, S queries, M of them with a second interval, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transfusion_kernels.attention.layout import IntervalMask, check_tensor


def check_second(q: Tensor, mask: IntervalMask, rows: Tensor, second: IntervalMask) -> None:
    """Raise ValueError, naming the argument, unless these rows can have this second interval. Looks at no values."""
    check_tensor("second[0]", rows)
    if rows.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"second[0]: got {rows.dtype}, takes torch.int64 or torch.int32")
    batch, _, queries, _ = q.shape
    if rows.dim() != 2 or rows.shape[0] not in (1, batch) or rows.shape[1] > queries:
        raise ValueError(
            f"second[0]: got shape {tuple(rows.shape)}, takes [{batch} or 1, at most {queries}] as q is "
            f"{tuple(q.shape)}"
        )
    if rows.device != q.device:
        raise ValueError(f"second[0]: got device {rows.device}, takes q's, {q.device}")
    if not isinstance(second, IntervalMask):
        raise ValueError(f"second[1]: got {type(second).__name__}, takes an IntervalMask")
    if second.first_key.shape[0] not in (1, batch) or second.num_queries != rows.shape[1]:
        raise ValueError(
            f"second[1]: got bounds of shape {tuple(second.first_key.shape)}, takes [{batch} or 1, {rows.shape[1]}] as "
            f"the rows are {tuple(rows.shape)}"
        )
    if second.num_keys != mask.num_keys:
        raise ValueError(f"second[1]: got num_keys {second.num_keys}, takes the mask's, {mask.num_keys}")
    if second.device != q.device:
        raise ValueError(f"second[1]: got device {second.device}, takes q's, {q.device}")


def validate_second(mask: IntervalMask, rows: Tensor, second: IntervalMask) -> None:
    """Raise ValueError unless rows are places of queries, each once, and no key is in both intervals of a query."""
    second.validate()
    if rows.numel() == 0:
        return
    lowest, highest = int(rows.min()), int(rows.max())
    if lowest < 0 or highest >= mask.num_queries:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(f"second[0]: got query {wrong}, takes queries from 0 to {mask.num_queries - 1}")
    ordered_BM = rows.sort(dim=1).values
    twice = (ordered_BM[:, 1:] == ordered_BM[:, :-1]).nonzero()
    if len(twice):
        row, place = twice[0].tolist()
        raise ValueError(
            f"second[0]: got query {int(ordered_BM[row, place])} twice in row {row}, takes each once"
        )
    batch = max(rows.shape[0], mask.first_key.shape[0], second.first_key.shape[0])
    rows_BM = rows.long().expand(batch, -1)
    first_BM, end_BM = (x.expand(batch, -1).gather(1, rows_BM) for x in (mask.first_key, mask.end_key))
    low_BM, high_BM = second.first_key.expand(batch, -1), second.end_key.expand(batch, -1)
    shared = (torch.minimum(end_BM, high_BM) > torch.maximum(first_BM, low_BM)).nonzero()
    if len(shared):
        row, place = shared[0].tolist()
        raise ValueError(
            f"second[1]: got keys {int(low_BM[row, place])} to {int(high_BM[row, place])} for query "
            f"{int(rows_BM[row, place])} of row {row}, whose first interval has some of them, "
            f"{int(first_BM[row, place])} to {int(end_BM[row, place])}; takes keys that it does not have"
        )


def intervals(mask: IntervalMask, second: tuple[Tensor, IntervalMask] | None) -> list[tuple[Tensor, Tensor]]:
    """The bounds [B or 1, S] of one or both intervals of all queries. Those without a second have an empty one."""
    if second is None:
        return [(mask.first_key, mask.end_key)]
    rows, other = second
    batch = max(rows.shape[0], other.first_key.shape[0])
    bounds_XBM = torch.stack([other.first_key, other.end_key]).expand(2, batch, -1)
    bounds_XBS = bounds_XBM.new_zeros(2, batch, mask.num_queries)
    bounds_XBS.scatter_(2, rows.long().expand(2, batch, -1), bounds_XBM)
    return [(mask.first_key, mask.end_key), (bounds_XBS[0], bounds_XBS[1])]


def places(rows: Tensor, batch: int, queries: int) -> Tensor:
    """int64 [B * M]: where the named queries stand among the B * S of a batch."""
    start_B1 = torch.arange(batch, device=rows.device)[:, None] * queries
    return (start_B1 + rows).flatten()


def pick(x_BHSD: Tensor, places_G: Tensor) -> Tensor:
    """[B, H, M, D], laid out as [B, M, H, D]: the named queries."""
    batch = x_BHSD.shape[0]
    by_position = x_BHSD.transpose(1, 2).flatten(0, 1)
    return by_position.index_select(0, places_G).unflatten(0, (batch, -1)).transpose(1, 2)


def merge(
    out: Tensor, lse: Tensor, second_out: Tensor, second_lse: Tensor, places_G: Tensor
) -> tuple[Tensor, Tensor]:
    """The output [B, H, S, D] and the log-sum-exp [B, H, S] over both intervals. The first may be changed in place."""
    batch, heads, queries, width = out.shape
    out_RHD = out.transpose(1, 2).reshape(batch * queries, heads, width)
    lse_RH = lse.transpose(1, 2).reshape(batch * queries, heads)
    more_GHD, more_GH = (x.transpose(1, 2).flatten(0, 1) for x in (second_out, second_lse))
    merge_rows(out_RHD, lse_RH, more_GHD, more_GH, places_G)
    out = out_RHD.view(batch, queries, heads, width).transpose(1, 2)
    return out, lse_RH.view(batch, queries, heads).transpose(1, 2).contiguous()


def merge_rows(out_RHD: Tensor, lse_RH: Tensor, more_GHD: Tensor, more_GH: Tensor, places_G: Tensor) -> None:
    """Add to output and log-sum-exp, in place, what the queries at these places get from other keys."""
    one_GH = lse_RH.index_select(0, places_G)
    both_GH = torch.logaddexp(one_GH, more_GH)
    # Where both see nothing, both weights are 0.
    shift_GH = both_GH.masked_fill(both_GH == float("-inf"), 0.0)
    merged_GHD = out_RHD.index_select(0, places_G).to(both_GH.dtype)
    merged_GHD = merged_GHD.mul_((one_GH - shift_GH).exp_()[..., None])
    merged_GHD.addcmul_(more_GHD.to(both_GH.dtype), (more_GH - shift_GH).exp_()[..., None])
    out_RHD.index_copy_(0, places_G, merged_GHD.to(out_RHD.dtype))
    lse_RH.index_copy_(0, places_G, both_GH)


def add_gradient(total: Tensor, gradient: Tensor, places_G: Tensor) -> Tensor:
    """[B, H, S, D]: gradients of all queries, those of the second interval [B, H, M, D] added to the named ones."""
    batch, heads, queries, width = total.shape
    total_RHD = total.transpose(1, 2).reshape(batch * queries, heads, width)
    named_GHD = total_RHD.index_select(0, places_G).add_(gradient.transpose(1, 2).flatten(0, 1))
    total_RHD.index_copy_(0, places_G, named_GHD)
    return total_RHD.view(batch, queries, heads, width).transpose(1, 2)
