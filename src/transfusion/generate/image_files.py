"""Images and other media on disk: reading what a user names, writing samples and grids.

C channels, H/W image height and width.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from transfusion.config import Config, SampleGridConfig
from transfusion.errors import UserError, describe
from transfusion.files import atomic_file
from transfusion.generate.media_files import read_media
from transfusion.generate.pillow_images import read_image, to_image
from transfusion.generate.pipeline import SampledImage
from transfusion.generate.recipe import UNREADABLE
from transfusion.inference.runner import Media

INDEX = "index.jsonl"
# Images of a grid are enlarged to at least this side, pixel by pixel.
GRID_CELL = 48
GRID_GAP = 4
GRID_BACKGROUND = 96
# Of a sheet: the height of a line of text, and what is wide enough for most prompts.
SHEET_LINE, SHEET_WIDTH = 18, 280


def load_images(paths: Sequence[Path], config: Config) -> list[Tensor]:
    """Read images as uint8 [C, H, W], each of the size that it takes. Raises UserError naming the first bad one."""
    return [read_image(_read(path), config, str(path)) for path in paths]


def load_media(paths: Sequence[Path], config: Config) -> list[Tensor | Media]:
    """As `load_images`, with sounds and other arrays, see `read_media`."""
    return [read_media(_read(path), config, str(path)) for path in paths]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        marked = str(path).startswith("@") and os.path.isfile(str(path)[1:])
        remedy = "; write it without @" if marked else ""
        raise UserError(f"cannot read {path}: {error.strerror}{remedy}") from None


def read_pixels(path: Path) -> Tensor:
    """The pixels of a drawn image, uint8 [C, H, W], as they are. Raises UserError for what is none."""
    try:
        with Image.open(path) as image:
            if image.mode not in ("L", "RGB"):
                raise UserError(f"{path} is not as it was drawn: its mode is {image.mode}")
            values = np.asarray(image)
    except UNREADABLE as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    return torch.from_numpy(np.atleast_3d(values).transpose(2, 0, 1).copy())


class SampleFolder:
    """A folder of what is drawn: 0000.png, 0001.wav and so on, and index.jsonl, a line each (file, prompt, seed).

    Nothing is made before the first one comes. The numbers go on behind those that are there, so that none is written
    over. Each is there and named as soon as it is added. Raises UserError where `out` cannot be written, at once where
    that can be seen. model: the folder that draws, which the index names too.
    """

    def __init__(self, out: Path, model: Path | None = None) -> None:
        self.out, self._names, self._first = out, list[str](), 0
        self._named = {} if model is None else {"model": str(model.resolve())}
        there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            reason = "cannot be written" if there.is_dir() else "is no folder"
            raise UserError(f"cannot write to {out}: {there} {reason}; name another folder")

    def add(self, samples: Sequence[SampledImage]) -> None:
        """Write these images."""
        for sample in samples:
            stream = io.BytesIO()
            chunk = None if sample.recipe is None else sample.recipe.as_chunk()
            to_image(sample.pixels).save(stream, format="PNG", pnginfo=chunk)
            self.add_file("png", stream.getvalue(), sample.prompt, sample.seed)

    def add_file(self, suffix: str, data: bytes, prompt: str, seed: int) -> None:
        """Write a file with the next number."""
        with self._told():
            if not self._names:
                self.out.mkdir(parents=True, exist_ok=True)
                there = [int(path.stem) for path in self.out.glob("*.*") if path.stem.isdecimal()]
                self._first = max(there, default=-1) + 1
            name = f"{self._first + self.count:04d}.{suffix}"
            with atomic_file(self.out / name) as unfinished:
                unfinished.write_bytes(data)
            record = {"file": name, "prompt": prompt, "seed": seed, **self._named}
            with (self.out / INDEX).open("a", encoding="utf-8") as index:
                index.write(json.dumps(record, ensure_ascii=False) + "\n")
            self._names.append(name)

    @property
    def count(self) -> int:
        """How many were added."""
        return len(self._names)

    @property
    def last(self) -> Path:
        """The file that was added last."""
        return self.out / self._names[-1]

    def __str__(self) -> str:
        """What was added."""
        first = self.out / self._names[0]
        return str(first) if self.count == 1 else f"{first} to {self._names[-1]}"

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = describe(error, advise=False)
            raise UserError(f"cannot write to {self.out}: {reason}; name another folder") from None


def save_samples(samples: Sequence[SampledImage], out: Path) -> None:
    """Write all images of a drawing into a `SampleFolder`."""
    SampleFolder(out).add(samples)


def model_of(path: Path) -> Path:
    """The model that drew an image, as the index beside it names it. Raises UserError where it does not."""
    index = path.parent / INDEX
    try:
        lines = index.read_text(encoding="utf-8").splitlines() if index.is_file() else []
        names = [record["model"] for record in map(json.loads, lines) if record["file"] == path.name]
        return Path(names[-1])
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        raise UserError(
            f"no index beside {path} names the model that drew it; name it with --model"
        ) from None


def write_grid(samples: Sequence[SampledImage], path: Path, config: SampleGridConfig) -> None:
    """One image: a column for each prompt, config.per_prompt rows for each size."""
    rows: list[list[Tensor]] = [[] for _ in range(config.per_prompt * len(config.sizes or "1"))]
    for number, sample in enumerate(samples):
        turn, place = divmod(number, len(config.prompts) * config.per_prompt)
        rows[turn * config.per_prompt + place % config.per_prompt].append(sample.pixels)
    if samples:
        write_rows(rows, path)


def write_sheet(samples: Sequence[SampledImage], path: Path) -> None:
    """One image: below each prompt a row of its images, in their order, enlarged so that they can be seen.

    A prompt is cut where its row ends. Raises UserError where the file cannot be written.
    """
    rows = [
        (prompt, [each.pixels for each in images])
        for prompt, images in groupby(samples, lambda each: each.prompt)
    ]
    heights, widths = zip(*(each.pixels.shape[1:] for each in samples), strict=True)
    scale = max(1, -(-GRID_CELL // min(*heights, *widths)))
    step_x, step_y = max(widths) * scale + GRID_GAP, max(heights) * scale + GRID_GAP + SHEET_LINE
    width = max(SHEET_WIDTH, max(len(images) for _, images in rows) * step_x + GRID_GAP)
    sheet = Image.new("RGB", (width, len(rows) * step_y + GRID_GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(SHEET_LINE - 4)
    for down, (prompt, images) in enumerate(rows):
        top = GRID_GAP + down * step_y
        pen.text((GRID_GAP, top), " ".join(prompt.split()), fill="black", font=font)
        for across, image in enumerate(images):
            sheet.paste(_enlarged(image, scale), (GRID_GAP + across * step_x, top + SHEET_LINE))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as unfinished:
            sheet.save(unfinished, format="PNG")
    except OSError as error:
        raise UserError(f"cannot write {path}: {describe(error, advise=False)}; name another file") from None


def write_rows(rows: Sequence[Sequence[Tensor]], path: Path) -> None:
    """One image of rows of images, uint8 [C, H, W] each, enlarged so that they can be seen."""
    images = [image for row in rows for image in row]
    heights, widths = zip(*(image.shape[1:] for image in images), strict=True)
    scale = max(1, -(-GRID_CELL // min(*heights, *widths)))
    step_x, step_y = max(widths) * scale + GRID_GAP, max(heights) * scale + GRID_GAP
    mode = "L" if images[0].shape[0] == 1 else "RGB"
    background = GRID_BACKGROUND if mode == "L" else (GRID_BACKGROUND,) * 3
    size = (max(map(len, rows)) * step_x + GRID_GAP, len(rows) * step_y + GRID_GAP)
    grid = Image.new(mode, size, background)
    for down, row in enumerate(rows):
        for across, image in enumerate(row):
            grid.paste(_enlarged(image, scale), (GRID_GAP + across * step_x, GRID_GAP + down * step_y))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as unfinished:
        grid.save(unfinished, format="PNG")


def _enlarged(image_CHW: Tensor, scale: int) -> Image.Image:
    _, height, width = image_CHW.shape
    return to_image(image_CHW).resize((width * scale, height * scale), Image.Resampling.NEAREST)
