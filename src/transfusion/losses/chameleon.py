"""The Chameleon baseline's loss: a batch in, the sums over text and image tokens out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from transfusion.codec import Codec, encoded
from transfusion.losses.loss import ratio
from transfusion.schema import TIMESTEP_BUCKETS, Batch, LossTerms


class ChameleonLoss:
    """Next-token loss of one batch over the tokens of texts and of images alike, as sums and counts."""

    def __init__(self, codec: Codec | None) -> None:
        """codec: of the images in the batches; None: they are tokens. It stays outside of what is trained."""
        self.codec = codec

    def terms(self, model: nn.Module, batch: Batch) -> LossTerms:
        """Run the model on a batch. `model` maps (batch, image tokens) to `TokenOutput`.

        The gradient of both sums is that of text_sum; the z-loss is in it and in no sum. No noise, so no buckets.
        """
        tokens = [encoded(group, self.codec) for group in batch.media]
        output = model(batch, tokens)
        image_count = torch.stack(
            [group.image_weight_I.sum() * group.patch_slot_IP.shape[1] for group in batch.media]
        ).sum()
        nothing_K = torch.zeros(TIMESTEP_BUCKETS, device=batch.token_ids_BS.device)
        # In value the text's part, in gradient the whole.
        text_sum = output.total - (output.total.detach() - output.text_sum)
        return LossTerms(
            text_sum, batch.text_weight_BS.sum(), output.image_sum, image_count, nothing_K, nothing_K
        )

    def combine(self, terms: LossTerms, text_count: Tensor, image_count: Tensor) -> Tensor:
        """The loss: the mean over all tokens of the given (global) counts; a count of zero gives zero, not NaN."""
        return (terms.text_sum + terms.image_sum) / (text_count + image_count).clamp(min=1.0)

    def mean(self, text_sum: float, text_count: float, image_sum: float, image_count: float) -> float:
        """See `Loss.mean`."""
        return ratio(text_sum + image_sum, text_count + image_count) or 0.0
