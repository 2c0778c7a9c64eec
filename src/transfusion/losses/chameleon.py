"""The Chameleon baseline's loss: a batch in, the sums over text and image tokens out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from transfusion.codec import Codec, encoded
from transfusion.config import CodecConfig
from transfusion.losses.loss import ratio, target_counts
from transfusion.schema import Batch, LossTerms


class ChameleonLoss:
    """Next-token loss of one batch over the tokens of texts and of images alike, as sums and counts."""

    def __init__(self, config: CodecConfig, codec: Codec | None) -> None:
        """codec: of the images in the batches; None: they are tokens. It stays outside of what is trained."""
        self.config, self.codec = config, codec

    def terms(self, model: nn.Module, batch: Batch) -> LossTerms:
        """Run the model on a batch. `model` maps (batch, image tokens) to `TokenOutput`.

        The gradient of both sums is that of "text". The z-loss is in it and in no sum. No noise, no timesteps.
        """
        tokens = [encoded(group, self.codec) for group in batch.media]
        output = model(batch, tokens)
        image_count = torch.stack(
            [group.image_weight_I.sum() * group.patch_slot_IP.shape[1] for group in batch.media]
        ).sum()
        # In value the text's part, in gradient the whole.
        text_sum = output.total - (output.total.detach() - output.text_sum)
        return LossTerms(
            {"text": text_sum, "image": output.image_sum},
            {"text": batch.text_weight_BS.sum(), "image": image_count},
        )

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """See `Loss.counts`."""
        return target_counts(batch, self.config)

    def combine(self, terms: LossTerms, counts: Mapping[str, Tensor]) -> Tensor:
        """See `Loss.combine`: the mean over all tokens."""
        return (terms.sums["text"] + terms.sums["image"]) / (counts["text"] + counts["image"]).clamp(min=1.0)

    def mean(self, sums: Mapping[str, float], counts: Mapping[str, float]) -> float:
        """See `Loss.mean`."""
        return ratio(sums["text"] + sums["image"], counts["text"] + counts["image"]) or 0.0
