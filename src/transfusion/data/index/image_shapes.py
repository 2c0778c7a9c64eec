"""What bringing images to their sizes cuts away, and which sizes would cut less.

I images.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from transfusion.data.index.source_index import SourceIndex
from transfusion.sequence.sizes import IMAGE, WORTH_TELLING, MediaSizes, mean_share_cut, propose_sizes

# So many shards of a source are looked at, evenly spread.
_SHARDS = 64


class Shapes(NamedTuple):
    """Stored heights and widths [I] of images in pixels."""

    height_I: NDArray[Any]
    width_I: NDArray[Any]


def shapes_of(index: SourceIndex) -> Shapes:
    """Of the images of a source that are stored as images, those of `_SHARDS` of its shards."""
    step = max(1, len(index.shards) // _SHARDS)
    parts = [index.part(number) for number in range(0, len(index.shards), step)]
    are_images = [(part["latent_channels_I"] == 0) & (part.modality_I((IMAGE,)) == 0) for part in parts]
    joined = [
        np.concatenate([part[name][which_I] for part, which_I in zip(parts, are_images, strict=True)])
        for name in ("image_height_I", "image_width_I")
    ]
    return Shapes(*(sides_I.astype(np.int64) for sides_I in joined))


def cut_away(index: SourceIndex, sizes: MediaSizes) -> str:
    """What cropping takes away of a source's images, and what would take less. Empty where it is little."""
    shapes = shapes_of(index)
    if sizes.resize != "crop" or not len(shapes.height_I):
        return ""
    cut = mean_share_cut(sizes.sizes, *shapes)
    if cut < WORTH_TELLING:
        return ""
    return (
        f"source {index.name}: {cut:.0%} of the pixels are cut away, since images become {sizes.named()};"
        f" {better_sizes(shapes, sizes)}codec.resize=pad cuts nothing"
    )


def better_sizes(shapes: Shapes, sizes: MediaSizes) -> str:
    """Sizes of about the area of the first that suit the images, as a configuration names them."""
    side = round(math.sqrt(sizes.first.height * sizes.first.width))
    proposed = propose_sizes(*shapes, side=side, step=sizes.downscale * sizes.patch_size)
    if set(proposed) <= set(sizes.sizes):
        return ""
    named = ",".join(map(str, proposed))
    return f"codec.image_sizes=[{named}] cuts {mean_share_cut(proposed, *shapes):.0%}, "
