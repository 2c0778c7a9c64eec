"""Runs the commands of README.md for one's own images as they are written, and records how long they take.

    .venv/bin/python campaigns/own_data.py [--images FOLDER] [--keep FOLDER] [--out FILE]

Without --images it draws 1,000 pictures of 28 to 64 pixels: shapes of eight colours, each with a caption. Records the
time of each command, the longest time without a word on the terminal, and what the report shows. Exits with 3 when a
command fails, a bar is missed, or the report lacks images or captions. Needs an idle machine.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "own-data.json"
HEADING = "## Your own images"
IMAGES, SIDES = 1000, (28, 64)
MAX_SECONDS, MAX_SILENCE = 300.0, 15.0
COLOURS = {
    "red": (220, 40, 40), "green": (40, 160, 60), "blue": (40, 80, 220), "yellow": (240, 200, 40),
    "purple": (140, 60, 180), "orange": (240, 130, 30), "black": (20, 20, 20), "grey": (140, 140, 140),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "cross")


class Ended(NamedTuple):
    """A command that has run. silence: the longest time without output, its start and end included."""

    code: int
    seconds: float
    silence: float
    printed: str


def commands(readme: str) -> list[str]:
    """The commands of the first block below the heading, without what is said of them."""
    block = readme.split(HEADING, 1)[1].split("```", 2)[1]
    return [line.split("  #")[0].strip() for line in block.strip().splitlines()]


def draw_pictures(folder: Path, *, count: int = IMAGES, seed: int = 0) -> None:
    """Shapes on white, each with its caption beside it."""
    chance = random.Random(seed)
    folder.mkdir(parents=True)
    for number in range(count):
        width, height = (chance.randint(*SIDES) for _ in range(2))
        colour, shape = chance.choice(list(COLOURS)), chance.choice(SHAPES)
        side = min(width, height) * 2 // 3
        left, top = chance.randint(0, width - side), chance.randint(0, height - side)
        picture = Image.new("RGB", (width, height), "white")
        _shape(ImageDraw.Draw(picture), shape, (left, top, left + side, top + side), COLOURS[colour])
        picture.save(folder / f"{number:04d}.png")
        (folder / f"{number:04d}.txt").write_text(
            f"{'an' if colour == 'orange' else 'a'} {colour} {shape}", encoding="utf-8"
        )


def _shape(
    pen: ImageDraw.ImageDraw, shape: str, box: tuple[int, int, int, int], colour: tuple[int, int, int]
) -> None:
    left, top, right, bottom = box
    third = (right - left) // 3
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "square":
        pen.rectangle(box, fill=colour)
    elif shape == "triangle":
        pen.polygon([(left, bottom), (right, bottom), ((left + right) // 2, top)], fill=colour)
    else:
        pen.rectangle((left + third, top, right - third, bottom), fill=colour)
        pen.rectangle((left, top + third, right, bottom - third), fill=colour)


def run(command: str, folder: Path) -> Ended:
    """Run a command as a user would type it, and note when it says something."""
    begin = last = time.monotonic()
    silence, printed = 0.0, bytearray()
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with (
        subprocess.Popen(
            command, shell=True, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process,
        selectors.DefaultSelector() as waiting,
    ):
        assert process.stdout is not None
        waiting.register(process.stdout, selectors.EVENT_READ)
        while waiting.select():
            said = os.read(process.stdout.fileno(), 1 << 16)
            now = time.monotonic()
            silence, last = max(silence, now - last), now
            if not said:
                break
            printed += said
    return Ended(process.returncode, time.monotonic() - begin, silence, printed.decode(errors="replace"))


def missed(found: dict[str, Any]) -> list[str]:
    """What does not hold, in words."""
    return [
        *(
            f"{each['command']}: exit code {each['code']}: {each['last_line']}"
            for each in found["commands"]
            if each["code"]
        ),
        *([f"{found['seconds']} s of at most {MAX_SECONDS:.0f}"] if found["seconds"] > MAX_SECONDS else []),
        *(
            f"{each['command']}: {each['silence']} s of silence, at most {MAX_SILENCE:.0f}"
            for each in found["commands"]
            if each["silence"] > MAX_SILENCE
        ),
        *(["the report has too few images"] if found["images_in_report"] < 16 else []),
        *(["the report has no captions"] if not found["captions"] else []),
    ]


def campaign(pictures: Path | None, place: Path) -> dict[str, Any]:
    """All commands in a folder of their own, which holds `pictures` and the configurations."""
    if pictures is None:
        draw_pictures(place / "pictures")
    else:
        shutil.copytree(pictures, place / "pictures")
    shutil.copytree(ROOT / "configs", place / "configs")
    done = []
    for command in commands((ROOT / "README.md").read_text(encoding="utf-8")):
        ended = run(command, place)
        last = (ended.printed.strip().splitlines() or [""])[-1]
        print(f"{ended.seconds:6.1f} s, {ended.silence:4.1f} s of silence  {command}\n    {last}", flush=True)
        done.append(
            {
                "command": command,
                "code": ended.code,
                "seconds": round(ended.seconds, 1),
                "silence": round(ended.silence, 1),
                "last_line": last,
            }
        )
        if ended.code:
            print(ended.printed, file=sys.stderr)
            break
    page = place / "runs" / "own" / "report.html"
    said = place / "runs" / "own" / "evaluation" / "captions.jsonl"
    return {
        "commands": done,
        "seconds": round(sum(each["seconds"] for each in done), 1),
        "images_in_report": len(re.findall("data:image/png", page.read_text(encoding="utf-8")))
        if page.exists()
        else 0,
        "captions": len(said.read_text(encoding="utf-8").splitlines()) if said.exists() else 0,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--images", type=Path, help="a folder of images with captions, in place of drawn ones"
    )
    parser.add_argument("--keep", type=Path, help="a new folder for what the commands make")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file")
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from limits import find_device, record_head, write_json

    with tempfile.TemporaryDirectory() as scratch:
        place = given.keep or Path(scratch)
        place.mkdir(parents=True, exist_ok=True)
        found = campaign(given.images, place)
    failed = missed(found)
    head = record_head(find_device("auto"))
    write_json(
        {
            "environment": head,
            "images": given.images.name if given.images else "drawn",
            **found,
            "missed": failed,
        },
        given.out,
    )
    print("missed: " + "; ".join(failed) if failed else f"all within {found['seconds']} s")
    return 3 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
