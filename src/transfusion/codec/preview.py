"""A rough image from what the decoder reads, by one linear map in place of the decoder.

I images, C channels of images, D channels that the decoder reads, H/W height and width of images, h/w of latents.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from transfusion.codec import pixels
from transfusion.config.codec_folder import PREVIEW, read_facts
from transfusion.errors import UserError
from transfusion.files import atomic_write_text


@dataclass(frozen=True, slots=True)
class PreviewMap:
    """A colour in [-1, 1] for each place of the latents: weight_CD times its channels, plus bias_C.

    downscale: pixels a side of one place. explained: share of the variance of the `images` images it was fitted on,
    averaged down to the latent grid, that the map explains (R2).
    """

    weight_CD: list[list[float]]
    bias_C: list[float]
    downscale: int
    explained: float
    images: int

    def image(self, read_IDhw: Tensor) -> Tensor:
        """The colours, scaled up bilinearly: each is the mean of a square of pixels and stands in its middle.

        Args:
            read_IDhw: What the decoder reads, floating point.

        Returns:
            uint8 pixels [I, C, H, W].
        """
        weight_CD, bias_C = (
            torch.tensor(each, device=read_IDhw.device) for each in (self.weight_CD, self.bias_C)
        )
        colour_IChw = F.conv2d(read_IDhw.float(), weight_CD[:, :, None, None], bias_C)
        return pixels.decode(F.interpolate(colour_IChw, scale_factor=self.downscale, mode="bilinear"))

    def describe(self) -> str:
        """One line."""
        return f"preview map of {self.images} images explains {self.explained:.1%} of the variance of their colours"


def write_preview(folder: Path, found: PreviewMap) -> None:
    """Store the map in an autoencoder's folder, with the digest of the weights that it belongs to. Raises OSError."""
    values = asdict(found) | {"network": read_facts(folder).weights}
    atomic_write_text(folder / PREVIEW, json.dumps(values) + "\n")


def read_preview(folder: Path) -> PreviewMap | None:
    """The map of an autoencoder's folder. None: it has none, or one of other weights."""
    try:
        values = json.loads((folder / PREVIEW).read_text(encoding="utf-8"))
        network = values.pop("network")
        return PreviewMap(**values) if network == read_facts(folder).weights else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def open_preview(folder: Path) -> Callable[[Tensor], Tensor]:
    """`PreviewMap.image` of the folder's map. Without one, what it returns raises UserError when it is called."""
    if found := read_preview(folder):
        return found.image

    def refuse(read_IDhw: Tensor) -> Tensor:
        raise UserError(
            f"codec.folder {folder} has no preview map; fit one from images with"
            f" `transfusion codec encode {folder} SHARDS --out DIR`"
        )

    return refuse
