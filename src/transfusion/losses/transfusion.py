"""Joins network, codec and objective: a batch in, the sums of both losses out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from transfusion.codec import Codec, encoded
from transfusion.codec.pixels import PixelCodec
from transfusion.config import DiffusionConfig
from transfusion.diffusion.objective import ImageObjective
from transfusion.losses.loss import ratio
from transfusion.model.patches import unpatchify_groups
from transfusion.schema import TIMESTEP_BUCKETS, Batch, LossTerms


class TransfusionLoss:
    """Next-token loss and diffusion loss of one batch (paper, eq. 4), as sums and counts."""

    def __init__(self, config: DiffusionConfig, codec: Codec | None = None) -> None:
        """codec: of the images in the batches; None: pixels are latents. It stays outside of what is trained."""
        self.codec: Codec = PixelCodec() if codec is None else codec
        self.objective = ImageObjective(config)
        self.image_weight = config.image_loss_weight

    def terms(self, model: nn.Module, batch: Batch) -> LossTerms:
        """Run the model on a batch. `model` maps (batch, noisy latents) to `ModelOutput`."""
        noised = [
            self.objective.corrupt(encoded(group, self.codec), group.timestep_I, group.noise_key_I)
            for group in batch.media
        ]
        output = model(batch, [images.noisy for images in noised])
        device = batch.token_ids_BS.device
        image_sum, image_count = torch.zeros((), device=device), torch.zeros((), device=device)
        bucket_sum, bucket_count = (torch.zeros(TIMESTEP_BUCKETS, device=device) for _ in range(2))
        predictions = unpatchify_groups(output.prediction_NE, [images.noisy for images in noised])
        for group, images, prediction in zip(batch.media, noised, predictions, strict=True):
            loss = self.objective.loss(prediction, images.target, group.image_weight_I, group.timestep_I)
            image_sum, image_count = image_sum + loss.total, image_count + loss.count
            bucket_sum, bucket_count = bucket_sum + loss.bucket_total_K, bucket_count + loss.bucket_count_K
        text_count = batch.text_weight_BS.sum()
        return LossTerms(output.text_sum, text_count, image_sum, image_count, bucket_sum, bucket_count)

    def combine(self, terms: LossTerms, text_count: Tensor, image_count: Tensor) -> Tensor:
        """The loss: both sums divided by the given (global) counts; a count of zero gives zero, not NaN."""
        text = terms.text_sum / text_count.clamp(min=1.0)
        return text + self.image_weight * terms.image_sum / image_count.clamp(min=1.0)

    def mean(self, text_sum: float, text_count: float, image_sum: float, image_count: float) -> float:
        """See `Loss.mean`."""
        image = ratio(image_sum, image_count) or 0.0
        return (ratio(text_sum, text_count) or 0.0) + self.image_weight * image
