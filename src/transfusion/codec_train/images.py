"""The images of shards at one size, in an order that depends on seed and step alone.

I images, C channels, H/W height and width.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from transfusion.data.images.decode import PixelArray, decode
from transfusion.data.images.probe import probe
from transfusion.data.shards.sample import SampleError
from transfusion.data.shards.scan import groups, pick_shards
from transfusion.data.shards.tar import TarWalk
from transfusion.data.shards.validate import IMAGE_EXTENSIONS
from transfusion.data.shards.webdataset import expand
from transfusion.errors import UserError

# Decoded images are kept up to this size.
_KEPT_BYTES = 1 << 30
# An image that cannot be decoded is replaced by the next that can; so many in a row are no accident.
_MAX_RUN = 100


class _Place(NamedTuple):
    shard: int
    start: int
    size: int


class ImageSet:
    """Images of webdataset shards by number, decoded when asked for."""

    def __init__(
        self, shards: str | Sequence[str], *, channels: int, image_size: int, workers: int = 1
    ) -> None:
        """Reads the heads of all members once. Raises UserError where there are no shards or no images."""
        self._paths = pick_shards(expand(shards), "codec train", (".tar",))
        self._channels, self._image_size = channels, image_size
        self._places: list[_Place] = []
        self._damaged = 0
        for number, path in enumerate(self._paths):
            self._look_through(number, path)
        if not self._places:
            raise UserError(f"{_shown(self._paths)} holds no image; name .tar shards with images")
        self._kept: dict[int, PixelArray] = {}
        self._kept_bytes = 0
        self._undecodable: set[int] = set()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")

    def _look_through(self, number: int, path: Path) -> None:
        """Every image, with or without a caption, in whatever kind of sample."""
        with path.open("rb") as stream:
            for group in groups(TarWalk(stream.fileno())):
                for name, member in () if group.reason else group.members.items():
                    if name.rpartition(".")[2] not in IMAGE_EXTENSIONS:
                        continue
                    stream.seek(member.start)
                    try:
                        probe(stream.read(member.size))
                    except SampleError:
                        self._damaged += 1
                    else:
                        self._places.append(_Place(number, member.start, member.size))

    def __len__(self) -> int:
        return len(self._places)

    @property
    def left_out(self) -> int:
        """Images that are damaged, by their structure or, as far as they were asked for, in the decoder's eyes."""
        return self._damaged + len(self._undecodable)

    def batch(self, step: int, size: int, *, seed: int, flip: bool) -> Tensor:
        """The images of a step, uint8 [I, C, H, W]: each epoch has every image once, in an order of its own."""
        places = [divmod(step * size + place, len(self)) for place in range(size)]
        numbers = [int(_order_N(seed, epoch, len(self))[within]) for epoch, within in places]
        values_ICHW = torch.from_numpy(np.stack(list(self._pool.map(self._good, numbers))))
        if flip:
            turned_I = torch.from_numpy(np.random.default_rng([seed, 1, step]).random(size) < 0.5)
            values_ICHW[turned_I] = values_ICHW[turned_I].flip(-1)
        return values_ICHW

    def in_order(self, size: int, limit: int = 0) -> Iterator[Tensor]:
        """All images that can be decoded (at most `limit`, 0: all), `size` at a time."""
        end = min(limit or len(self), len(self))
        for first in range(0, end, size):
            found = self._pool.map(self._image, range(first, min(first + size, end)))
            good = [image for image in found if image is not None]
            if good:
                yield torch.from_numpy(np.stack(good))

    def _good(self, number: int) -> PixelArray:
        for following in range(_MAX_RUN):
            image = self._image((number + following) % len(self))
            if image is not None:
                return image
        raise UserError(f"{_MAX_RUN} images of {_shown(self._paths)} in a row cannot be decoded")

    def _image(self, number: int) -> PixelArray | None:
        kept = self._kept.get(number)
        if kept is not None:
            return kept
        place = self._places[number]
        try:
            with open(self._paths[place.shard], "rb") as file:
                file.seek(place.start)
                data = file.read(place.size)
            image = decode(data, channels=self._channels, image_size=self._image_size)
        except SampleError:
            self._undecodable.add(number)
            return None
        if self._kept_bytes + image.nbytes <= _KEPT_BYTES:
            self._kept[number] = image
            self._kept_bytes += image.nbytes
        return image

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()


@functools.lru_cache(maxsize=2)
def _order_N(seed: int, epoch: int, images: int) -> np.ndarray:
    return np.random.default_rng([seed, 0, epoch]).permutation(images)


def _shown(paths: Sequence[Path]) -> str:
    return str(paths[0]) + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
