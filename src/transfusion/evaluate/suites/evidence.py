"""What suites draw and say with a model, and what they leave of it under OUT/evaluation to be looked at.

C channels, H/W image height and width.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from torch import Tensor

from transfusion.config.objectives import SAMPLERS
from transfusion.evaluate.progress_lines import ProgressLines
from transfusion.evaluate.suites.settings import DescribingSuite, DrawingSuite
from transfusion.files import atomic_write_text, remove_leftover
from transfusion.generate.image_files import save_samples
from transfusion.generate.pillow_images import to_image
from transfusion.generate.pipeline import Pipeline, SampledImage
from transfusion.sequence.sizes import Size

# Where a suite names no scale.
GUIDANCE = 3.0


class Drawing(NamedTuple):
    """How a suite draws with one model."""

    sampler: str
    steps: int
    guidance: float
    seed: int

    @classmethod
    def of(cls, settings: DrawingSuite, pipeline: Pipeline) -> Self:
        """What the settings leave open is the model's: its quick sampler, and guidance if it knows dropped captions."""
        config = pipeline.config
        return cls(
            settings.sampler or SAMPLERS[config.diffusion.prediction][0],
            min(settings.steps, config.diffusion.steps),
            settings.guidance or (GUIDANCE if config.data.caption_dropout > 0 else 1.0),
            settings.seed,
        )

    def __str__(self) -> str:
        return f"{self.sampler} {self.steps} steps, guidance {self.guidance:g}, seeds from {self.seed}"


def draw(
    pipeline: Pipeline,
    prompts: Sequence[str],
    images: Sequence[Tensor],
    drawing: Drawing,
    batch: int,
) -> list[SampledImage]:
    """Draw an image of each prompt, `batch` at once.

    images: one [C, H, W] for each prompt, which gives the size. Those of one size are drawn together.
    """
    by_size: dict[Size, list[str]] = {}
    for prompt, image in zip(prompts, images, strict=True):
        by_size.setdefault(Size(*image.shape[1:]), []).append(prompt)
    samples: list[SampledImage] = []
    for size, here in by_size.items():
        samples += pipeline.sample(
            here,
            guidance=drawing.guidance,
            steps=drawing.steps,
            sampler=drawing.sampler,
            seed=drawing.seed + len(samples),
            batch=batch,
            size=size,
            on_call=ProgressLines(f"drawing {len(here)} images of {size} pixels"),
        )
    return samples


def describe(pipeline: Pipeline, images: Sequence[Tensor], settings: DescribingSuite) -> list[str]:
    """Greedy captions of images, uint8 [C, H, W] each."""
    tell = ProgressLines(f"captioning {len(images)} images")
    captions: list[str] = []
    size = settings.caption_batch
    for start in range(0, len(images), size):
        tell(start, len(images))
        part = images[start : start + size]
        captions += pipeline.caption(part, max_tokens=settings.max_tokens, batch=size)
    return captions


def save_drawn(samples: Sequence[SampledImage], out: Path) -> None:
    """Leave drawn images in OUT/evaluation/generated, and nothing of a former evaluation."""
    folder = out / "evaluation" / "generated"
    remove_leftover(folder)
    save_samples(samples, folder)


def show_kept(kept: Path, out: Path) -> None:
    """As `save_drawn`, images that were saved elsewhere."""
    folder = out / "evaluation" / "generated"
    remove_leftover(folder)
    shutil.copytree(kept, folder)


def save_captions(lines: Sequence[Mapping[str, Any]], images: Sequence[Tensor], out: Path) -> None:
    """Leave OUT/evaluation/captions.jsonl and the images of its first lines, and nothing of a former evaluation."""
    folder = out / "evaluation"
    file, shown = folder / "captions.jsonl", folder / "validation"
    file.unlink(missing_ok=True)
    remove_leftover(shown)
    shown.mkdir(parents=True)
    written = []
    for number, line in enumerate(lines):
        if number < len(images):
            path = shown / f"{number:04d}.png"
            to_image(images[number]).save(path)
            line = {"image": path.relative_to(out).as_posix(), **line}
        written.append(json.dumps(line, ensure_ascii=False) + "\n")
    atomic_write_text(file, "".join(written))
