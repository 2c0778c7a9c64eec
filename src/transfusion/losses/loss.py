"""What every loss gives: sums over a batch, and how they make the number that is learned and the one that is shown."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from transfusion.schema import Batch, LossTerms


class Loss(Protocol):
    """The objective of a family of models. It has no weights."""

    def terms(self, model: nn.Module, batch: Batch) -> LossTerms:
        """Run the model on a batch, as sums and counts."""

    def combine(self, terms: LossTerms, text_count: Tensor, image_count: Tensor) -> Tensor:
        """What is learned: the sums over the given (global) counts. A count of zero gives zero, not NaN."""

    def mean(self, text_sum: float, text_count: float, image_sum: float, image_count: float) -> float:
        """The same as it is reported, of sums and counts over ranks and steps."""


def ratio(total: float, count: float) -> float | None:
    """A mean; None where there was nothing to learn."""
    return total / count if count else None


def training_loss(loss: Tensor) -> Tensor:
    """The same loss, whose gradient is NaN everywhere if the loss itself is not finite.

    A loss can overflow while its gradient stays finite. This way the gradient norm, which all ranks see
    alike, tells of both, and no further collective is needed.
    """
    return loss * (1.0 + 0.0 * loss.detach())
