"""Latents to patch vectors and back, and the linear encoder and decoder around the transformer.

I images, C channels, H/W latent height and width, P patches, E values a patch (C * size * size), D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
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

    def forward(self, patches_IPE: Sequence[Tensor], timesteps_I: Sequence[Tensor]) -> list[Tensor]:
        """Patches [I, P, E] and timesteps [I] of each group of images to [I, P, D].

        All groups in one product: under ZeRO-3 every rank must gather the same weights the same number of
        times, however many groups its batch has.
        """
        dtype = self.projection.weight.dtype
        patches = [patch_IPE.to(dtype) for patch_IPE in patches_IPE]
        embedding_ID = self.timestep(torch.cat(list(timesteps_I)))
        embeddings = [part[:, None] for part in embedding_ID.split([len(group) for group in patches])]
        if self.after_projection:
            projected = _as_one(self.projection, patches)
            return [one + other for one, other in zip(projected, embeddings, strict=True)]
        return _as_one(self.projection, [one + other for one, other in zip(patches, embeddings, strict=True)])


class PatchDecoder(nn.Module):
    """The transformer's width back to patch values: the predicted noise."""

    def __init__(self, config: ModelConfig, patch_values: int) -> None:
        super().__init__()
        self.projection = nn.Linear(config.width, patch_values)

    def forward(self, states_IPD: Sequence[Tensor]) -> list[Tensor]:
        """States [I, P, D] of each group of images to patch values [I, P, E], in one product."""
        return _as_one(self.projection, states_IPD)


def _as_one(projection: nn.Linear, groups: Sequence[Tensor]) -> list[Tensor]:
    """The projection of tensors [I, P, features] that may differ in I and P, called once."""
    rows = torch.cat([group.flatten(0, 1) for group in groups])
    parts = projection(rows).split([group.shape[0] * group.shape[1] for group in groups])
    return [part.unflatten(0, group.shape[:2]) for part, group in zip(parts, groups, strict=True)]
