"""The check before the clock: a provider's output and gradients on the timed inputs, held against float64.

attention.py and cpu_attention.py call it before they time anything; what is wrong is reported and never timed.

Shape suffixes: B rows, S positions, H heads, D head width; Q queries of a block, W keys that they see.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from transfusion_kernels import IntervalMask
from transfusion_kernels.verification.testing import poisoned_memory, relative_error

# Rounding leaves errors well below these, a tile with the wrong mask well above: of a whole tensor (norm of the
# difference over norm), and of its worst row, so that a few wrong rows among many do not hide.
MAX_ERROR = {"bf16": (2e-2, 0.15), "fp16": (5e-3, 0.05), "fp32": (1e-4, 1e-3)}
RESULT_NAMES = ("out", "dq", "dk", "dv")
REFERENCE_BLOCK = 256

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class AttentionInputs(Protocol):
    """q, k, v, grad_out: [B, H, S, D]."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    mask: IntervalMask


def exact_results(inputs: AttentionInputs, block: int = REFERENCE_BLOCK) -> tuple[Tensor, ...]:
    """Output and gradients of q, k and v in float64, straight from the definition, a block of queries at a time."""
    q, k, v, grad_out = (x.detach().double() for x in (inputs.q, inputs.k, inputs.v, inputs.grad_out))
    out, dq, dk, dv = (torch.zeros_like(x) for x in (q, q, k, v))
    scale = q.shape[-1] ** -0.5
    first_BS, end_BS = inputs.mask.first_key, inputs.mask.end_key
    for row in range(q.shape[0]):
        for start in range(0, q.shape[2], block):
            part = slice(start, start + block)
            first_Q1, end_Q1 = first_BS[row, part, None], end_BS[row, part, None]
            keys = slice(int(first_Q1[0]), int(end_Q1[-1]))  # the bounds never decrease
            key_W = torch.arange(keys.start, keys.stop, device=q.device)
            hidden_QW = (key_W < first_Q1) | (key_W >= end_Q1)
            q_HQD, grad_HQD = q[row, :, part], grad_out[row, :, part]
            k_HWD, v_HWD = k[row, :, keys], v[row, :, keys]
            score_HQW = (q_HQD @ k_HWD.mT * scale).masked_fill_(hidden_QW, -math.inf)
            weight_HQW = score_HQW.softmax(-1)
            out_HQD = out[row, :, part] = weight_HQW @ v_HWD
            dv[row, :, keys] += weight_HQW.mT @ grad_HQD
            delta_HQ1 = (grad_HQD * out_HQD).sum(-1, keepdim=True)
            dscore_HQW = weight_HQW.mul_((grad_HQD @ v_HWD.mT).sub_(delta_HQ1)).mul_(scale)
            dq[row, :, part] = dscore_HQW @ k_HWD
            dk[row, :, keys] += dscore_HQW.mT @ q_HQD
    return out, dq, dk, dv


@dataclass(frozen=True)
class Verdict:
    """How far a provider is from float64: each tensor, and the worst row of any."""

    errors: dict[str, float]
    worst_row: float
    right: bool


def verify(
    attend: Attend, inputs: AttentionInputs, exact: Sequence[Tensor], dtype: str, *, poison: bool
) -> Verdict:
    """Run forward and backward once, and compare. NaN is never right."""
    with poisoned_memory() if poison else contextlib.nullcontext():
        out = attend(inputs.q, inputs.k, inputs.v)
        results = (out, *torch.autograd.grad(out, (inputs.q, inputs.k, inputs.v), inputs.grad_out))
    errors = {
        name: relative_error(result, true)
        for name, result, true in zip(RESULT_NAMES, results, exact, strict=True)
    }
    rows = [_worst_row(result, true) for result, true in zip(results, exact, strict=True)]
    max_tensor, max_row = MAX_ERROR[dtype]
    right = all(error <= max_tensor for error in errors.values()) and all(row <= max_row for row in rows)
    return Verdict(errors, max(rows, key=lambda row: math.inf if math.isnan(row) else row), right)


def _worst_row(result: Tensor, true: Tensor) -> float:
    """The greatest norm of a row's difference, over the row's own norm or, where that is less, the rows' mean."""
    norms = true.norm(dim=-1)
    differences = (result.detach().double() - true).norm(dim=-1)
    return float((differences / norms.clamp(min=float(norms.mean()))).max())
