"""Prompts from a command line, and answers on a terminal or for another program, piece by piece as they come."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from PIL import Image
from rich.console import Console
from torch import Tensor

from transfusion.config import Config
from transfusion.errors import UserError
from transfusion.generate.events import (
    Done,
    Event,
    ImageDone,
    ImagePreview,
    ImageStart,
    MediaDone,
    TextDelta,
    extend,
)
from transfusion.generate.image_files import SampleFolder, load_media
from transfusion.generate.media_files import as_file
from transfusion.generate.pillow_images import to_image
from transfusion.generate.pipeline import Pipeline, SampledImage
from transfusion.generate.request import Part, joined
from transfusion.generate.settings import AnswerSettings, check_text
from transfusion.inference.image_scores import Score

# How an answer ended, where it did not end by itself.
_REASONS = {"tokens": "at --max-tokens", "length": "where the model's row is full"}
# Columns that an image takes at most.
_IMAGE_COLUMNS = 64


def read_parts(words: Sequence[str], config: Config, stdin: TextIO | None) -> list[Part]:
    """The parts of a prompt as a command line has them.

    Args:
        words: Texts, images, sounds and arrays as `@FILE`, and `-` for a text on standard input. `@@` begins a text
            that begins with @.
        config: The model's, to whose sizes they come.
        stdin: Standard input.

    Raises:
        UserError: For a file that cannot be read, or standard input that is no text.
    """
    for word in words:
        if not word.startswith("@") and os.path.isfile(word):
            print(f"{word} is read as a text; @{word} is the file", file=sys.stderr)
    return [_read(stdin) if word == "-" else _part(word, config) for word in words]


def _part(word: str, config: Config) -> Part:
    if word.startswith("@") and not word.startswith("@@"):
        if not os.path.exists(word[1:]):
            raise UserError(f"{word} names no file; @@ begins a text that begins with @")
        return load_media([Path(word[1:])], config)[0]
    return word[1:] if word.startswith("@@") else word


def read_lines(name: str, stdin: TextIO | None) -> list[str]:
    """The lines of a file, or of standard input for "-", without those that are blank.

    Raises:
        UserError: For a file that cannot be read, or is no UTF-8 text.
    """
    try:
        text = _read(stdin) if name == "-" else Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text: {error.reason}") from None
    return [line for line in text.splitlines() if line.strip()]


def _read(stdin: TextIO | None) -> str:
    if stdin is None:
        raise UserError("standard input is closed; give a text in place of -")
    try:
        return stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 text: {error.reason}") from None


def tell(
    events: Iterator[Event],
    prompt: str,
    folder: SampleFolder,
    out: TextIO,
    config: Config,
    *,
    as_json: bool = False,
) -> list[Part]:
    """Write an answer as it comes, and its images, sounds and arrays into a folder.

    Args:
        events: The answer.
        prompt: What the folder's index says of them.
        folder: Of them.
        out: Where the text goes, and a line for each file, with an image itself on a terminal of many colours. With
            `as_json` each event is a JSON object on a line.
        config: The model's.
        as_json: For other programs.

    Returns:
        The parts of the answer.
    """
    said: list[Part] = []
    for event in events:
        extend(said, event)
        file = ""
        if isinstance(event, ImageDone):
            folder.add([SampledImage(event.pixels, prompt, event.seed, event.recipe)])
        elif isinstance(event, MediaDone):
            made = as_file(event.media, config)
            folder.add_file(made.suffix, made.data, prompt, event.seed)
        if isinstance(event, ImageDone | MediaDone):
            file = str(folder.last)
        if as_json:
            print(json.dumps(_record(event, file), ensure_ascii=False), file=out, flush=True)
        elif isinstance(event, TextDelta):
            print(event.text, end="", file=out, flush=True)
        elif isinstance(event, ImageDone):
            print(f"\n[{file}]\n{shown(event.pixels, out)}", end="", file=out, flush=True)
        elif isinstance(event, MediaDone):
            print(f"\n[{file}]\n", end="", file=out, flush=True)
        elif isinstance(event, Done):
            print(file=out, flush=True)
            if event.reason in _REASONS:
                print(f"the answer ends {_REASONS[event.reason]}", file=sys.stderr)
    return said


def _record(event: Event, file: str) -> dict[str, Any]:
    if isinstance(event, TextDelta):
        return {"event": "text", "text": event.text}
    if isinstance(event, ImageStart):
        return {
            "event": "image_start",
            "index": event.index,
            "size": list(event.size.sides),
            "steps": event.steps,
        }
    if isinstance(event, ImagePreview):
        return {"event": "image_preview", "index": event.index, "step": event.step}
    if isinstance(event, ImageDone):
        return {"event": "image", "index": event.index, "file": file, "seed": event.seed}
    if isinstance(event, MediaDone):
        modality = event.media.modality
        return {
            "event": "media",
            "modality": modality,
            "index": event.index,
            "file": file,
            "seed": event.seed,
        }
    assert isinstance(event, Done)
    usage = {"prompt": event.prompt_positions, "tokens": event.tokens, "images": event.images}
    return {"event": "done", "reason": event.reason, "usage": usage}


def shown(pixels_CHW: Tensor, out: TextIO) -> str:
    """An image as coloured blocks, two pixels a letter, where `out` is a terminal that has all colours, else nothing.

    rich asks the terminal, NO_COLOR, COLORTERM and TERM.
    """
    console = Console(file=out)
    if not console.is_terminal or console.no_color or console.color_system != "truecolor":
        return ""
    image = to_image(pixels_CHW).convert("RGB")
    columns = max(1, min(image.width, _IMAGE_COLUMNS, console.width - 1))
    rows = max(2, 2 * round(image.height * columns / image.width / 2))
    if image.size != (columns, rows):
        image = image.resize((columns, rows), Image.Resampling.BOX)
    lines = []
    for top in range(0, rows, 2):
        letters = []
        for column in range(columns):
            upper, lower = (_colour(image, column, top + below) for below in (0, 1))
            letters.append(f"\x1b[38;2;{upper}m\x1b[48;2;{lower}m\N{UPPER HALF BLOCK}")
        lines.append("".join(letters) + "\x1b[0m\n")
    return "".join(lines)


def _colour(image: Image.Image, column: int, row: int) -> str:
    pixel = image.getpixel((column, row))
    assert isinstance(pixel, tuple)
    return ";".join(map(str, pixel))


def chat(
    pipeline: Pipeline,
    folder: SampleFolder,
    lines: TextIO | None,
    out: TextIO,
    *,
    seed: int = 0,
    settings: AnswerSettings,
) -> None:
    """Answer one line after another, each behind all that was said before.

    Args:
        pipeline: The model.
        folder: Of what is drawn.
        lines: What the user says. `@FILE` among the words is an image, a sound or an array. `/new` forgets what was
            said, `/quit` ends.
        out: As for `tell`.
        seed: Answer n is drawn from `seed + n`.
        settings: Of the answers.

    Raises:
        UserError: For settings out of range, before anything is said.
    """
    if lines is None:
        raise UserError("standard input is closed; run chat on a terminal, or give it lines")
    pipeline.stream("", seed=seed, **settings)
    said: list[Part] = []
    asks = lines.isatty()
    if isinstance(lines, io.TextIOWrapper):
        # What is no UTF-8 is told of as what is no Unicode, and the talk goes on.
        lines.reconfigure(errors="surrogateescape")
    while True:
        print("> " if asks else "", end="", file=sys.stderr, flush=True)
        line = lines.readline()
        words = line.split()
        if not line or words == ["/quit"]:
            return
        if not words or words == ["/new"]:
            said = said if not words else []
            continue
        try:
            check_text(line.strip())
            asked = joined(said, joined([], [_part(word, pipeline.config) for word in words], " "), "\n")
        except UserError as error:
            print(error, file=sys.stderr)
            continue
        try:
            events = pipeline.stream(asked, seed=seed, **settings)
            said = joined(asked, tell(events, line.strip(), folder, out, pipeline.config))
        except KeyboardInterrupt:
            print("\nstopped", file=sys.stderr)
        except UserError as error:
            print(f"{error}; /new begins anew", file=sys.stderr)
        seed += 1


def describe_score(score: Score) -> str:
    """One line."""
    each = f"{score.log_likelihood / score.count:.4g} each" if score.count else "nothing to score"
    if score.standard_error:
        error = f"{score.log_likelihood:.6g} \N{PLUS-MINUS SIGN} {score.standard_error:.2g}"
        return f"log-likelihood at least {error} nats, {score.count} values, {each}"
    return f"log-likelihood {score.log_likelihood:.6g} nats, {score.count} tokens, {each}"
