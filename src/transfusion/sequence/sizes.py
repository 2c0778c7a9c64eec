"""Sizes that images and other media take: which one of several each takes, and how many patches that makes.

I images or other media, K sizes, C channels, H/W height and width of images, h/w of latents.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from transfusion.tokens import SpecialToken

Integers = NDArray[np.int64]

Resize = Literal["crop", "pad", "fit"]
# Shares of pixels that are cut away below this are not worth telling.
WORTH_TELLING = 0.1
# Of the longer side to the shorter one; images and sizes beyond are refused.
MAX_ASPECT = 20
# Width to height of the shapes that are proposed.
_SHAPES = ((1, 1), (4, 3), (3, 4), (3, 2), (2, 3), (16, 9), (9, 16), (2, 1), (1, 2), (3, 1), (1, 3))
_FORM = re.compile(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})")
# The name of the modality that is declared by `codec` and `diffusion`. Further ones are in `modalities`.
IMAGE = "image"


class Size(NamedTuple):
    """Of an image, in pixels, or of an array of another modality."""

    height: int
    width: int
    modality: str = IMAGE

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width."""
        return self.height, self.width

    @classmethod
    def parse(cls, text: str) -> Size:
        """`HEIGHTxWIDTH`, such as 32x48. Raises ValueError."""
        found = _FORM.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is not a size; write HEIGHTxWIDTH in pixels, such as 32x48")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        sides = f"{self.height}x{self.width}"
        return sides if self.modality == IMAGE else f"{self.modality} {sides}"


def nearest(sizes: Sequence[Size], height_I: NDArray[Any], width_I: NDArray[Any]) -> Integers:
    """Numbers [I] of the sizes with the aspect ratio nearest to that of each image.

    Among sizes of one ratio the area nearest to the image's decides, then the order. Distances are quotients of whole
    numbers, so that every machine chooses alike.
    """
    size_K2 = _sides(sizes)
    height_I, width_I = np.asarray(height_I, np.int64), np.asarray(width_I, np.int64)
    ratio_KI = _quotient(size_K2[:, :1] * width_I, size_K2[:, 1:] * height_I)
    area_KI = _quotient(size_K2.prod(axis=1, keepdims=True), height_I * width_I)
    # The sort is stable: the first of equals stays the first.
    chosen: Integers = np.lexsort((area_KI, ratio_KI), axis=0)[0]
    return chosen


def mean_share_cut(sizes: Sequence[Size], height_I: NDArray[Any], width_I: NDArray[Any]) -> float:
    """Share of an image's pixels that cropping to the nearest of these sizes takes away, mean over images."""
    height_I, width_I = np.asarray(height_I, np.int64), np.asarray(width_I, np.int64)
    size_I2 = _sides(sizes)[nearest(sizes, height_I, width_I)]
    return float((1 - 1 / _quotient(size_I2[:, 0] * width_I, size_I2[:, 1] * height_I)).mean())


def propose_sizes(height_I: NDArray[Any], width_I: NDArray[Any], *, side: int, step: int) -> list[Size]:
    """Sizes that suit these images: multiples of `step` of about the area of a square of `side`, most wanted first.

    As many shapes as at least a twentieth of the images each is nearest to.
    """
    shapes = []
    for columns, rows in _SHAPES:
        height = step * max(1, round(side * (rows / columns) ** 0.5 / step))
        shapes.append(Size(height, step * max(1, round(side * (columns / rows) ** 0.5 / step))))
    shapes = list(dict.fromkeys(shapes))
    taken = nearest(shapes, height_I, width_I)
    count_K = np.bincount(taken, minlength=len(shapes))
    order = np.argsort(-count_K, kind="stable")
    return [shapes[number] for number in order if count_K[number] >= max(1, len(taken) / 20)]


def _sides(sizes: Sequence[Size]) -> Integers:
    """Heights and widths [K, 2]."""
    return np.array([size.sides for size in sizes], np.int64)


def _quotient(a: Integers, b: Integers) -> NDArray[np.float64]:
    """The greater over the less: 1 where they are equal."""
    quotient: NDArray[np.float64] = np.maximum(a, b) / np.minimum(a, b)
    return quotient


@dataclass(frozen=True)
class OtherSizes:
    """The sizes of a further modality, each array of which is cut into blocks of height x width: one patch each.

    modality: its name. sizes: at least one. block: of the values of one patch.
    """

    modality: str
    sizes: tuple[Size, ...]
    block: tuple[int, int]

    def grid(self, size: Size) -> tuple[int, int]:
        """Rows and columns of patches of such an array."""
        return size.height // self.block[0], size.width // self.block[1]

    def numbers(self, height_I: NDArray[Any], width_I: NDArray[Any], is_array_I: NDArray[Any]) -> Integers:
        """Numbers [I] of the sizes of stored arrays, and of files, which take the narrowest that holds them.

        What has no size counts as the first, or as the widest: whoever reads it tells.
        """
        side_K2 = _sides(self.sizes)
        order_K = np.argsort(side_K2[:, 1], kind="stable")
        place_I = np.searchsorted(side_K2[order_K, 1], width_I).clip(max=len(order_K) - 1)
        return np.where(is_array_I, _exact(side_K2, height_I, width_I), order_K[place_I])


@dataclass(frozen=True)
class MediaSizes:
    """The sizes of a configuration, and how they are cut: the one place that says so.

    sizes: of images. downscale: pixels a side of one latent. patch_size: latents a side of one patch. vocabulary: ids
    of the model, whose last ones begin images of further sizes, and other media. resize: how an image of another shape
    comes to its size, see `codec.resize`. others: further modalities.
    """

    sizes: tuple[Size, ...]
    downscale: int
    patch_size: int
    vocabulary: int = 0
    resize: Resize = "crop"
    others: tuple[OtherSizes, ...] = ()

    @functools.cached_property
    def all(self) -> tuple[Size, ...]:
        """Of images, and behind them of all else."""
        return self.sizes + tuple(size for other in self.others for size in other.sizes)

    @functools.cached_property
    def modalities(self) -> tuple[str, ...]:
        """Names in the order of the configuration, that of images first."""
        return (IMAGE, *(other.modality for other in self.others))

    @property
    def first(self) -> Size:
        """What is drawn where no other is asked for."""
        return self.sizes[0]

    def first_of(self, modality: str) -> Size:
        """The same of another modality."""
        return next(size for size in self.all if size.modality == modality)

    @property
    def is_multi_size(self) -> bool:
        """Whether a block of patches may be of one size or of another."""
        return len(self.all) > 1

    def named(self) -> str:
        """All of them, for a message."""
        return " or ".join(map(str, self.sizes))

    def latents(self, size: Size) -> tuple[int, int]:
        """Height and width of the latents of such an image. A latent of other media is a patch."""
        if size.modality != IMAGE:
            return self._other[size.modality].grid(size)
        return size.height // self.downscale, size.width // self.downscale

    def grid(self, size: Size) -> tuple[int, int]:
        """Rows and columns of patches of such an image."""
        if size.modality != IMAGE:
            return self._other[size.modality].grid(size)
        height, width = self.latents(size)
        return height // self.patch_size, width // self.patch_size

    def patches(self, size: Size) -> int:
        """Patches of such an image."""
        rows, columns = self.grid(size)
        return rows * columns

    @functools.cached_property
    def _other(self) -> dict[str, OtherSizes]:
        return {other.modality: other for other in self.others}

    @functools.cached_property
    def size_by_begin_token(self) -> dict[int, Size]:
        """By the token that begins an image, the size of it: <BOI> for the first, the last ids for the others.

        Other media have the very last ids. So a model that speaks chooses size and modality as it chooses words, and a
        modality that is added to a model moves none of its tokens.
        """
        if self.is_multi_size and not self.vocabulary:
            raise ValueError("model.vocabulary must be known before images of several sizes begin")
        others = range(self.vocabulary - len(self.all) + 1, self.vocabulary)
        return dict(zip((int(SpecialToken.BEGIN_IMAGE), *others), self.all, strict=True))

    def begin_token(self, size: Size) -> int:
        """The token that begins such an image."""
        return self._begins[size]

    def is_image(self, begin: int) -> bool:
        """Whether this token begins an image, and no other media."""
        return not self.others or self.size_by_begin_token[begin].modality == IMAGE

    @functools.cached_property
    def _begins(self) -> dict[Size, int]:
        return {size: token for token, size in self.size_by_begin_token.items()}

    @functools.cached_property
    def patches_K(self) -> Integers:
        """Patches of an image of each size, and of all other media."""
        return np.array([self.patches(size) for size in self.all], np.int64)

    def of(self, values: Any) -> Size | None:
        """The size of images with such pixels (uint8 [C, H, W]), latents (float [C, h, w]) or tokens (wider, [h, w]).

        None: no one's.
        """
        *_, height, width = values.shape
        pixels = values.dtype.itemsize == 1
        size = Size(height, width) if pixels else Size(height * self.downscale, width * self.downscale)
        return size if size in self.sizes else None

    def for_image(self, height: int, width: int) -> Size:
        """The size that an image takes."""
        return self.sizes[int(nearest(self.sizes, np.array([height]), np.array([width]))[0])]

    def rotated(self, size: Size) -> Size:
        """What an image of this size takes where it was stored on its side: it has as many patches."""
        return self._turned[size]

    @functools.cached_property
    def _turned(self) -> dict[Size, Size]:
        turned = {size: Size(size.width, size.height) for size in self.sizes}
        return {size: other if other in self.sizes else size for size, other in turned.items()}

    def numbers(
        self,
        height_I: NDArray[Any],
        width_I: NDArray[Any],
        is_latent_I: NDArray[Any],
        modality_I: NDArray[Any] | None = None,
    ) -> Integers:
        """Numbers [I] in `all` of the sizes of stored images and latents, by the height and width that they have there.

        Latents and arrays of no size count as the first of their modality: whoever reads them tells.
        modality_I: which of `modalities` each is. None: all are images.
        """
        number_I = nearest(self.sizes, height_I, width_I)
        if is_latent_I.any():
            latent_K2 = np.array([self.latents(size) for size in self.sizes], np.int64)
            number_I = np.where(is_latent_I, _exact(latent_K2, height_I, width_I), number_I)
        if modality_I is not None and modality_I.any():
            first = len(self.sizes)
            for turn, other in enumerate(self.others):
                own_I = first + other.numbers(height_I, width_I, is_latent_I)
                number_I = np.where(modality_I == turn + 1, own_I, number_I)
                first += len(other.sizes)
        return number_I


def _exact(side_K2: Integers, height_I: NDArray[Any], width_I: NDArray[Any]) -> Integers:
    """Which of these heights and widths each has. 0: none."""
    fits_KI = (side_K2[:, :1] == height_I) & (side_K2[:, 1:] == width_I)
    return np.asarray(fits_KI.argmax(axis=0), np.int64)
