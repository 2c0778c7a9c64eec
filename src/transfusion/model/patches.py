"""Latents to patch vectors and back, and the linear encoder and decoder around the transformer.

I images, C channels, H/W latent height and width, P patches, E values a patch (C * size * size), D width,
N patches of all images. Encoder and decoder take the patches of all groups of images as one tensor, and give one:
under ZeRO-3 every rank must call the same modules, with as many tensors in and out, however many groups its batch has.
An encoder also gives what its decoder needs again beside the patches, its skips: none here, see `unet`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from transfusion.config import ModelConfig
from transfusion.model.embedding import TimestepEmbedding
from transfusion.sequence.sizes import IMAGE


class Grid(NamedTuple):
    """A group of images of one shape, in patches."""

    images: int
    rows: int
    columns: int

    @classmethod
    def of(cls, latent_ICHW: Tensor, size: int) -> Grid:
        images, _, height, width = latent_ICHW.shape
        return cls(images, height // size, width // size)

    @property
    def patches(self) -> int:
        """Patches of one image."""
        return self.rows * self.columns


class Encoding(NamedTuple):
    """Encoded patches [N, D] of all groups of images, and what the decoder is told of them beside their states."""

    patch_ND: Tensor
    timestep_I: Tensor
    grids: tuple[Grid, ...]
    skips: tuple[Tensor, ...]
    modality: str = IMAGE

    def with_copies(self, chosen: Sequence[int]) -> Encoding:
        """The images of one group, and behind them some once more, as the other branch of guidance needs them."""
        if not chosen:
            return self
        ((images, rows, columns),) = self.grids

        def extended(x: Tensor) -> Tensor:
            """x: of all images, one after another."""
            each = x.unflatten(0, (images, -1))
            return torch.cat((x, *(each[number] for number in chosen)))

        return Encoding(
            extended(self.patch_ND),
            extended(self.timestep_I),
            (Grid(images + len(chosen), rows, columns),),
            tuple(extended(skip) for skip in self.skips),
            self.modality,
        )


def patchify(latent_ICHW: Tensor, size: int) -> Tensor:
    """Cut into patches [I, P, E], left to right, top to bottom; E runs over channel, row, column."""
    images, channels, height, width = latent_ICHW.shape
    grid = latent_ICHW.reshape(images, channels, height // size, size, width // size, size)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(images, -1, channels * size * size)


def unpatchify(patch_IPE: Tensor, channels: int, height: int, width: int, size: int) -> Tensor:
    """Inverse of `patchify`: [I, C, H, W]."""
    grid = patch_IPE.reshape(-1, height // size, width // size, channels, size, size)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, height, width)


def unpatchify_groups(patch_NE: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Patch values, group after group, as images [I, C, H, W] of the shapes of `like`."""
    values = patch_NE.shape[1]
    parts = patch_NE.split([latent_ICHW.numel() // values for latent_ICHW in like])
    images = []
    for part_NE, latent_ICHW in zip(parts, like, strict=True):
        _, channels, height, width = latent_ICHW.shape
        images.append(unpatchify(part_NE, channels, height, width, math.isqrt(values // channels)))
    return tuple(images)


class PatchEncoder(nn.Module):
    """Noisy patches and their timestep to the transformer's width.

    `projected` adds the timestep embedding after the projection, the form that the paper's parameter counts
    imply (table 7); `patch` adds it to the raw patch vector, as the paper's footnote 6 reads.
    """

    def __init__(self, config: ModelConfig, patch_values: int) -> None:
        super().__init__()
        self.after_projection = config.timestep_embedding == "projected"
        self.projection = nn.Linear(patch_values, config.hidden_size)
        self.timestep = TimestepEmbedding(config.hidden_size if self.after_projection else patch_values)

    def forward(self, patch_NE: Tensor, timestep_I: Tensor, grids: Sequence[Grid]) -> tuple[Tensor, ...]:
        """Patches [N, E] to [N, D], group after group, and no skips; timestep_I: of all images."""
        embedding_ID = self.timestep(timestep_I)
        groups = zip(embedding_ID.split([grid.images for grid in grids]), grids, strict=True)
        embedding_ND = torch.cat(
            [part[:, None].expand(-1, grid.patches, -1).flatten(0, 1) for part, grid in groups]
        )
        patch_NE = patch_NE.to(self.projection.weight.dtype)
        if self.after_projection:
            return (self.projection(patch_NE) + embedding_ND,)
        return (self.projection(patch_NE + embedding_ND),)


class PatchDecoder(nn.Module):
    """The transformer's width back to patch values: the prediction."""

    def __init__(self, config: ModelConfig, patch_values: int) -> None:
        super().__init__()
        self.projection = nn.Linear(config.hidden_size, patch_values)

    def forward(
        self, state_ND: Tensor, timestep_I: Tensor, grids: Sequence[Grid], skips: Sequence[Tensor]
    ) -> Tensor:
        """States [N, D] to patch values [N, E]; all else is for other decoders."""
        return self.projection(state_ND)
