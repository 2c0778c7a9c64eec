"""Pictures on disk: reading what a user names, writing samples and grids.

C channels, H/W picture height and width, I pictures.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from transfusion.config import CodecConfig, SampleConfig
from transfusion.data.decode import DecodeFault, decode
from transfusion.errors import UserError
from transfusion.generate.pipeline import SampledImage

INDEX = "index.jsonl"
# Pictures of a grid are enlarged to at least this side, pixel by pixel.
GRID_CELL = 48
GRID_GAP = 4
GRID_BACKGROUND = 96


def load_pictures(paths: Sequence[Path], codec: CodecConfig) -> Tensor:
    """Read pictures as uint8 [I, C, H, W] of the codec's size. Raises UserError naming the first bad one."""
    pictures = []
    for path in paths:
        try:
            pictures.append(decode(path.read_bytes(), channels=codec.channels, image_size=codec.image_size))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        except DecodeFault as error:
            raise UserError(f"{path}: {error}; give a JPEG, PNG or WebP picture") from None
    return torch.from_numpy(np.stack(pictures))


def to_image(pixels_CHW: Tensor) -> Image.Image:
    """uint8 [C, H, W] as a grey or colour picture."""
    values = pixels_CHW.cpu().numpy()
    return Image.fromarray(values[0] if values.shape[0] == 1 else values.transpose(1, 2, 0))


def save_samples(samples: Sequence[SampledImage], out: Path) -> None:
    """Write 0000.png, 0001.png, ... and index.jsonl (file, prompt, seed), the index last and at once.

    Raises UserError when `out` cannot be a folder.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lines = []
        for number, sample in enumerate(samples):
            name = f"{number:04d}.png"
            to_image(sample.pixels).save(out / name)
            record = {"file": name, "prompt": sample.prompt, "seed": sample.seed}
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
        temporary = out / f"{INDEX}.tmp"
        temporary.write_text("".join(lines), encoding="utf-8")
        temporary.replace(out / INDEX)
    except OSError as error:
        raise UserError(f"cannot write pictures to {out}: {error.strerror}; name another folder") from None


def write_grid(samples: Sequence[SampledImage], path: Path, config: SampleConfig) -> None:
    """One picture of a column for each prompt and config.per_prompt rows, enlarged so that it can be seen."""
    if not samples:
        return
    _, height, width = samples[0].pixels.shape
    scale = max(1, -(-GRID_CELL // min(height, width)))
    columns, rows = len(config.prompts), config.per_prompt
    step_x, step_y = width * scale + GRID_GAP, height * scale + GRID_GAP
    mode = "L" if samples[0].pixels.shape[0] == 1 else "RGB"
    background = GRID_BACKGROUND if mode == "L" else (GRID_BACKGROUND,) * 3
    grid = Image.new(mode, (columns * step_x + GRID_GAP, rows * step_y + GRID_GAP), background)
    for number, sample in enumerate(samples):
        column, row = divmod(number, rows)
        enlarged = to_image(sample.pixels).resize((width * scale, height * scale), Image.Resampling.NEAREST)
        grid.paste(enlarged, (GRID_GAP + column * step_x, GRID_GAP + row * step_y))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    grid.save(temporary, format="PNG")
    temporary.replace(path)
