"""Small pictures of one size flattened and resampled together: calls and conversions cost as much there as the work.

To a resampler that goes down the columns, pictures side by side are one picture. So both of Pillow's passes, across
and then down, are made passes down, which is also the faster kind.
Shape suffixes: N pictures, H and W height and width as stored, h and w as wanted, P the four bytes of a pixel.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from PIL import Image

from transfusion.data import decode as single
from transfusion.data.decode import Picture
from transfusion.sizes import Size

# Values held together. More would leave the processor's cache, and be fresh memory at each step.
_STRIP_BYTES = 1 << 18
_FEWEST = 2


class Strips:
    """Decodes pictures one by one and finishes those of one size together; each as `decode_to` would.

    channels: 1 grey, 3 colour.
    """

    def __init__(self, *, channels: int) -> None:
        self._channels = channels
        # By the shape that they have, and the size that they are to have.
        self._waiting: dict[tuple[tuple[int, ...], Size], list[tuple[Hashable, Picture]]] = {}
        self._done: dict[Hashable, Picture] = {}

    def add(self, place: Hashable, data: bytes, size: Size, turned: Size | None = None) -> None:
        """Decode a picture, whose values `finish` will give under this place, of the size or, where it was stored on
        its side, of the other one. Raises DecodeFault."""
        picture, on_its_side = single.opened(data)
        size = turned if turned and on_its_side else size
        if isinstance(picture, Image.Image) or not self._is_for_strip(picture, size):
            self._done[place] = single.brought_to_size(picture, size, channels=self._channels)
            return
        kind = picture.shape, size
        strip = self._waiting.setdefault(kind, [])
        strip.append((place, picture))
        if (len(strip) + 1) * picture.nbytes > _STRIP_BYTES:
            self._finish(self._waiting.pop(kind), size)

    def finish(self) -> dict[Hashable, Picture]:
        """All pictures since the last call, uint8 [channels, height, width], by place."""
        while self._waiting:
            (_, size), strip = self._waiting.popitem()
            self._finish(strip, size)
        done, self._done = self._done, {}
        return done

    def _is_for_strip(self, picture: Picture, size: Size) -> bool:
        is_small = _FEWEST * picture.nbytes <= _STRIP_BYTES
        _, _, height, width = single.middle(picture.shape[0], picture.shape[1], size)
        return is_small and self._channels != 1 and height != size.height and width != size.width

    def _finish(self, strip: Sequence[tuple[Hashable, Picture]], size: Size) -> None:
        if len(strip) < _FEWEST:
            self._done.update(
                (place, single.brought_to_size(picture, size, channels=self._channels))
                for place, picture in strip
            )
            return
        values_NCHW = resampled([_middle(picture, size) for _, picture in strip], *size)
        self._done.update((place, values) for (place, _), values in zip(strip, values_NCHW, strict=True))


def _middle(picture: Picture, size: Size) -> Picture:
    top, left, height, width = single.middle(picture.shape[0], picture.shape[1], size)
    return picture[top : top + height, left : left + width]


def resampled(pictures: Sequence[Picture], height: int, width: int) -> Picture:
    """Pictures of one size, [H, W, blue green red] or with alpha, on white, as uint8 [N, 3, height, width], bicubic."""
    opencv, (before, _, depth) = single.opencv, pictures[0].shape
    values = np.concatenate(pictures)
    if depth == single.WITH_ALPHA:
        flat = single.alpha_on_white(values)
    else:
        flat = opencv.cvtColor(values, opencv.COLOR_BGR2BGRA)
    across_wNHP = np.frombuffer(_down(opencv.transpose(flat), width).tobytes("raw", "RGBX"), np.uint8)
    below_NHw = opencv.transpose(across_wNHP.reshape(width, -1, 4)).view(np.uint32).reshape(-1, before, width)
    beside_HNw = np.ascontiguousarray(below_NHw.swapaxes(0, 1)).view(np.uint8)
    lines = _down(beside_HNw.reshape(before, -1, 4), height).tobytes("raw", "RGB;L")
    lines_hCNw = np.frombuffer(lines, np.uint8).reshape(height, 3, -1, width)
    return np.ascontiguousarray(lines_hCNw[:, ::-1].transpose(2, 1, 0, 3))


def _down(pixels_HWP: Picture, height: int) -> Image.Image:
    """To another height; the fourth byte of a pixel is nothing."""
    width = pixels_HWP.shape[1]
    picture = Image.frombytes("RGB", (width, len(pixels_HWP)), pixels_HWP, "raw", "RGBX")
    return picture.resize((width, height), Image.Resampling.BICUBIC)
