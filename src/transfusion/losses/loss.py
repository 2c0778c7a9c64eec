"""What every loss gives: sums over a batch, and how they make the number that is learned and the one that is shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from transfusion.codec.interface import media_elements
from transfusion.config import CodecConfig, ModalityConfig
from transfusion.schema import Batch, LossTerms
from transfusion.sequence.sizes import IMAGE


class Loss(Protocol):
    """The objective of a family of models. It has no weights."""

    def terms(self, model: nn.Module, batch: Batch) -> LossTerms:
        """Run the model on a batch, as sums and counts."""

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """What the loss divides by, of one batch before it is run: by the names of terms, float64."""

    def combine(self, terms: LossTerms, counts: Mapping[str, Tensor]) -> Tensor:
        """What is learned: the sums over the given (global) counts. A count of zero gives zero, not NaN."""

    def mean(self, sums: Mapping[str, float], counts: Mapping[str, float]) -> float:
        """The same as it is reported, of sums and counts over ranks and steps."""


def target_counts(
    batch: Batch, codec: CodecConfig | None, modalities: Sequence[ModalityConfig] = ()
) -> dict[str, Tensor]:
    """Text targets, and by modality latent elements or image tokens, of a batch. codec None: pixels are latents."""
    counts = {"text": batch.text_weight_BS.sum(dtype=torch.float64)}
    for name in (IMAGE, *(modality.name for modality in modalities)):
        learned = [
            group.learned_I.sum(dtype=torch.float64) * media_elements(group, codec, modalities)
            for group in batch.media
            if group.modality == name
        ]
        counts[name] = torch.stack(learned).sum()
    return counts


def ratio(total: float, count: float) -> float | None:
    """A mean; None where there was nothing to learn."""
    return total / count if count else None


def training_loss(loss: Tensor) -> Tensor:
    """The same loss, whose gradient is NaN everywhere if the loss itself is not finite.

    A loss can overflow while its gradient stays finite. This way the gradient norm, which all ranks see
    alike, tells of both, and no further collective is needed.
    """
    return loss * (1.0 + 0.0 * loss.detach())
