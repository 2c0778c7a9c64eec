"""A modality beside text and images, as the network reads and answers it.

I arrays, E values of a patch, H/W rows and columns of patches, N patches of all arrays, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from transfusion.config import ModalityConfig, ModelConfig
from transfusion.model.patch_position import PatchPosition
from transfusion.model.patches import Encoding, Grid, PatchDecoder, PatchEncoder, patchify


class MediaPatches(nn.Module):
    """Encoder and decoder of a modality whose latents are patches already, with places of its own."""

    def __init__(self, config: ModelConfig, modality: ModalityConfig) -> None:
        super().__init__()
        self.name = modality.name
        self.encoder = PatchEncoder(config, modality.patch_values)
        self.decoder = PatchDecoder(config, modality.patch_values)
        grids = [modality.sizes.grid(size) for size in modality.sizes.sizes]
        self.position = None if config.patch_position == "none" else PatchPosition(config, grids)

    def forward(self, noisy: Sequence[Tensor], timestep_I: Tensor) -> Encoding:
        """Noised latents, a tensor [I, E, H, W] for each shape, to encoded patches at their places."""
        grids = tuple(Grid.of(latent_IEHW, 1) for latent_IEHW in noisy)
        patch_NE = torch.cat([patchify(latent_IEHW, 1).flatten(0, 1) for latent_IEHW in noisy])
        (patch_ND,) = self.encoder(patch_NE, timestep_I, grids)
        patch_ND = patch_ND if self.position is None else self.position(patch_ND, grids)
        return Encoding(patch_ND, timestep_I, grids, (), self.name)
