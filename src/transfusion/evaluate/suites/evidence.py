"""What suites draw and say with a model, and what they leave of it under OUT/evaluation to be looked at.

C channels, H/W image height and width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from transfusion.config.objectives import SAMPLERS
from transfusion.evaluate.progress_lines import ProgressLines
from transfusion.files import atomic_write_text, remove_leftover
from transfusion.generate.image_files import save_samples
from transfusion.generate.pillow_images import to_image
from transfusion.generate.pipeline import Pipeline, SampledImage
from transfusion.sequence.sizes import Size

GUIDANCE = 3.0
SAMPLER_STEPS = 25
BATCH = 128
CAPTION_BATCH = 256
MAX_CAPTION_TOKENS = 32


def draw(
    pipeline: Pipeline,
    prompts: Sequence[str],
    images: Sequence[Tensor],
    *,
    guidance: float | None = None,
    seed: int = 0,
) -> tuple[list[SampledImage], str]:
    """Draw an image of each prompt with the quick sampler, and tell the settings in words.

    images: one [C, H, W] for each prompt, which gives the size. Those of one size are drawn together. guidance: none is
    GUIDANCE, and 1 for a model that never learned without captions. seed: of the first image.
    """
    config = pipeline.config
    sampler = SAMPLERS[config.diffusion.prediction][0]
    if guidance is None:
        guidance = GUIDANCE if config.data.caption_dropout > 0 else 1.0
    steps = min(SAMPLER_STEPS, config.diffusion.steps)
    by_size: dict[Size, list[str]] = {}
    for prompt, image in zip(prompts, images, strict=True):
        by_size.setdefault(Size(*image.shape[1:]), []).append(prompt)
    samples: list[SampledImage] = []
    for size, here in by_size.items():
        samples += pipeline.sample(
            here,
            guidance=guidance,
            steps=steps,
            sampler=sampler,
            seed=seed + len(samples),
            batch=BATCH,
            size=size,
            on_call=ProgressLines(f"drawing {len(here)} images of {size} pixels"),
        )
    return samples, f"{sampler} {steps} steps, guidance {guidance:g}, seeds from {seed}"


def describe(pipeline: Pipeline, images: Sequence[Tensor]) -> list[str]:
    """Greedy captions of images, uint8 [C, H, W] each."""
    tell = ProgressLines(f"captioning {len(images)} images")
    captions: list[str] = []
    for start in range(0, len(images), CAPTION_BATCH):
        tell(start, len(images))
        part = images[start : start + CAPTION_BATCH]
        captions += pipeline.caption(part, max_tokens=MAX_CAPTION_TOKENS, batch=CAPTION_BATCH)
    return captions


def save_drawn(samples: Sequence[SampledImage], out: Path) -> None:
    """Leave drawn images in OUT/evaluation/generated, and nothing of a former evaluation."""
    folder = out / "evaluation" / "generated"
    remove_leftover(folder)
    save_samples(samples, folder)


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
