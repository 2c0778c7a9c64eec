"""The U-Net encoder and decoder around the transformer (paper, section 3.2; its public facts are few).

Each way has two blocks of residual and self-attention layers, between them all the halvings that make a patch of
`patch_size` latent pixels. Norms are plain layer norms and the timestep is added in every residual layer, where the
paper replaced adaptive norms. The output of each block going down is a skip to the block of its resolution going up.

I images, H/W height and width at hand, C channels, T timestep features, D width of the transformer, N patches of all
images, M latent pixels of all images, E values a patch. Tensors of images are [I, H, W, C].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transfusion.config import ModelConfig
from transfusion.model.embedding import TimestepEmbedding
from transfusion.model.patches import Grid, patchify, unpatchify


class Convolution(nn.Conv2d):
    """3 x 3, on [I, H, W, C]."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, 3, padding=1)

    def forward(self, x_IHWC: Tensor) -> Tensor:
        return super().forward(x_IHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ResidualLayer(nn.Module):
    """Two convolutions, each behind a norm, and the timestep between them."""

    def __init__(self, channels_in: int, channels_out: int, timestep_features: int) -> None:
        super().__init__()
        self.first_norm = nn.LayerNorm(channels_in)
        self.first = Convolution(channels_in, channels_out)
        self.timestep = nn.Linear(timestep_features, channels_out)
        self.second_norm = nn.LayerNorm(channels_out)
        self.second = Convolution(channels_out, channels_out)
        same = channels_in == channels_out
        self.shortcut: nn.Module = nn.Identity() if same else nn.Linear(channels_in, channels_out)

    def forward(self, x_IHWC: Tensor, embedding_IT: Tensor) -> Tensor:
        inner = self.first(F.silu(self.first_norm(x_IHWC)))
        inner = inner + self.timestep(embedding_IT)[:, None, None]
        return self.shortcut(x_IHWC) + self.second(F.silu(self.second_norm(inner)))


class SelfAttention(nn.Module):
    """Every pixel of an image sees all others of it."""

    def __init__(self, channels: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.norm = nn.LayerNorm(channels)
        self.query_key_value = nn.Linear(channels, 3 * channels)
        self.merge = nn.Linear(channels, channels)

    def forward(self, x_IHWC: Tensor) -> Tensor:
        flat = self.query_key_value(self.norm(x_IHWC)).flatten(1, 2)
        query, key, value = flat.unflatten(2, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)
        return x_IHWC + self.merge(attended.transpose(1, 2).reshape(x_IHWC.shape))


class UNetBlock(nn.Module):
    """Residual and self-attention layers in turn, all at one resolution."""

    def __init__(self, channels_in: int, channels_out: int, config: ModelConfig) -> None:
        super().__init__()
        features, layers = timestep_features(config), range(config.unet.layers)
        inputs = [channels_out if layer else channels_in for layer in layers]
        self.residual = nn.ModuleList(ResidualLayer(each, channels_out, features) for each in inputs)
        self.attention = nn.ModuleList(SelfAttention(channels_out, config.unet.head_dim) for _ in layers)

    def forward(self, x_IHWC: Tensor, embedding_IT: Tensor) -> Tensor:
        for residual, attention in zip(self.residual, self.attention, strict=True):
            x_IHWC = attention(residual(x_IHWC, embedding_IT))
        return x_IHWC


class _Down(nn.Module):
    def __init__(self, config: ModelConfig, channels: int) -> None:
        super().__init__()
        fine, coarse = config.unet.widths
        self.timestep = TimestepEmbedding(timestep_features(config))
        self.enter = Convolution(channels, fine)
        self.fine = UNetBlock(fine, fine, config)
        self.coarse = UNetBlock(fine, coarse, config)


class _Up(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        fine, coarse = config.unet.widths
        self.timestep = TimestepEmbedding(timestep_features(config))
        self.enter = nn.Linear(config.hidden_size, coarse)
        self.coarse = UNetBlock(2 * coarse, coarse, config)
        self.fine = UNetBlock(coarse + fine, fine, config)


class UNetEncoder(nn.Module):
    """Noisy latents and their timestep to the transformer's width.

    One module for ZeRO, a leaf: what is inside is called once a group of images, so not equally often on all ranks.
    """

    def __init__(self, config: ModelConfig, patch_values: int) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.channels = patch_values // config.patch_size**2
        self.halvings = halvings(config.patch_size)
        self.unet = _Down(config, self.channels)
        self.norm = nn.LayerNorm(config.unet.widths[1])
        self.projection = nn.Linear(config.unet.widths[1], config.hidden_size)

    def forward(self, patch_NE: Tensor, timestep_I: Tensor, grids: Sequence[Grid]) -> tuple[Tensor, ...]:
        """Patches [N, E] to [N, D], group after group, and two skips [M, C], one of each block."""
        between, behind = self.halvings
        embedding_IT = F.silu(self.unet.timestep(timestep_I))
        parts = patch_NE.to(self.projection.weight.dtype).split(
            [grid.images * grid.patches for grid in grids]
        )
        embeddings = embedding_IT.split([grid.images for grid in grids])
        outputs = []
        for part_NE, embedding, grid in zip(parts, embeddings, grids, strict=True):
            height, width = grid.rows * self.patch_size, grid.columns * self.patch_size
            latent_ICHW = unpatchify(part_NE, self.channels, height, width, self.patch_size)
            fine = self.unet.fine(self.unet.enter(latent_ICHW.permute(0, 2, 3, 1)), embedding)
            coarse = self.unet.coarse(shrink(fine, between), embedding)
            patch = self.projection(self.norm(shrink(coarse, behind)))
            outputs.append([each.flatten(0, 2) for each in (patch, coarse, fine)])
        return tuple(torch.cat(each) for each in zip(*outputs, strict=True))


class UNetDecoder(nn.Module):
    """The transformer's width back to latents: the prediction. A leaf for ZeRO, as the encoder."""

    def __init__(self, config: ModelConfig, patch_values: int) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.halvings = halvings(config.patch_size)
        self.unet = _Up(config)
        self.norm = nn.LayerNorm(config.unet.widths[0])
        self.projection = Convolution(config.unet.widths[0], patch_values // config.patch_size**2)

    def forward(
        self, state_ND: Tensor, timestep_I: Tensor, grids: Sequence[Grid], skips: Sequence[Tensor]
    ) -> Tensor:
        """States [N, D] to patch values [N, E], with the timestep and the encoder's skips."""
        between, behind = self.halvings
        embedding_IT = F.silu(self.unet.timestep(timestep_I))
        coarse_skip, fine_skip = skips
        places = [grid.images * grid.patches for grid in grids]
        groups = zip(
            grids,
            embedding_IT.split([grid.images for grid in grids]),
            self.unet.enter(state_ND).split(places),
            coarse_skip.split([place << 2 * behind for place in places]),
            fine_skip.split([place << 2 * (between + behind) for place in places]),
            strict=True,
        )
        outputs = []
        for grid, embedding, state, coarse_part, fine_part in groups:
            coarse = grow(state.unflatten(0, grid), behind)
            coarse = torch.cat((coarse, coarse_part.view(coarse.shape)), dim=-1)
            fine = grow(self.unet.coarse(coarse, embedding), between)
            fine = torch.cat((fine, fine_part.view(*fine.shape[:3], -1)), dim=-1)
            latent = self.projection(F.silu(self.norm(self.unet.fine(fine, embedding))))
            outputs.append(patchify(latent.permute(0, 3, 1, 2), self.patch_size).flatten(0, 1))
        return torch.cat(outputs)


def timestep_features(config: ModelConfig) -> int:
    """Size of the U-Net's own embedding of the timestep; of the transformer's width nothing here depends."""
    return config.unet.widths[1]


def halvings(patch_size: int) -> tuple[int, int]:
    """How often the resolution is halved between the two blocks, and behind the second."""
    every = patch_size.bit_length() - 1
    return every - every // 2, every // 2


def shrink(x_IHWC: Tensor, times: int) -> Tensor:
    """Means over squares of 2^times pixels."""
    if not times:
        return x_IHWC
    return F.avg_pool2d(x_IHWC.permute(0, 3, 1, 2), 1 << times).permute(0, 2, 3, 1)


def grow(x_IHWC: Tensor, times: int) -> Tensor:
    """Each pixel as a square of 2^times."""
    return x_IHWC.repeat_interleave(1 << times, dim=1).repeat_interleave(1 << times, dim=2)
