"""The text head: logits exist for one chunk of targets at a time, never for all tokens.

N text targets, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross entropies of hidden_ND @ weight_VD.T, their sum and each of them, chunk by chunk.

    The gradient is that of the sum plus z_loss times the sum of the squared logarithms of the normalisers, which keep
    logits from drifting (Chameleon, section 2.3); the values are cross entropies alone.

    Gradients are made in the forward pass, while a chunk's logits are at hand, so the backward pass only
    scales them and the weight is needed once however many chunks there are: under ZeRO-3 all ranks
    gather it equally often even when their numbers of targets differ.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, chunk: int, z_loss: float
    ) -> tuple[Tensor, Tensor]:
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        nats_N = hidden_ND.new_zeros(len(hidden_ND), dtype=torch.float32)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden_ND) if needs_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        for start in range(0, hidden_ND.shape[0], chunk):
            part = slice(start, start + chunk)
            rows, target = hidden_ND[part], target_N[part, None]
            logit = (rows @ weight_VD.T).float()
            log_normaliser = logit.logsumexp(-1, keepdim=True)
            nats = log_normaliser - logit.gather(1, target)
            total += nats.sum()
            nats_N[part] = nats.squeeze(1)
            if grad_hidden is None and grad_weight is None:
                continue
            error = logit.sub_(log_normaliser).exp_()
            if z_loss:
                error *= 1.0 + 2.0 * z_loss * log_normaliser
            error.scatter_add_(1, target, error.new_full(target.shape, -1.0))
            error = error.to(rows.dtype)
            if grad_hidden is not None:
                torch.mm(error, weight_VD, out=grad_hidden[part])
            if grad_weight is not None:
                _add_product(grad_weight, error.T, rows)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight_VD.dtype
        ctx.mark_non_differentiable(nats_N)
        return total, nats_N

    @staticmethod
    def backward(
        ctx: Any, grad_total: Tensor, _: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad_total.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * grad_total).to(ctx.weight_dtype),
            None,
            None,
            None,
        )


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to an fp32 total. NVIDIA's tensor cores do so from 16-bit operands, with the same fp32 sums."""
    if left.is_cuda and left.dtype != torch.float32 and torch.version.hip is None:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.float(), right.float())


class TextHead(nn.Module):
    """Output projection to the vocabulary, by a weight of its own or by that of the embedding.

    A tied weight is one parameter of two modules. Its name is the embedding's, and so is its place in a state dict.
    Under ZeRO-3 each of the two gathers it when it is called. Autograd adds up both gradients before one is reduced.
    """

    def __init__(
        self,
        width: int,
        vocabulary: int,
        chunk: int,
        z_loss: float = 0.0,
        *,
        tied: nn.Embedding | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, width)) if tied is None else tied.weight
        self.is_tied = tied is not None
        self.chunk, self.z_loss = chunk, z_loss

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if not self.is_tied:
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        if not self.is_tied:
            super()._load_from_state_dict(*arguments)

    def forward(
        self, hidden_ND: Tensor, target_N: Tensor | None = None, *, each: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Without targets: logits [N, V]. With targets int64 [N]: the fp32 sum of their cross entropies; with `each`
        also the cross entropies themselves, fp32 [N], without a gradient. z_loss is in the gradient alone."""
        if target_N is None:
            return hidden_ND @ self.weight.T
        total, nats_N = _ChunkedCrossEntropy.apply(hidden_ND, self.weight, target_N, self.chunk, self.z_loss)
        return (total, nats_N) if each else total
