"""Joins network, codec and objective: a batch in, the sums of both losses out."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from transfusion.codec import Codec, encoded
from transfusion.codec.pixels import PixelCodec
from transfusion.config import CodecConfig, DiffusionConfig
from transfusion.diffusion.objective import ImageObjective, NoisedImages
from transfusion.losses.loss import ratio, target_counts
from transfusion.model.patches import unpatchify_groups
from transfusion.schema import Batch, LossTerms, MediaGroup


class TransfusionLoss:
    """Next-token loss and diffusion loss of one batch (paper, eq. 4), as sums and counts."""

    def __init__(
        self, config: DiffusionConfig, codec: Codec | None = None, codec_config: CodecConfig | None = None
    ) -> None:
        """codec: of the images in the batches; None: pixels are latents. It stays outside of what is trained."""
        self.codec_config = codec_config
        self.codec: Codec = PixelCodec() if codec is None else codec
        self.objective = ImageObjective(config)
        self.image_weight = config.image_loss_weight

    def terms(self, model: nn.Module, batch: Batch) -> LossTerms:
        """Run the model on a batch. `model` maps (batch, noisy latents) to `ModelOutput`."""
        noised, predictions, text_sum = self._answers(model, batch)
        parts = [
            self.objective.loss(prediction, images.target, group.learned_I, group.timestep_I)
            for group, images, prediction in zip(batch.media, noised, predictions, strict=True)
        ]
        images = functools.reduce(LossTerms.plus, parts)
        return LossTerms(
            {"text": text_sum, **images.sums}, {"text": batch.text_weight_BS.sum(), **images.counts}
        )

    def clean_error(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Squared error of the clean latents that the network's answers mean, and over how many elements, as sums.

        Whatever the network predicts, this is the same question at the same ratio of signal and noise.
        """
        noised, predictions, _ = self._answers(model, batch)
        total, count = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for group, images, prediction in zip(batch.media, noised, predictions, strict=True):
            found = self.objective.clean(images.noisy, prediction.float(), group.timestep_I)
            error_I = (found - encoded(group, self.codec).float()).square().flatten(1).sum(1)
            total += (error_I * group.learned_I).sum().double().cpu()
            count += group.learned_I.sum().double().cpu() * found[0].numel()
        return total, count

    def _answers(
        self, model: nn.Module, batch: Batch
    ) -> tuple[list[NoisedImages], tuple[Tensor, ...], Tensor]:
        """What the network was shown of each group of images, what it said of it, and its loss of text."""
        noised = [self._noised(group) for group in batch.media]
        output = model(batch, [images.noisy for images in noised])
        predictions = unpatchify_groups(output.prediction_NE, [images.noisy for images in noised])
        return noised, predictions, output.text_sum

    def _noised(self, group: MediaGroup) -> NoisedImages:
        """Images and what is asked of them. Those that are only read stay clean."""
        clean = encoded(group, self.codec)
        images = self.objective.corrupt(clean, group.timestep_I, group.noise_key_I)
        if group.is_context_I is None:
            return images
        noisy = torch.where(group.is_context_I[:, None, None, None], clean.float(), images.noisy)
        return images._replace(noisy=noisy)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """See `Loss.counts`."""
        return target_counts(batch, self.codec_config)

    def combine(self, terms: LossTerms, counts: Mapping[str, Tensor]) -> Tensor:
        """See `Loss.combine` (paper, eq. 4)."""
        text = terms.sums["text"] / counts["text"].clamp(min=1.0)
        return text + self.image_weight * terms.sums["image"] / counts["image"].clamp(min=1.0)

    def mean(self, sums: Mapping[str, float], counts: Mapping[str, float]) -> float:
        """See `Loss.mean`."""
        image = ratio(sums["image"], counts["image"]) or 0.0
        return (ratio(sums["text"], counts["text"]) or 0.0) + self.image_weight * image
