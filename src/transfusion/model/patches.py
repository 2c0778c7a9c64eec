"""Latents to patch vectors and back, and the linear encoder and decoder around the transformer.

I images, C channels, H/W latent height and width, P patches, E values a patch (C * size * size), D width.
"""

from __future__ import annotations

from torch import Tensor, nn

from transfusion.config import ModelConfig
from transfusion.model.embedding import TimestepEmbedding


def patchify(latent_ICHW: Tensor, size: int) -> Tensor:
    """Cut into patches [I, P, E], left to right, top to bottom; E runs over channel, row, column."""
    images, channels, height, width = latent_ICHW.shape
    grid = latent_ICHW.reshape(images, channels, height // size, size, width // size, size)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(images, -1, channels * size * size)


def unpatchify(patch_IPE: Tensor, channels: int, height: int, width: int, size: int) -> Tensor:
    """Inverse of `patchify`: [I, C, H, W]."""
    grid = patch_IPE.reshape(-1, height // size, width // size, channels, size, size)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, height, width)


class PatchEncoder(nn.Module):
    """Noisy patches and their timestep to the transformer's width.

    `projected` adds the timestep embedding after the projection, the form that the paper's parameter counts
    imply (table 7); `patch` adds it to the raw patch vector, as the paper's footnote 6 reads.
    """

    def __init__(self, config: ModelConfig, patch_values: int) -> None:
        super().__init__()
        self.after_projection = config.timestep_embedding == "projected"
        self.projection = nn.Linear(patch_values, config.width)
        self.timestep = TimestepEmbedding(config.width if self.after_projection else patch_values)

    def forward(self, patch_IPE: Tensor, timestep_I: Tensor) -> Tensor:
        """[I, P, E] and timesteps [I] to [I, P, D]."""
        embedding = self.timestep(timestep_I)[:, None]
        patch_IPE = patch_IPE.to(self.projection.weight.dtype)
        if self.after_projection:
            return self.projection(patch_IPE) + embedding
        return self.projection(patch_IPE + embedding)


class PatchDecoder(nn.Module):
    """The transformer's width back to patch values: the predicted noise."""

    def __init__(self, config: ModelConfig, patch_values: int) -> None:
        super().__init__()
        self.projection = nn.Linear(config.width, patch_values)

    def forward(self, x_IPD: Tensor) -> Tensor:
        return self.projection(x_IPD)
