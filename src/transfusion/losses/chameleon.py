"""The Chameleon baseline's loss: a batch in, the sums over text and image tokens out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from transfusion.codec import TokenCodec
from transfusion.schema import TIMESTEP_BUCKETS, Batch, LossTerms


class ChameleonLoss:
    """Next-token loss of one batch over the tokens of texts and of images alike, as sums and counts."""

    def __init__(self, codec: TokenCodec) -> None:
        """codec: of the images in the batches. It stays outside of what is trained."""
        self.codec = codec

    def terms(self, model: nn.Module, batch: Batch) -> LossTerms:
        """Run the model on a batch. `model` maps (batch, image tokens) to `TokenOutput`.

        The gradient of both sums is that of text_sum; the z-loss is in it and in no sum. No noise, so no buckets.
        """
        tokens = [self.codec.tokens(group.values) for group in batch.images]
        output = model(batch, tokens)
        image_count = torch.stack(
            [group.image_weight_I.sum() * group.patch_slot_IP.shape[1] for group in batch.images]
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
