"""What every model family has between its embeddings and its heads: places in images, rotary positions, the blocks.

B rows, S positions, A position axes, D width, N patches of all images.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from transfusion.config import Config, ModelConfig
from transfusion.model.attention import Attend, Mask
from transfusion.model.embedding import rotation
from transfusion.model.grouping import ALL_TEXT, Grouping
from transfusion.model.heads import TextHead
from transfusion.model.patch_position import PatchPosition
from transfusion.model.patches import Grid
from transfusion.schema import Batch


class Backbone(nn.Module, ABC):
    """Families build these parts themselves, each in its own order."""

    config: ModelConfig
    attend: Attend
    recomputes_blocks: bool
    embedding: nn.Embedding
    patch_position: PatchPosition | None
    blocks: nn.ModuleList
    norm: nn.RMSNorm
    lm_head: TextHead

    @abstractmethod
    def read_images(self, encoded: Sequence[Tensor]) -> Tensor:
        """What the codec made of images, a tensor for each shape, as context to read: [N, D], in order."""

    def at_their_places(self, patch_ND: Tensor, grids: Sequence[Grid], at: int | None = None) -> Tensor:
        """Patches, or image tokens, told where in their images they stand; see `PatchPosition.forward`."""
        return patch_ND if self.patch_position is None else self.patch_position(patch_ND, grids, at)

    def run_blocks(
        self,
        hidden_BSD: Tensor,
        position_BSA: Tensor,
        mask: Mask,
        layers: Sequence[Attend] | None = None,
        grouping: Grouping = ALL_TEXT,
    ) -> Tensor:
        """All blocks. The final norm is the caller's.

        layers: the attention of each, such as a cache. grouping: which positions are of images, for
        `model.modality_weights`.
        """
        if self.config.modality_weights == "shared":
            grouping = ALL_TEXT
        hidden = grouping.ordered(hidden_BSD)
        config = self.config
        turn = rotation(position_BSA, config.head_width, config.rope_theta, config.rope_scaling)
        for layer, block in enumerate(self.blocks):
            if self.recomputes_blocks and torch.is_grad_enabled():
                inputs = (hidden, *turn, mask, None, grouping)
                hidden = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                attend = None if layers is None else layers[layer]
                hidden = block(hidden, *turn, mask, attend, grouping)
        return grouping.in_rows(hidden, len(hidden_BSD))

    def grouping_of(self, batch: Batch) -> Grouping:
        """Which positions of a batch have weights of images, as `run_blocks` takes it."""
        return ALL_TEXT if self.config.modality_weights == "shared" else Grouping.of_batch(batch)


def is_of_text(name: str) -> bool:
    """Whether text passes through this parameter: whether `train.freeze=[text]` keeps it as it is."""
    return not name.startswith(("patch_", "media.")) and ".image_" not in name


def compile_blocks(model: Backbone, config: Config) -> None:
    """Compile each block's forward for training; sampling, whose shapes change all the time, stays eager.

    The forward and not the module is compiled, so that ZeRO's hooks stay outside of the graph.
    """
    # Own weights and noised copies see how many patches a batch has. What differs then is taken as a symbol.
    varies = config.model.modality_weights != "shared" or config.diffusion.context == "clean"
    for block in model.blocks:
        block.forward = _compiled_when_training(block, None if varies else False)


def _compiled_when_training(block: nn.Module, dynamic: bool | None) -> Callable[..., Tensor]:
    eager = block.forward
    compiled = torch.compile(eager, dynamic=dynamic)

    def forward(*arguments: Any) -> Tensor:
        return (compiled if torch.is_grad_enabled() else eager)(*arguments)

    return forward
