"""Where in its image a patch stands, added to the encoded patch.

Rotary positions tell a patch how far it is from others. Where in its image it stands it must infer from its distance to
<BOI>. The paper names nothing else.

N patches of all images, P patches an image, D width, R rows, C columns, E values of a row or column, F frequencies.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from transfusion.config import CodecConfig, ModelConfig
from transfusion.model.embedding import sinusoid_angles
from transfusion.model.patches import Grid


def image_grids(config: ModelConfig, codec: CodecConfig) -> list[tuple[int, int]]:
    """Rows and columns of patches of images of each size."""
    shapes = [codec.latent_shape(*size.sides) for size in codec.sizes]
    return [(height // config.patch_size, width // config.patch_size) for _, height, width in shapes]


class PatchPosition(nn.Module):
    """Adds to each patch the encoding of its row and its column, times a learned gain.

    Rows and columns count from the middle of the image, in images of all sizes alike. `sincos`: half of the
    width tells the row and half the column, by sines and cosines of geometric wavelengths (Vaswani et al., 2017,
    section 3.5, in two dimensions). `learned`: a vector a row and a vector a column are added.
    """

    def __init__(self, config: ModelConfig, grids: Sequence[tuple[int, int]]) -> None:
        """grids: rows and columns of patches, of each size."""
        super().__init__()
        self.hidden_size = config.hidden_size
        self.gain = nn.Parameter(torch.empty(1))
        self.is_learned = config.patch_position == "learned"
        if self.is_learned:
            rows, columns = map(max, zip(*grids, strict=True))
            self.row = nn.Parameter(torch.empty(rows, config.hidden_size))
            self.column = nn.Parameter(torch.empty(columns, config.hidden_size))

    def forward(self, patch_ND: Tensor, grids: Sequence[Grid], at: int | None = None) -> Tensor:
        """Patches [N, D], group after group, each at its place.

        at: patch_ND has only this patch of each image.
        """
        places = []
        for grid in grids:
            place_PD = self.gain * self._places(grid, at, patch_ND.device).to(patch_ND.dtype)
            places.append(place_PD.expand(grid.images, -1, -1).flatten(0, 1))
        return patch_ND + torch.cat(places)

    def _places(self, grid: Grid, at: int | None, device: torch.device) -> Tensor:
        """The encoding [P, D] of every patch of an image, row by row, or of the one at `at`."""
        half = self.hidden_size // 2
        if self.is_learned:
            row_RE, column_CE = _middle(self.row, grid.rows), _middle(self.column, grid.columns)
        else:
            row_RE, column_CE = _waves(grid.rows, half, device), _waves(grid.columns, half, device)
        if at is not None:
            row, column = divmod(at, grid.columns)
            row_RE, column_CE = row_RE[row : row + 1], column_CE[column : column + 1]
        if self.is_learned:
            return (row_RE[:, None] + column_CE).flatten(0, 1)
        shape = (len(row_RE), len(column_CE), half)
        both = (row_RE[:, None].expand(shape), column_CE.expand(shape))
        return torch.cat(both, dim=-1).flatten(0, 1)


def _middle(vector_PD: Tensor, places: int) -> Tensor:
    """The middle ones of the vectors; where they cannot be, half a place before."""
    assert places <= len(vector_PD), "not a size of this model"
    first = (len(vector_PD) - places) // 2
    return vector_PD[first : first + places]


def _waves(places: int, values: int, device: torch.device) -> Tensor:
    """Sines and cosines [P, values] in fp32 of rows or columns, counted from the middle one."""
    place_P = torch.arange(places, device=device, dtype=torch.float32) - (places - 1) / 2
    angle_PF = sinusoid_angles(place_P, -(-values // 2))
    return torch.cat((angle_PF.sin(), angle_PF.cos()), dim=-1)[:, :values]
