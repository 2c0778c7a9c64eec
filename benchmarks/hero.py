"""Draws the README's image, docs/assets/hero.png, from a finished quickstart.

    .venv/bin/python benchmarks/hero.py [--run runs/quickstart] [--out docs/assets/hero.png]

Three panels: images that the model drew for prompts, captions that it wrote for validation images, and the attention
mask of one packed sequence of its training. Nothing is chosen: seeds count from 0, validation images stand in the order
of the data, and the sequence is the first of the run that holds images, text and padding. Run it where the
run's data are, for the model names its shards by relative paths.
"""

from __future__ import annotations

import argparse
import itertools
import json
import textwrap
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray

from transfusion.data.index.source_index import build_indexes
from transfusion.data.loading.loader import plan_settings
from transfusion.data.loading.rows import Row, RowBuilder, RowSettings
from transfusion.data.loading.validation import documents
from transfusion.data.planning.epoch import Variant
from transfusion.data.planning.packing import Planner
from transfusion.data.prepare.digits import DIGIT_WORDS, digit_in_caption
from transfusion.generate.pipeline import Pipeline
from transfusion.schema import ImageSegment, Modality, TextSegment
from transfusion_kernels import IntervalMask

matplotlib.use("agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = (
    "a handwritten three",
    "the digit seven",
    "a bright zero on a black ground",
    "someone wrote the number 5",
    "a handwritten eight",
)
IMAGES_A_PROMPT = 3
GUIDANCE, SAMPLER_STEPS = 3.0, 50

# Pixels of the image, which GitHub shows at about half its width.
WIDTH, HEIGHT, DPI = 1800, 820, 100
TOP, CELL, ROW_STEP = 138, 88, 110
MASK_SIDE, STRIP = 512, 14
CARD, EDGE, INK, GREY = "#ffffff", "#d0d7de", "#1f2328", "#59636e"
TEXT, IMAGE, CONTEXT, PADDING = "#3b78b8", "#e8803a", "#f7cfa6", "#c9ced6"
UNSEEN, RED = "#f3f5f7", "#b3261e"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "assets" / "hero.png")
    arguments = parser.parse_args()
    pipeline = Pipeline.from_export(arguments.run / "export", device="cpu")
    figure = pyplot.figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI)
    figure.patch.set_alpha(0)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(HEIGHT, 0))
    axes.set_axis_off()
    # A light card, so that it reads on a dark page too.
    axes.add_patch(
        FancyBboxPatch(
            (3, 3),
            WIDTH - 6,
            HEIGHT - 6,
            boxstyle="round,pad=0,rounding_size=26",
            facecolor=CARD,
            edgecolor=EDGE,
            linewidth=2,
            zorder=-1,
        )
    )
    draw_prompts(axes, pipeline, left=44)
    draw_captions(axes, pipeline, left=660)
    draw_mask(axes, first_mixed_row(pipeline), left=1218)
    found = json.loads((arguments.run / "metrics.json").read_text(encoding="utf-8"))
    below = (
        (
            44,
            f"A classifier of real digits reads\n{found['generation_accuracy']:.1%} of 200 as the digit asked for.",
        ),
        (660, f"{found['caption_accuracy']:.1%} of all validation captions\nname the right digit."),
    )
    for left, text in below:
        words(axes, left, TOP + MASK_SIDE + STRIP + 46, text, size=20, linespacing=1.45)
    words(axes, 44, HEIGHT - 40, small_print(arguments.run, pipeline), size=17, color=GREY)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=DPI, transparent=True, metadata={"Software": "benchmarks/hero.py"})
    print(f"{arguments.out}  {arguments.out.stat().st_size / 1e3:.0f} kB")


def words(axes: Axes, x: float, y: float, text: str, *, size: float, color: str = INK, **more: Any) -> None:
    """Text whose middle line stands at y. size: in pixels."""
    settings = {"va": "center", "ha": "left", "linespacing": 1.15, **more}
    axes.text(x, y, text, fontsize=size * 72 / DPI, color=color, **settings)


def heading(axes: Axes, left: float, title: str, below: str) -> None:
    words(axes, left, 48, title, size=34, weight="bold")
    words(axes, left, 92, below, size=21, color=GREY)


def arrow(axes: Axes, x: float, y: float) -> None:
    axes.annotate(
        "",
        xy=(x + 34, y),
        xytext=(x, y),
        arrowprops={"arrowstyle": "-|>", "color": GREY, "lw": 2, "mutation_scale": 18},
    )


def paste(axes: Axes, pixels_CHW: NDArray[np.uint8], x: float, y: float, side: float) -> None:
    """An image as it is, each pixel a square."""
    values = pixels_CHW[0] if len(pixels_CHW) == 1 else pixels_CHW.transpose(1, 2, 0)
    axes.imshow(
        values,
        extent=(x, x + side, y + side, y),
        cmap="gray",
        vmin=0,
        vmax=255,
        interpolation="nearest",
        aspect="auto",
    )
    axes.add_patch(Rectangle((x, y), side, side, fill=False, edgecolor=EDGE, linewidth=1))


def draw_prompts(axes: Axes, pipeline: Pipeline, left: float) -> None:
    """Prompts, and what the model draws for each."""
    heading(axes, left, "Text → image", "a prompt, and three images the model drew")
    samples = pipeline.sample(
        PROMPTS, per_prompt=IMAGES_A_PROMPT, guidance=GUIDANCE, steps=SAMPLER_STEPS, seed=0
    )
    for number, prompt in enumerate(PROMPTS):
        y = TOP + number * ROW_STEP
        words(axes, left, y + CELL / 2, textwrap.fill(prompt, 15), size=25)
        arrow(axes, left + 236, y + CELL / 2)
        for column in range(IMAGES_A_PROMPT):
            pixels = samples[number * IMAGES_A_PROMPT + column].pixels.numpy()
            paste(axes, pixels, left + 284 + column * (CELL + 10), y, CELL)


def draw_captions(axes: Axes, pipeline: Pipeline, left: float) -> None:
    """The first validation images, and what the model writes of each. Wrong ones are marked."""
    heading(axes, left, "Image → text", "a validation image, and the model's caption")
    found = documents(pipeline.config, pipeline.config.data.validation, pipeline.tokenizer)
    pairs = (document.segments for document in found if len(document.segments) > 1)
    first = list(itertools.islice(pairs, len(PROMPTS)))
    images = [part.values_CHW for parts in first for part in parts if isinstance(part, ImageSegment)]
    captions = pipeline.caption([torch.as_tensor(image) for image in images], max_tokens=32)
    for number, (parts, image, caption) in enumerate(zip(first, images, captions, strict=True)):
        y = TOP + number * ROW_STEP
        paste(axes, np.asarray(image), left, y, CELL)
        arrow(axes, left + CELL + 14, y + CELL / 2)
        texts = (pipeline.tokenizer.decode(part.token_ids) for part in parts if isinstance(part, TextSegment))
        digit = digit_in_caption("".join(texts))
        is_wrong = digit is not None and digit_in_caption(caption) != digit
        middle = y + CELL / 2 - (14 if is_wrong else 0)
        words(axes, left + CELL + 66, middle, textwrap.fill(caption.strip(), 22), size=25)
        if is_wrong:
            words(
                axes,
                left + CELL + 66,
                middle + 32,
                f"wrong: the digit is {DIGIT_WORDS[digit]}",
                size=20,
                color=RED,
            )


def first_mixed_row(pipeline: Pipeline) -> Row:
    """The first sequence of the run that holds images, padding, and a text by itself that leaves room for them."""
    config = pipeline.config
    indexes = build_indexes(config, config.data.sources, pipeline.tokenizer)
    planner = Planner([index.lengths for index in indexes], plan_settings(config))
    builder = RowBuilder(indexes, RowSettings.of(config))
    while True:
        for plan in planner.next_batch():
            row = builder.build(plan)
            texts = [span.tokens for span in plan if span.variant == Variant.TEXT]
            padding = int((row.modality_S == Modality.PADDING).sum())
            if texts and max(texts) < len(row.token_ids_S) * 0.45 and len(row.images) > 2 and padding > 2:
                return row


def mask_colours(row: Row) -> NDArray[np.float64]:
    """Who (down) sees whom (across), as colours [S, S, 3]."""
    mask = IntervalMask(torch.from_numpy(row.first_key_S)[None], torch.from_numpy(row.end_key_S)[None])
    seen = mask.dense()[0].numpy()
    length = len(seen)
    colours = np.empty((length, length, 3))
    colours[:] = matplotlib.colors.to_rgb(UNSEEN)
    is_image = row.modality_S == Modality.IMAGE
    colours[seen & ~is_image[:, None]] = matplotlib.colors.to_rgb(TEXT)
    colours[seen & is_image[:, None]] = matplotlib.colors.to_rgb(CONTEXT)
    for image in row.images:
        patches = slice(image.first_patch, image.first_patch + image.patches)
        colours[patches, patches] = matplotlib.colors.to_rgb(IMAGE)
    padding = row.modality_S == Modality.PADDING
    colours[padding] = colours[:, padding] = matplotlib.colors.to_rgb(PADDING)
    return colours


def draw_mask(axes: Axes, row: Row, left: float) -> None:
    """The mask of a packed sequence, its tokens along two sides, and one document of it enlarged."""
    length = len(row.token_ids_S)
    real = int((row.modality_S != Modality.PADDING).sum())
    starts = [*np.flatnonzero(np.diff(row.first_key_S[:real], prepend=-1)).tolist(), real]
    heading(
        axes,
        left,
        "One packed sequence",
        f"{len(starts) - 1} documents, and what each token may attend to",
    )
    x, y, unit = left + STRIP + 4, TOP + STRIP + 4, MASK_SIDE / length
    colours = mask_colours(row)
    place = {"interpolation": "nearest", "aspect": "auto"}
    axes.imshow(colours, extent=(x, x + MASK_SIDE, y + MASK_SIDE, y), **place)
    strip = np.array(
        [matplotlib.colors.to_rgb({0: TEXT, 1: IMAGE, 2: PADDING}[kind]) for kind in row.modality_S]
    )
    axes.imshow(strip[None], extent=(x, x + MASK_SIDE, TOP + STRIP, TOP), **place)
    axes.imshow(strip[:, None], extent=(left, left + STRIP, y + MASK_SIDE, y), **place)
    for start, end in itertools.pairwise(starts):
        side = (end - start) * unit
        axes.add_patch(
            Rectangle(
                (x + start * unit, y + start * unit), side, side, fill=False, edgecolor=INK, linewidth=1
            )
        )
    draw_document(axes, row, colours, starts, (x, y), x + MASK_SIDE - 232, y + 12)
    keys = (
        (TEXT, "text: what came before", 0, 0),
        (IMAGE, "image: all of itself", 0, 1),
        (CONTEXT, "image: its caption", 288, 1),
        (PADDING, "padding: nothing", 288, 0),
    )
    for colour, name, across, line in keys:
        below = y + MASK_SIDE + 26 + 30 * line
        axes.add_patch(Rectangle((left + across, below - 10), 20, 20, facecolor=colour))
        words(axes, left + across + 30, below, name, size=20)


def draw_document(
    axes: Axes,
    row: Row,
    colours: NDArray[np.float64],
    starts: list[int],
    origin: tuple[float, float],
    x: float,
    y: float,
) -> None:
    """The first document with a caption before its image, large enough to see its tokens.

    origin: where the mask of the whole sequence begins, from which two lines lead here.
    """
    side, scale = 220, MASK_SIDE / len(row.token_ids_S)
    start, end = next(
        (start, end)
        for start, end in itertools.pairwise(starts)
        for image in row.images
        if start + 4 < image.first_patch < end
    )
    part = colours[start:end, start:end]
    axes.imshow(part, extent=(x, x + side, y + side, y), interpolation="nearest", aspect="auto")
    unit = side / (end - start)
    for line in range(1, end - start):
        axes.plot((x + line * unit,) * 2, (y, y + side), color=CARD, linewidth=0.7)
        axes.plot((x, x + side), (y + line * unit,) * 2, color=CARD, linewidth=0.7)
    axes.add_patch(Rectangle((x, y), side, side, fill=False, edgecolor=INK, linewidth=1.5, zorder=3))
    for column, corner in ((start, x), (end, x + side)):
        ends = (origin[0] + column * scale, corner), (origin[1] + start * scale, y + side)
        axes.plot(*ends, color=INK, linewidth=1, linestyle=":")


def small_print(run: Path, pipeline: Pipeline) -> str:
    """How all of it came to be: model, machine, date, commit."""
    steps = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])["step"]
    where = json.loads((run / "env.json").read_text(encoding="utf-8"))
    parameters = sum(weight.numel() for weight in pipeline.runner.model.parameters())
    machine = where["gpus"][0]["name"] if where["gpus"] else f"{where['cpu_count']} cores of {where['cpu']}"
    commit = where["git"]["commit"][:7] if where["git"] else "unknown"
    size = pipeline.config.codec.image_size
    return (
        f"One model of {parameters / 1e6:.1f} million parameters, trained for {steps:,} steps on"
        f" {' '.join(machine.split())}. Images of {size} x {size} pixels, none picked by hand."
        f"   {where['time'][:10]}, commit {commit}"
    )


if __name__ == "__main__":
    main()
