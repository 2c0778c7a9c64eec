"""Joins network, codec and objective: a batch in, the sums of both losses out."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from transfusion.codec import Codec, MediaCodec, encoded, open_media_codecs
from transfusion.codec.pixels import PixelCodec
from transfusion.config import CodecConfig, DiffusionConfig, ModalityConfig
from transfusion.diffusion.objective import ImageObjective, NoisedImages
from transfusion.losses.loss import ratio, target_counts
from transfusion.model.patches import unpatchify_groups
from transfusion.schema import Batch, LossTerms, MediaGroup
from transfusion.sequence.sizes import IMAGE


class TransfusionLoss:
    """Next-token loss and diffusion loss of one batch (paper, eq. 4), as sums and counts."""

    def __init__(
        self,
        config: DiffusionConfig,
        codec: Codec | None = None,
        codec_config: CodecConfig | None = None,
        modalities: Sequence[ModalityConfig] = (),
    ) -> None:
        """codec: of the images in the batches; None: pixels are latents. It stays outside of what is trained.

        modalities: further ones. Each has its own term and weight.
        """
        self.codec_config, self.modalities = codec_config, modalities
        self.codecs: dict[str, Codec | MediaCodec] = {IMAGE: PixelCodec() if codec is None else codec}
        self.codecs |= open_media_codecs(modalities)
        configs = {IMAGE: config} | {modality.name: modality.diffusion for modality in modalities}
        self.objectives = {name: ImageObjective(each, name) for name, each in configs.items()}
        self.weights = {name: each.image_loss_weight for name, each in configs.items()}

    def terms(self, model: nn.Module, batch: Batch) -> LossTerms:
        """Run the model on a batch. `model` maps (batch, noisy latents) to `ModelOutput`."""
        noised, predictions, text_sum = self._answers(model, batch)
        sums, counts = {"text": text_sum}, {"text": batch.text_weight_BS.sum()}
        for name, objective in self.objectives.items():
            parts = [
                objective.loss(prediction, images.target, group.learned_I, group.timestep_I)
                for group, images, prediction in zip(batch.media, noised, predictions, strict=True)
                if group.modality == name
            ]
            media = functools.reduce(LossTerms.plus, parts)
            sums, counts = sums | media.sums, counts | media.counts
        return LossTerms(sums, counts)

    def clean_error(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Squared error of the clean latents of images that the network's answers mean, and over how many elements.

        Both are sums. Whatever the network predicts, this is the same question at the same ratio of signal and noise.
        """
        noised, predictions, _ = self._answers(model, batch)
        total, count = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for group, images, prediction in zip(batch.media, noised, predictions, strict=True):
            if group.modality != IMAGE:
                continue
            found = self.objectives[IMAGE].clean(images.noisy, prediction.float(), group.timestep_I)
            error_I = (found - encoded(group, self.codecs[IMAGE]).float()).square().flatten(1).sum(1)
            total += (error_I * group.learned_I).sum().double().cpu()
            count += group.learned_I.sum().double().cpu() * found[0].numel()
        return total, count

    def _answers(self, model: nn.Module, batch: Batch) -> tuple[list[NoisedImages], list[Tensor], Tensor]:
        """What the network was shown of each group of media, what it said of it, and its loss of text."""
        noised = [self._noised(group) for group in batch.media]
        output = model(batch, [images.noisy for images in noised])
        predictions: list[Tensor] = []
        # Groups stand in the order of the modalities.
        for name, answer_NE in zip(self.objectives, (output.prediction_NE, *output.others), strict=True):
            groups = zip(batch.media, noised, strict=True)
            predictions += unpatchify_groups(
                answer_NE, [images.noisy for group, images in groups if group.modality == name]
            )
        return noised, predictions, output.text_sum

    def _noised(self, group: MediaGroup) -> NoisedImages:
        """Images and what is asked of them. Those that are only read stay clean."""
        clean = encoded(group, self.codecs[group.modality])
        images = self.objectives[group.modality].corrupt(clean, group.timestep_I, group.noise_key_I)
        if group.is_context_I is None:
            return images
        noisy = torch.where(group.is_context_I[:, None, None, None], clean.float(), images.noisy)
        return images._replace(noisy=noisy)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """See `Loss.counts`."""
        return target_counts(batch, self.codec_config, self.modalities)

    def combine(self, terms: LossTerms, counts: Mapping[str, Tensor]) -> Tensor:
        """See `Loss.combine` (paper, eq. 4)."""
        total = terms.sums["text"] / counts["text"].clamp(min=1.0)
        for name, weight in self.weights.items():
            total = total + weight * terms.sums[name] / counts[name].clamp(min=1.0)
        return total

    def mean(self, sums: Mapping[str, float], counts: Mapping[str, float]) -> float:
        """See `Loss.mean`."""
        media = [weight * (ratio(sums[name], counts[name]) or 0.0) for name, weight in self.weights.items()]
        return sum(media, ratio(sums["text"], counts["text"]) or 0.0)
