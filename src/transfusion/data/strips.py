"""Pictures of a row decoded together: of small ones calls and conversions cost as much as the work itself.

To a resampler that goes down the columns, pictures side by side are one picture, and all bytes are alike. So both of
Pillow's passes, across and then down, are made passes down, which is the faster kind, and over pixels of four bytes,
whatever these are.
Shape suffixes: N pictures, H and W height and width of what is used of them, h and w as wanted, P colours and alpha of
a pixel, C colours, B bytes side by side.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from transfusion.data.images import decode as single
from transfusion.data.images.decode import DecodeFault, Picture
from transfusion.sequence.sizes import Size

# Bytes of pictures held together. More would leave the processor's cache, and be fresh memory at each step.
_STRIP_BYTES = 3 << 17
_FEWEST = 2
# Bytes of files read before any is decoded: changing between the two for each costs more than holding a few.
_FILE_BYTES = 1 << 20


class _File(NamedTuple):
    """A picture that is to be decoded. turned: its size where it was stored on its side."""

    place: Hashable
    data: bytes
    size: Size
    turned: Size | None


class Strips:
    """Decodes pictures, and finishes those of one size together; each as `decode_to` would.

    channels: 1 grey, 3 colour.
    """

    def __init__(self, *, channels: int) -> None:
        self._channels = channels
        self._files: list[_File] = []
        self._file_bytes = 0
        # By the shape that pictures have, and the size that they are to have.
        self._strips: dict[tuple[tuple[int, ...], Size], list[tuple[Hashable, Picture]]] = {}
        self._done: dict[Hashable, Picture] = {}
        self._faults: dict[Hashable, DecodeFault] = {}

    def add(self, place: Hashable, data: bytes, size: Size, turned: Size | None = None) -> None:
        """A picture, whose values `finish` will give under this place, of the size or, where it was stored on its
        side, of the other one."""
        self._files.append(_File(place, data, size, turned))
        self._file_bytes += len(data)
        if self._file_bytes >= _FILE_BYTES:
            self._decode()

    def finish(self) -> tuple[dict[Hashable, Picture], dict[Hashable, DecodeFault]]:
        """Pictures since the last call, uint8 [channels, height, width], and what is wrong with others, by place."""
        self._decode()
        while self._strips:
            (_, size), strip = self._strips.popitem()
            self._finish(strip, size)
        finished = self._done, self._faults
        self._done, self._faults = {}, {}
        return finished

    def _decode(self) -> None:
        for file in self._files:
            try:
                self._open(file)
            except DecodeFault as fault:
                self._faults[file.place] = fault
        self._files.clear()
        self._file_bytes = 0

    def _open(self, file: _File) -> None:
        picture, on_its_side = single.opened(file.data)
        size = file.turned if file.turned and on_its_side else file.size
        if isinstance(picture, Image.Image) or (most := self._most_together(picture.shape, size)) < _FEWEST:
            self._done[file.place] = single.brought_to_size(picture, size, channels=self._channels)
            return
        kind = picture.shape, size
        strip = self._strips.setdefault(kind, [])
        strip.append((file.place, picture))
        if len(strip) == most:
            self._finish(self._strips.pop(kind), size)

    def _most_together(self, shape: tuple[int, ...], size: Size) -> int:
        """How many such pictures make a strip; 0: they are no kind for one."""
        _, _, height, width = single.middle(*shape[:2], size)
        if self._channels == 1 or height == size.height or width == size.width:
            return 0
        return _STRIP_BYTES // max(math.prod(shape), self._channels * size.height * size.width)

    def _finish(self, strip: Sequence[tuple[Hashable, Picture]], size: Size) -> None:
        if len(strip) < _FEWEST:
            for place, picture in strip:
                self._done[place] = single.brought_to_size(picture, size, channels=self._channels)
            return
        height, width, _ = strip[0][1].shape
        top, left, rows, columns = single.middle(height, width, size)
        middle = np.s_[top : top + rows, left : left + columns]
        values_NCHW = resampled(np.stack([picture[middle] for _, picture in strip]), *size)
        self._done.update((place, values) for (place, _), values in zip(strip, values_NCHW, strict=True))


def resampled(pictures_NHWP: Picture, height: int, width: int) -> Picture:
    """Pictures, [blue green red] or with alpha, on white, as uint8 [N, 3, height, width], bicubic."""
    opencv, (count, before, across, depth) = single.opencv, pictures_NHWP.shape
    below = pictures_NHWP.reshape(count * before, across, depth)
    blue, green, red, *alpha = opencv.split(opencv.transpose(below))
    colours = [single.colours_on_white(colour, *alpha) if alpha else colour for colour in (red, green, blue)]
    across_wB = _down(np.concatenate(colours, axis=1), width)
    lines_CNHw = opencv.transpose(across_wB).reshape(3, count, before, width)
    beside_HB = _moved(lines_CNHw, (2, 0, 1)).reshape(before, -1)
    lines_hCNw = _down(beside_HB, height).reshape(height, 3, count, width)
    return _moved(lines_hCNw, (2, 1, 0))


def _moved(lines: Picture, order: tuple[int, ...]) -> Picture:
    """Whole lines, [..., w], in another order of the other axes."""
    line = f"V{lines.shape[-1]}"
    return np.ascontiguousarray(lines.view(line)[..., 0].transpose(order))[..., None].view(np.uint8)


def _down(lines_HB: Picture, height: int) -> Picture:
    """To another height. Bytes side by side are resampled alike, whatever they are; fastest as pixels of four."""
    mode, depth = ("L", 1) if lines_HB.shape[1] % 4 else ("CMYK", 4)
    size = lines_HB.shape[1] // depth, len(lines_HB)
    picture = Image.frombuffer(mode, size, lines_HB, "raw", mode, 0, 1)
    resized = picture.resize((size[0], height), Image.Resampling.BICUBIC)
    return np.frombuffer(resized.tobytes(), np.uint8).reshape(height, -1)
