"""Both losses on validation data, every document exactly once."""

from __future__ import annotations

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
) -> LossTerms:
    """This rank's loss sums over its share of the validation data; every rank runs the same number of forwards.

    codec: of the images; None: their pixels.
    Noise and timesteps of the images are keyed by sample, so two checkpoints are measured on the same noise.
    """
    loss = family_of(config).loss(config, codec)
    total: LossTerms | None = None
    for batch in loader:
        terms = loss.terms(model, batch.to(device)).double()
        total = terms if total is None else total.plus(terms)
    if total is None:
        raise ValueError("the validation data gave no batch")
    return total
