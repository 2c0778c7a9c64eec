"""The definition, written to be read: every other implementation is held against it.

Shape suffixes: B batch, H query heads, K key heads, S queries, N keys, D head width.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from transfusion_kernels.attention.layout import IntervalMask
from transfusion_kernels.attention.second import places


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What scores and log-sum-exps of inputs of `dtype` are held in: float32 or better."""
    return torch.promote_types(dtype, torch.float32)


def reference_attention(
    q_BHSD: Tensor,
    k_BKND: Tensor,
    v_BKND: Tensor,
    mask: IntervalMask,
    scale: float,
    second: tuple[Tensor, IntervalMask] | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the keys that `mask` shows, differentiable by autograd, of any floating dtype.

    The queries that `second` names see the keys of its mask too, as in `interval_attention`.

    Computes in float32 or better. Returns the output [B, H, S, D] in the dtype of q, and the log-sum-exp of the
    scaled scores [B, H, S], which carries no gradient. A query that sees nothing gets 0 and minus infinity.
    Autocast has no say: the dtype of the inputs does.
    """
    with _without_autocast(q_BHSD.device.type):
        return _attend(q_BHSD, k_BKND, v_BKND, _visible(mask, second), scale)


def _visible(mask: IntervalMask, second: tuple[Tensor, IntervalMask] | None) -> Tensor:
    if second is None:
        return mask.dense()
    rows, other = second
    batch = max(rows.shape[0], mask.first_key.shape[0], other.first_key.shape[0])
    visible_BSN = mask.dense().expand(batch, -1, -1)
    places_G = places(rows, batch, mask.num_queries)
    visible_RN = visible_BSN.flatten(0, 1)
    more_GN = other.dense().expand(batch, -1, -1).flatten(0, 1)
    return visible_RN.index_copy(0, places_G, visible_RN.index_select(0, places_G) | more_GN).view_as(
        visible_BSN
    )


@torch.compiler.assume_constant_result
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    if not _has_autocast(device_type):  # as on the meta device
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


def _attend(
    q_BHSD: Tensor, k_BKND: Tensor, v_BKND: Tensor, visible_BSN: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(q_BHSD.dtype)
    group = q_BHSD.shape[1] // max(k_BKND.shape[1], 1)
    k_BHND = k_BKND.to(dtype).repeat_interleave(group, dim=1)
    v_BHND = v_BKND.to(dtype).repeat_interleave(group, dim=1)

    visible_B1SN = visible_BSN[:, None]
    score_BHSN = (q_BHSD.to(dtype) @ k_BHND.transpose(-1, -2)) * scale
    score_BHSN = score_BHSN.masked_fill(~visible_B1SN, float("-inf"))
    lse_BHS = torch.logsumexp(score_BHSN.detach(), dim=-1)

    # The softmax of a row of minus infinities is NaN, in its gradient too: such rows are given other scores, and
    # their weights taken away.
    sees_nothing_B1S1 = ~visible_B1SN.any(dim=-1, keepdim=True)
    weight_BHSN = torch.softmax(score_BHSN.masked_fill(sees_nothing_B1S1, 0.0), dim=-1) * visible_B1SN
    return (weight_BHSN @ v_BHND).to(q_BHSD.dtype), lse_BHS
