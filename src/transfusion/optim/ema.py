"""Exponential moving average of weights, kept in fp32 wherever the optimiser keeps the weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class MovingAverage:
    """The average of a fixed list of fp32 tensors, such as this rank's shards. Starts at their values.

    With a decay of 0 none is kept.
    """

    def __init__(self, tensors: Sequence[Tensor], decay: float) -> None:
        self.decay = decay
        self.tensors = [tensor.detach() for tensor in tensors] if decay else []
        self.averages = [tensor.clone() for tensor in self.tensors]

    @torch.no_grad()
    def update(self, unless: Tensor | None = None) -> None:
        """Move every average towards its tensor by 1 - decay.

        unless: 0-dim bool on the device, which leaves the averages as they are where it is true.
        """
        if not self.averages:
            return
        if unless is None:
            torch._foreach_lerp_(self.averages, self.tensors, 1.0 - self.decay)
            return
        weight = (1.0 - self.decay) * (~unless).float()
        torch._foreach_lerp_(self.averages, self.tensors, [weight] * len(self.averages))

    @torch.no_grad()
    def exchange(self) -> None:
        """Swap averages and tensors in place, bit for bit, one tensor at a time; twice is no change."""
        for average, tensor in zip(self.averages, self.tensors, strict=True):
            kept = tensor.clone()
            tensor.copy_(average)
            average.copy_(kept)
