"""The text head: logits exist for one chunk of targets at a time, never for all tokens.

N text targets, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of cross entropies of hidden_ND @ weight_VD.T, chunk by chunk.

    Gradients are made in the forward pass, while a chunk's logits are at hand, so the backward pass only
    scales them and the weight is needed once however many chunks there are: under ZeRO-3 all ranks
    gather it equally often even when their numbers of targets differ.
    """

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, chunk: int) -> Tensor:
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden_ND) if needs_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        for start in range(0, hidden_ND.shape[0], chunk):
            part = slice(start, start + chunk)
            rows, target = hidden_ND[part], target_N[part, None]
            logit = (rows @ weight_VD.T).float()
            log_normaliser = logit.logsumexp(-1, keepdim=True)
            total += (log_normaliser - logit.gather(1, target)).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            error = logit.sub_(log_normaliser).exp_()
            error.scatter_add_(1, target, error.new_full(target.shape, -1.0))
            error = error.to(rows.dtype)
            if grad_hidden is not None:
                torch.mm(error, weight_VD, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight.addmm_(error.T.float(), rows.float())
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad_total.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * grad_total).to(ctx.weight_dtype),
            None,
            None,
        )


class TextHead(nn.Module):
    """Untied output projection to the vocabulary."""

    def __init__(self, width: int, vocabulary: int, chunk: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, width))
        self.chunk = chunk

    def forward(self, hidden_ND: Tensor, target_N: Tensor | None = None) -> Tensor:
        """Without targets: logits [N, V]. With targets int64 [N]: the fp32 sum of their cross entropies."""
        if target_N is None:
            return hidden_ND @ self.weight.T
        return _ChunkedCrossEntropy.apply(hidden_ND, self.weight, target_N, self.chunk)
