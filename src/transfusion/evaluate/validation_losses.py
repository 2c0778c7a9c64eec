"""Both losses on validation data, every document exactly once."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from transfusion.codec import Codec
from transfusion.config import Config
from transfusion.data.loading.validation import EvaluationLoader
from transfusion.families.build import family_of
from transfusion.schema import LossTerms


@torch.no_grad()
def validation_losses(
    model: nn.Module,
    loader: EvaluationLoader,
    config: Config,
    device: torch.device,
    codec: Codec | None = None,
    on_batch: Callable[[int], object] = int,
) -> Iterator[LossTerms]:
    """The loss sums of each of this rank's batches, in float64. Every rank runs the same number of forwards.

    codec: of the images; None: their pixels. on_batch: told how many batches are done, before each.
    Noise and timesteps of the images are keyed by sample, so two checkpoints are measured on the same noise.
    """
    loss = family_of(config).loss(config, codec)
    for number, batch in enumerate(loader):
        on_batch(number)
        yield loss.terms(model, batch.to(device)).double()
