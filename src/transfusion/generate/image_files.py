"""Images on disk: reading what a user names, writing samples and grids.

C channels, H/W image height and width.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from transfusion.config import Config, SampleGridConfig
from transfusion.data.images.decode import decode_fitting
from transfusion.data.images.probe import MAX_PIXELS, MIN_SIDE
from transfusion.data.shards.sample import SampleError
from transfusion.errors import UserError, describe
from transfusion.files import atomic_file, atomic_write_text
from transfusion.generate.pipeline import SampledImage
from transfusion.sequence.sizes import MAX_ASPECT

INDEX = "index.jsonl"
# Images of a grid are enlarged to at least this side, pixel by pixel.
GRID_CELL = 48
GRID_GAP = 4
GRID_BACKGROUND = 96


# What a user is told of an image that is whole, and yet none for a model.
_UNFIT = {
    "image_aspect": f"it is more than {MAX_ASPECT} times as long as wide; cut it",
    "image_too_small": f"a side has fewer than {MIN_SIDE} pixels; give a larger one",
    "image_too_large": f"it has more than {MAX_PIXELS // 10**6} million pixels; give a smaller one",
}


def load_images(paths: Sequence[Path], config: Config) -> list[Tensor]:
    """Read images as uint8 [C, H, W], each of the size that it takes. Raises UserError naming the first bad one."""
    images = []
    for path in paths:
        try:
            data = path.read_bytes()
            values = decode_fitting(data, config.image_sizes, channels=config.codec.channels)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        except SampleError as error:
            reason = str(error)
            remedy = _UNFIT.get(reason, "give a JPEG, PNG or WebP image")
            raise UserError(f"{path}: {reason}; {remedy}") from None
        images.append(torch.from_numpy(values))
    return images


def to_image(pixels_CHW: Tensor) -> Image.Image:
    """uint8 [C, H, W] as a grey or colour image."""
    values = pixels_CHW.cpu().numpy()
    return Image.fromarray(values[0] if values.shape[0] == 1 else values.transpose(1, 2, 0))


class SampleFolder:
    """A folder of drawn images: 0000.png and so on, and index.jsonl (file, prompt, seed), which names what is there.

    Nothing is made before the first image comes. Then what another index names is removed. Each image is there and
    named as soon as it is added. Raises UserError where `out` cannot be written, at once where that can be seen.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.count = out, 0
        there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            reason = "cannot be written" if there.is_dir() else "is no folder"
            raise UserError(f"cannot write images to {out}: {there} {reason}; name another folder")

    def add(self, samples: Sequence[SampledImage]) -> None:
        """Write these images, numbered after those before."""
        with self._told():
            if not self.count:
                self.out.mkdir(parents=True, exist_ok=True)
                self._clear()
            for sample in samples:
                name = _name(self.count)
                with atomic_file(self.out / name) as unfinished:
                    to_image(sample.pixels).save(unfinished, format="PNG")
                record = {"file": name, "prompt": sample.prompt, "seed": sample.seed}
                with (self.out / INDEX).open("a", encoding="utf-8") as index:
                    index.write(json.dumps(record, ensure_ascii=False) + "\n")
                self.count += 1

    @property
    def last(self) -> Path:
        """The image that was added last."""
        return self.out / _name(self.count - 1)

    def _clear(self) -> None:
        index = self.out / INDEX
        former = len(index.read_bytes().splitlines()) if index.is_file() else 0
        atomic_write_text(index, "")
        for number in range(former):
            (self.out / _name(number)).unlink(missing_ok=True)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = describe(error, advise=False)
            raise UserError(f"cannot write images to {self.out}: {reason}; name another folder") from None


def save_samples(samples: Sequence[SampledImage], out: Path) -> None:
    """Write all images of a drawing into a `SampleFolder`."""
    SampleFolder(out).add(samples)


def _name(number: int) -> str:
    return f"{number:04d}.png"


def write_grid(samples: Sequence[SampledImage], path: Path, config: SampleGridConfig) -> None:
    """One image: a column for each prompt, config.per_prompt rows for each size, enlarged so that it can be seen."""
    if not samples:
        return
    heights, widths = zip(*(sample.pixels.shape[1:] for sample in samples), strict=True)
    scale = max(1, -(-GRID_CELL // min(*heights, *widths)))
    columns, rows = len(config.prompts), config.per_prompt
    step_x, step_y = max(widths) * scale + GRID_GAP, max(heights) * scale + GRID_GAP
    mode = "L" if samples[0].pixels.shape[0] == 1 else "RGB"
    background = GRID_BACKGROUND if mode == "L" else (GRID_BACKGROUND,) * 3
    every = rows * len(config.sizes or "1")
    grid = Image.new(mode, (columns * step_x + GRID_GAP, every * step_y + GRID_GAP), background)
    for number, sample in enumerate(samples):
        turn, place = divmod(number, columns * rows)
        column, row = divmod(place, rows)
        _, height, width = sample.pixels.shape
        enlarged = to_image(sample.pixels).resize((width * scale, height * scale), Image.Resampling.NEAREST)
        grid.paste(enlarged, (GRID_GAP + column * step_x, GRID_GAP + (turn * rows + row) * step_y))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as unfinished:
        grid.save(unfinished, format="PNG")
