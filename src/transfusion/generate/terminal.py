"""An answer on a terminal or for another program, piece by piece as it comes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from transfusion.config import Config
from transfusion.errors import UserError
from transfusion.generate.engine import Part
from transfusion.generate.events import Done, Event, ImageDone, ImagePreview, ImageStart, TextDelta
from transfusion.generate.image_files import SampleFolder, load_images
from transfusion.generate.pipeline import SampledImage

# How an answer ended, where it did not end by itself.
_REASONS = {"tokens": "at --max-tokens", "length": "where the model's row is full"}


def read_parts(words: Sequence[str], config: Config, stdin: TextIO) -> list[Part]:
    """The parts of a prompt as a command line has them.

    Args:
        words: Texts, images as `@FILE`, and `-` for a text on standard input. `@@` begins a text that begins with @.
        config: The model's, to whose sizes images come.
        stdin: Standard input.

    Raises:
        UserError: For an image that cannot be read, or standard input that is no text.
    """
    parts: list[Part] = []
    for word in words:
        if word.startswith("@") and not word.startswith("@@"):
            parts += load_images([Path(word[1:])], config)
        elif word == "-":
            try:
                parts.append(stdin.read())
            except UnicodeDecodeError as error:
                raise UserError(f"standard input is not UTF-8 text: {error.reason}") from None
        else:
            parts.append(word[1:] if word.startswith("@@") else word)
    return parts


def tell(events: Iterator[Event], prompt: str, folder: SampleFolder, out: TextIO, *, as_json: bool) -> None:
    """Write an answer as it comes, and its images into a folder.

    Args:
        events: The answer.
        prompt: What the folder's index says of the images.
        folder: Of the images.
        out: Where the text goes, and a line for each image. With `as_json` each event is a JSON object on a line.
        as_json: For other programs.
    """
    for event in events:
        file = ""
        if isinstance(event, ImageDone):
            folder.add([SampledImage(event.pixels, prompt, event.seed)])
            file = str(folder.last)
        if as_json:
            print(json.dumps(_record(event, file), ensure_ascii=False), file=out, flush=True)
        elif isinstance(event, TextDelta):
            print(event.text, end="", file=out, flush=True)
        elif isinstance(event, ImageDone):
            print(f"\n[{file}]", file=out, flush=True)
        elif isinstance(event, Done):
            print(file=out, flush=True)
            if event.reason in _REASONS:
                print(f"the answer ends {_REASONS[event.reason]}", file=sys.stderr)


def _record(event: Event, file: str) -> dict[str, Any]:
    if isinstance(event, TextDelta):
        return {"event": "text", "text": event.text}
    if isinstance(event, ImageStart):
        return {"event": "image_start", "index": event.index, "size": list(event.size), "steps": event.steps}
    if isinstance(event, ImagePreview):
        return {"event": "image_preview", "index": event.index, "step": event.step}
    if isinstance(event, ImageDone):
        return {"event": "image", "index": event.index, "file": file, "seed": event.seed}
    usage = {"prompt": event.prompt_positions, "tokens": event.tokens, "images": event.images}
    return {"event": "done", "reason": event.reason, "usage": usage}
