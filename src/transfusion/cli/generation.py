"""The commands that generate. Everything heavy is imported inside them."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from transfusion.cli.options import Device, Dtype, Model, Weights
from transfusion.errors import UserError
from transfusion.tokens import MAX_SAMPLING_SEED

if TYPE_CHECKING:
    from transfusion.generate.settings import AnswerSettings, ImageSettings
    from transfusion.inference.runner import Media


# Seconds that captions take before it is shown how far they are.
_SHORT = 5.0


def _known_sampler(name: str) -> str:
    from transfusion.config.objectives import SAMPLERS

    known = ["auto", *dict.fromkeys(sampler for fitting in SAMPLERS.values() for sampler in fitting)]
    if name not in known:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(known)}.")
    return name


Folder = Annotated[Path, typer.Option(help="folder for what is drawn, and index.jsonl")]
Modality = Annotated[str, typer.Option(help="what is drawn: image, or a further modality of the model")]
Modalities = Annotated[
    list[str] | None,
    typer.Option(help="what the answer may hold beside text, repeated for several. Unless given: image"),
]
Guidance = Annotated[float, typer.Option("--cfg", "--guidance-scale", help="guidance scale. 1: none")]
NegativePrompt = Annotated[
    str, typer.Option("--negative-prompt", help="what guidance leads away from. Empty: no caption")
]
Interval = Annotated[
    tuple[float, float],
    typer.Option(
        "--guidance-interval",
        metavar="LOW HIGH",
        help="shares of the timesteps between which guidance is applied. 1 is noise alone",
    ),
]
Rescale = Annotated[
    float,
    typer.Option("--guidance-rescale", min=0, max=1, help="how far guidance keeps the contrast. 0: not"),
]
Steps = Annotated[int, typer.Option("--steps", "--num-inference-steps", min=1, help="sampler steps")]
SamplerName = Annotated[
    str,
    typer.Option(
        callback=_known_sampler,
        help="ddim, ddpm or dpmpp_2m, for flow and x euler, heun or dpmpp_2m. auto takes ddim, or euler",
    ),
]
ImageSize = Annotated[
    str, typer.Option(help="HEIGHTxWIDTH, one of the model's sizes or shapes. Empty: the first of them")
]
AnswerSize = Annotated[
    str, typer.Option(help="HEIGHTxWIDTH, one of the model's sizes. Empty: the model chooses")
]
FirstSeed = Annotated[int, typer.Option(min=0, max=MAX_SAMPLING_SEED, help="image k has seed + k")]
AnswerSeed = Annotated[
    int, typer.Option(min=0, max=MAX_SAMPLING_SEED, help="of the text and the first image")
]
ChatSeed = Annotated[
    int, typer.Option(min=0, max=MAX_SAMPLING_SEED, help="of the first answer. Answer n has seed + n")
]
MaxTokens = Annotated[int, typer.Option(min=1, help="maximum of text tokens")]
MaxImages = Annotated[int, typer.Option(min=0, help="maximum of images, and of other media")]
Temperature = Annotated[float, typer.Option(min=0, help="of the text. 0: the likeliest tokens")]
TopP = Annotated[float, typer.Option(help="in (0, 1]: the likeliest tokens that together reach it")]


def _image_settings(
    cfg: float,
    negative_prompt: str,
    interval: tuple[float, float],
    rescale: float,
    steps: int,
    sampler: str,
    size: str,
) -> ImageSettings:
    from transfusion.sequence.sizes import Size

    try:
        parsed = Size.parse(size) if size else None
    except ValueError as error:
        raise UserError(f"--size: {error}") from None
    return {
        "guidance": cfg,
        "negative_prompt": negative_prompt,
        "guidance_interval": interval,
        "guidance_rescale": rescale,
        "steps": steps,
        "sampler": sampler,
        "size": parsed,
    }


def _answer_settings(
    image: ImageSettings,
    modalities: list[str] | None,
    max_tokens: int,
    max_images: int,
    temperature: float,
    top_p: float,
) -> AnswerSettings:
    return {
        **image,
        "modalities": modalities or ["image"],
        "max_tokens": max_tokens,
        "max_images": max_images,
        "temperature": temperature,
        "top_p": top_p,
    }


def sample(
    model: Model,
    out: Folder,
    prompt: Annotated[list[str] | None, typer.Option(help="a caption, repeated for several")] = None,
    prompts: Annotated[
        str, typer.Option(help="a file with a caption on each line, or - for standard input")
    ] = "",
    modality: Modality = "image",
    n: Annotated[int, typer.Option("-n", min=1, help="images per caption")] = 1,
    best_of: Annotated[
        int, typer.Option(min=1, help="draw so many of each, keep the one that the model reads best")
    ] = 1,
    cfg: Guidance = 3.0,
    negative_prompt: NegativePrompt = "",
    guidance_interval: Interval = (0.0, 1.0),
    guidance_rescale: Rescale = 0.0,
    steps: Steps = 25,
    sampler: SamplerName = "auto",
    budget: Annotated[
        str, typer.Option(help="a time such as 5s for all images, in place of --sampler and --steps")
    ] = "",
    sheet: Annotated[
        Path | None, typer.Option(help="a .png of all images too, a row below each caption")
    ] = None,
    seed: FirstSeed = 0,
    size: ImageSize = "",
    weights: Weights = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Draw images, or another modality, from captions."""
    from transfusion.generate.budget import choose, read_seconds, read_table
    from transfusion.generate.image_files import SampleFolder, write_sheet
    from transfusion.generate.media_files import as_file
    from transfusion.generate.pipeline import Pipeline
    from transfusion.generate.terminal import read_lines
    from transfusion.observe.progress import CallProgress

    settings = _image_settings(
        cfg, negative_prompt, guidance_interval, guidance_rescale, steps, sampler, size
    )
    captions = [*(prompt or []), *(read_lines(prompts, sys.stdin) if prompts else [])]
    if not captions:
        raise UserError("nothing to draw: give --prompt TEXT, or --prompts FILE with a caption on each line")
    if sheet is not None and sheet.suffix != ".png":
        raise UserError(f"--sheet {sheet} must end in .png")
    if best_of > 1 and n > 1:
        raise UserError("--best-of keeps one image of each caption; leave -n out")
    if modality != "image" and (sheet is not None or best_of > 1 or budget):
        raise UserError(
            f"--sheet, --best-of and --budget are for images; leave them out with --modality {modality}"
        )
    if budget and (steps, sampler) != (25, "auto"):
        raise UserError("--budget chooses --sampler and --steps; leave them out")
    seconds, table = (read_seconds(budget), read_table(model)) if budget else (0.0, [])
    pipeline = Pipeline.from_export(model, weights=weights, device=device, dtype=dtype)
    folder = SampleFolder(out, model)
    # Fewer at a time come sooner, and a CPU loses little.
    batch = 64 if pipeline.runner.device.type == "cuda" or budget else 8
    if budget:
        choice = choose(table, seconds, pipeline, captions * max(n, best_of), settings, batch)
        settings |= {"sampler": choice.sampler, "steps": choice.steps}
        late = "" if choice.is_in_time else f"nothing is as fast as {budget}, this is the fastest: "
        print(f"{late}{choice.sampler}, {choice.steps} steps", file=sys.stderr)
    with CallProgress(lambda: f"{folder.count} of {n * len(captions)} {modality}s") as progress:
        if modality != "image":

            def add(number: int, media: Media) -> None:
                made = as_file(media, pipeline.config)
                folder.add_file(made.suffix, made.data, captions[number // n], seed + number)

            pipeline.sample_media(
                modality,
                captions,
                per_prompt=n,
                seed=seed,
                batch=batch,
                on_call=progress,
                on_media=add,
                **settings,
            )
        elif best_of > 1:
            found = pipeline.best_of(
                captions, count=best_of, seed=seed, batch=batch, on_call=progress, **settings
            )
            folder.add(found)
        else:
            found = pipeline.sample(
                captions,
                per_prompt=n,
                seed=seed,
                batch=batch,
                on_call=progress,
                on_images=folder.add,
                **settings,
            )
    also = ""
    if sheet is not None:
        write_sheet(found, sheet)
        also = f", and all of them in {sheet}"
    print(f"{folder}, and index.jsonl with their prompts and seeds{also}")


def edit(
    model: Model,
    image: Annotated[Path, typer.Argument(help="the image")],
    instruction: Annotated[str, typer.Argument(help="what shall be changed")],
    out: Folder = Path("edited"),
    cfg: Guidance = 3.0,
    negative_prompt: NegativePrompt = "",
    guidance_interval: Interval = (0.0, 1.0),
    guidance_rescale: Rescale = 0.0,
    steps: Steps = 25,
    sampler: SamplerName = "auto",
    seed: FirstSeed = 0,
    size: Annotated[
        str, typer.Option(help="HEIGHTxWIDTH, one of the model's sizes. Empty: that of the image")
    ] = "",
    weights: Weights = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Draw the image that follows an image and an instruction. The model must have learned to edit."""
    from transfusion.generate.image_files import SampleFolder, load_images
    from transfusion.generate.pipeline import Pipeline
    from transfusion.observe.progress import CallProgress

    settings = _image_settings(
        cfg, negative_prompt, guidance_interval, guidance_rescale, steps, sampler, size
    )
    pipeline = Pipeline.from_export(model, weights=weights, device=device, dtype=dtype)
    folder = SampleFolder(out, model)
    with CallProgress(lambda: "") as progress:
        folder.add(
            pipeline.edit(
                load_images([image], pipeline.config), [instruction], seed=seed, on_call=progress, **settings
            )
        )
    print(folder.last)


def generate(
    model: Model,
    prompt: Annotated[
        list[str],
        typer.Argument(
            help="texts, images and sounds as @FILE, and - for a text on standard input, in order"
        ),
    ],
    out: Folder = Path("generated"),
    modality: Modalities = None,
    max_tokens: MaxTokens = 256,
    max_images: MaxImages = 4,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    cfg: Guidance = 3.0,
    negative_prompt: NegativePrompt = "",
    guidance_interval: Interval = (0.0, 1.0),
    guidance_rescale: Rescale = 0.0,
    steps: Steps = 25,
    sampler: SamplerName = "auto",
    seed: AnswerSeed = 0,
    size: AnswerSize = "",
    as_json: Annotated[
        bool, typer.Option("--json", help="each piece of the answer as a JSON object")
    ] = False,
    weights: Weights = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Continue texts, images and sounds with more of them, written as they come."""
    from transfusion.generate.image_files import SampleFolder
    from transfusion.generate.pipeline import Pipeline
    from transfusion.generate.terminal import read_parts, tell

    image = _image_settings(cfg, negative_prompt, guidance_interval, guidance_rescale, steps, sampler, size)
    settings = _answer_settings(image, modality, max_tokens, max_images, temperature, top_p)
    pipeline = Pipeline.from_export(model, weights=weights, device=device, dtype=dtype)
    events = pipeline.stream(read_parts(prompt, pipeline.config, sys.stdin), seed=seed, **settings)
    folder = SampleFolder(out, model)
    tell(events, " ".join(prompt), folder, sys.stdout, pipeline.config, as_json=as_json)


def chat(
    model: Model,
    out: Folder = Path("generated"),
    modality: Modalities = None,
    max_tokens: MaxTokens = 256,
    max_images: MaxImages = 4,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    cfg: Guidance = 3.0,
    negative_prompt: NegativePrompt = "",
    guidance_interval: Interval = (0.0, 1.0),
    guidance_rescale: Rescale = 0.0,
    steps: Steps = 25,
    sampler: SamplerName = "auto",
    seed: ChatSeed = 0,
    size: AnswerSize = "",
    weights: Weights = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Continue line by line what you type, images as @FILE among the words. /new begins anew, /quit ends."""
    from transfusion.generate.image_files import SampleFolder
    from transfusion.generate.pipeline import Pipeline
    from transfusion.generate.terminal import chat as run

    image = _image_settings(cfg, negative_prompt, guidance_interval, guidance_rescale, steps, sampler, size)
    settings = _answer_settings(image, modality, max_tokens, max_images, temperature, top_p)
    pipeline = Pipeline.from_export(model, weights=weights, device=device, dtype=dtype)
    run(pipeline, SampleFolder(out, model), sys.stdin, sys.stdout, seed=seed, settings=settings)


def caption(
    model: Model,
    images: Annotated[list[Path], typer.Argument(help="images, or sounds to be written down")],
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object per line: image, caption")] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="maximum length of a caption, in tokens")] = 64,
    weights: Weights = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Describe images, or write sounds down."""
    from itertools import count

    from transfusion.generate.events import Done, Event
    from transfusion.generate.image_files import load_media
    from transfusion.generate.pipeline import Pipeline
    from transfusion.observe.progress import CallProgress

    pipeline = Pipeline.from_export(model, weights=weights, device=device, dtype=dtype)
    loaded, ended, begin = load_media(images, pipeline.config), count(1), time.monotonic()
    with CallProgress(lambda: "") as progress:

        def tell(_: int, event: Event) -> None:
            done = next(ended) if isinstance(event, Done) else 0
            if done and time.monotonic() - begin > _SHORT:
                progress(done, len(images))

        captions = pipeline.caption(loaded, max_tokens=max_tokens, on_event=tell)
    for image, text in zip(images, captions, strict=True):
        record = {"image": str(image), "caption": text}
        print(json.dumps(record, ensure_ascii=False) if as_json else f"{image}: {text}")


def score(
    model: Model,
    parts: Annotated[
        list[str],
        typer.Argument(help="texts, images and sounds as @FILE, - for standard input. The last is scored"),
    ],
    samples: Annotated[int, typer.Option(min=4, help="draws for an image, an even number")] = 128,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SAMPLING_SEED, help="of the draws")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
    weights: Weights = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Tell how likely the model finds a text or an image behind others."""
    from dataclasses import asdict

    from transfusion.generate.pipeline import Pipeline
    from transfusion.generate.terminal import describe_score, read_parts

    pipeline = Pipeline.from_export(model, weights=weights, device=device, dtype=dtype)
    *context, target = read_parts(parts, pipeline.config, sys.stdin)
    (found,) = pipeline.score([context], [target], samples=samples, seed=seed)
    print(json.dumps(asdict(found)) if as_json else describe_score(found))


def replay(
    file: Annotated[Path, typer.Argument(help="a PNG that transfusion drew")],
    model: Annotated[
        Path | None, typer.Option(help="the model. None: the one that index.jsonl beside the image names")
    ] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="an image of its prompt, repeated for several")
    ] = None,
    device: Device = "auto",
) -> None:
    """Make an image again by the recipe that it carries, and compare. Exits with 3 where it differs."""
    from transfusion.generate.image_files import load_images, model_of, read_pixels
    from transfusion.generate.pipeline import Pipeline
    from transfusion.generate.recipe import pixel_digest, read_recipe

    recipe = read_recipe(file)
    folder = model or model_of(file)
    origin = recipe.origin
    pipeline = Pipeline.from_export(
        folder, weights=origin.weights or "auto", device=device, dtype=origin.dtype or "auto"
    )
    there = read_pixels(file)
    if pixel_digest(there) != recipe.pixels:
        raise UserError(f"{file} was changed after it was drawn: its pixels are not those of its recipe")
    again = pipeline.replay(recipe, load_images(image or [], pipeline.config))
    difference = int((again.pixels.int() - there.int()).abs().max())
    if again.recipe is not None and again.recipe.pixels == recipe.pixels:
        print(f"{file}: made again, the same in every pixel")
        return
    print(f"{file}: made again, and it differs by up to {difference} of 255")
    raise typer.Exit(3)


def add_to(app: typer.Typer) -> None:
    """Add the commands to a program."""
    for command in (sample, edit, generate, chat, caption, score, replay):
        app.command()(command)
