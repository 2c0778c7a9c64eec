"""The Chameleon baseline's network: images are tokens of a codebook, and every token is predicted from those before.

The paper's comparison (section 4.2) after Chameleon (arXiv 2405.09818): one vocabulary of text and image tokens, one
embedding, one head. Which norms, mask and losses go with it is in the configuration (`config.families`).

B rows, S positions, A position axes, D width, I images, P tokens an image, h/w tokens a side, N targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from transfusion.config import CodecConfig, ModelConfig
from transfusion.model.attention import WHOLE_ROWS, Attend, Sharing
from transfusion.model.backbone import Backbone
from transfusion.model.block import TransformerBlock
from transfusion.model.heads import TextHead
from transfusion.model.patch_position import PatchPosition, image_grids
from transfusion.model.patches import Grid
from transfusion.schema import Batch


class TokenOutput(NamedTuple):
    """total: fp32 nats summed over all targets, with the gradient. text_sum, image_sum: its parts, without one."""

    total: Tensor
    text_sum: Tensor
    image_sum: Tensor


class Chameleon(Backbone):
    """Embeds text and image tokens into one row, runs the blocks, and predicts both from one head."""

    def __init__(
        self,
        config: ModelConfig,
        codec: CodecConfig,
        *,
        attend: Attend = WHOLE_ROWS,
        loss_chunk_size: int = 4096,
        activation_checkpointing: str = "none",
        z_loss: float = 0.0,
        sharing: Sharing | None = None,
    ) -> None:
        """`config.vocabulary` must be set. Image token c has id vocabulary + c. Weights are left uninitialised.

        Raises ValueError where ranks would share rows: not for this family.
        """
        if sharing is not None:
            raise ValueError("ranks do not share rows of image tokens")
        super().__init__()
        self.config, self.attend = config, attend
        self.recomputes_blocks = activation_checkpointing == "block"
        self.image_vocabulary = codec.codebook_size
        both = config.vocabulary + codec.codebook_size
        self.embedding = nn.Embedding(both, config.hidden_size)
        recomputes_attention = activation_checkpointing == "attention"
        self.blocks = nn.ModuleList(
            TransformerBlock(config, attend, recomputes_attention=recomputes_attention)
            for _ in range(config.layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_epsilon)
        tied = self.embedding if config.tie_embeddings else None
        self.lm_head = TextHead(config.hidden_size, both, loss_chunk_size, z_loss, tied=tied)
        self.patch_position = (
            None if config.patch_position == "none" else PatchPosition(config, image_grids(config, codec))
        )

    def forward(self, batch: Batch, tokens: Sequence[Tensor]) -> TokenOutput:
        """Losses of a batch. tokens: for each image group int64 [I, h, w].

        A token of an image is predicted at the position before it, the first one at <BOI>. An image of weight 0,
        which stands alone in a batch without images, is neither read nor predicted.
        """
        slot_N = torch.cat([group.patch_slot_IP.flatten() for group in batch.media])
        image_id_N = self.image_ids(torch.cat([token_Ihw.flatten() for token_Ihw in tokens]))
        grids = [Grid(*token_Ihw.shape) for token_Ihw in tokens]
        if not batch.counts.images:
            slot_N, image_id_N = slot_N[:0], image_id_N[:0]
            grids = [grid._replace(images=0) for grid in grids]
        id_N = batch.token_ids_BS.flatten().index_copy(0, slot_N, image_id_N)
        embedded = self.embedding(id_N)
        if self.patch_position is not None:
            embedded = embedded.index_copy(0, slot_N, self.patch_position(embedded[slot_N], grids))
        hidden_BSD = embedded.unflatten(0, batch.token_ids_BS.shape)
        grouping = self.grouping_of(batch)
        hidden_BSD = self.run_blocks(hidden_BSD, batch.position_BSA, batch.mask, grouping=grouping)
        flat = self.norm(hidden_BSD).flatten(0, 1)
        # The count is known on the host, so nothing waits for the device to tell it.
        texts = batch.counts.text_targets
        learned_N = torch.nonzero_static(batch.text_weight_BS.flatten(), size=texts).squeeze(1)
        source_N = torch.cat((learned_N, slot_N - 1))
        target_N = torch.cat((batch.target_ids_BS.flatten()[learned_N], image_id_N))
        total, nats_N = self.lm_head(flat[source_N], target_N, each=True)
        return TokenOutput(total, nats_N[:texts].sum(), nats_N[texts:].sum())

    def read_images(self, tokens: Sequence[Tensor]) -> Tensor:
        """Tokens, a tensor [I, h, w] for each shape, as context to read: embeddings [N, D], in order."""
        id_N = self.image_ids(torch.cat([token_Ihw.flatten() for token_Ihw in tokens]))
        return self.at_their_places(self.embedding(id_N), [Grid(*token_Ihw.shape) for token_Ihw in tokens])

    def image_ids(self, tokens: Tensor) -> Tensor:
        """Ids of image tokens, which stand behind those of the text."""
        return tokens + self.config.vocabulary
