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

# Values held together. More would leave the processor's cache, and be fresh memory at each step.
_STRIP_BYTES = 1 << 18
_FEWEST = 2


class Strips:
    """Decodes pictures one by one and finishes those of one size together; each as `decode` would.

    channels: 1 grey, 3 colour. image_size: of all results.
    """

    def __init__(self, *, channels: int, image_size: int) -> None:
        self._channels, self._image_size = channels, image_size
        self._waiting: dict[tuple[int, ...], list[tuple[Hashable, Picture]]] = {}
        self._done: dict[Hashable, Picture] = {}

    def add(self, place: Hashable, data: bytes) -> None:
        """Decode a picture, whose values `finish` will give under this place. Raises DecodeFault."""
        picture = single.opened(data)
        if isinstance(picture, Image.Image) or not self._is_for_strip(picture):
            self._done[place] = self._alone(picture)
            return
        strip = self._waiting.setdefault(picture.shape, [])
        strip.append((place, picture))
        if (len(strip) + 1) * picture.nbytes > _STRIP_BYTES:
            self._finish(self._waiting.pop(picture.shape))

    def finish(self) -> dict[Hashable, Picture]:
        """All pictures since the last call, uint8 [channels, image_size, image_size], by place."""
        while self._waiting:
            self._finish(self._waiting.popitem()[1])
        done, self._done = self._done, {}
        return done

    def _is_for_strip(self, picture: Picture) -> bool:
        is_small = _FEWEST * picture.nbytes <= _STRIP_BYTES
        return is_small and self._channels != 1 and min(picture.shape[:2]) != self._image_size

    def _finish(self, strip: Sequence[tuple[Hashable, Picture]]) -> None:
        if len(strip) < _FEWEST:
            self._done.update((place, self._alone(picture)) for place, picture in strip)
            return
        values_NCHW = resampled(
            [_centre_square(picture) for _, picture in strip], self._image_size, self._image_size
        )
        self._done.update((place, values) for (place, _), values in zip(strip, values_NCHW, strict=True))

    def _alone(self, picture: Image.Image | Picture) -> Picture:
        return single.brought_to_size(picture, channels=self._channels, image_size=self._image_size)


def _centre_square(picture: Picture) -> Picture:
    height, width, _ = picture.shape
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    return picture[top : top + side, left : left + side]


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
