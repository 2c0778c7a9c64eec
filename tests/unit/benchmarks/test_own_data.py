"""The campaign of the README's path for own images runs what stands there, and tells failures and long waits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

sys.path.append(str(Path(__file__).parents[3] / "campaigns"))
import own_data

ROOT = Path(__file__).parents[3]

GOOD: dict[str, Any] = {
    "commands": [
        {"command": "transfusion train", "code": 0, "seconds": 90.0, "silence": 10.2, "last_line": "done"}
    ],
    "seconds": 90.0,
    "images_in_report": 40,
    "captions": 32,
}


def test_the_commands_are_those_of_the_readme_without_what_is_said_of_them() -> None:
    found = own_data.commands((ROOT / "README.md").read_text(encoding="utf-8"))
    assert [command.split()[1] for command in found] == [
        "prepare", "tokenizer", "train", "export", "sample", "eval", "report",
    ]  # fmt: skip
    assert not any("#" in command for command in found)


def test_pictures_have_captions_and_sides_within_bounds(tmp_path: Path) -> None:
    own_data.draw_pictures(tmp_path / "a", count=12)
    own_data.draw_pictures(tmp_path / "b", count=12)
    pictures = sorted((tmp_path / "a").glob("*.png"))
    assert len(pictures) == 12
    for path in pictures:
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
        with Image.open(path) as picture:
            assert min(picture.size) >= 28 and max(picture.size) <= 64
            colour, shape = path.with_suffix(".txt").read_text().split()[1:]
            colours = {found for _, found in picture.convert("RGB").getcolors(4096) or ()}
        assert own_data.COLOURS[colour] in colours and shape in own_data.SHAPES


def test_a_wait_is_measured_at_the_start_between_words_and_at_the_end(tmp_path: Path) -> None:
    for command in ("sleep 0.4; echo a", "echo a; sleep 0.4; echo b", "echo a; sleep 0.4"):
        ended = own_data.run(command, tmp_path)
        assert ended.code == 0 and 0.35 < ended.silence <= ended.seconds
    steady = own_data.run("for i in 1 2 3 4 5 6; do echo $i; sleep 0.1; done; exit 7", tmp_path)
    assert (
        steady.code == 7
        and steady.silence < 0.35
        and steady.seconds > 0.5
        and steady.printed.startswith("1\n2")
    )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seconds": 301.0}, "301.0 s of at most 300"),
        ({"images_in_report": 3}, "too few images"),
        ({"captions": 0}, "no captions"),
        ({"commands": [{**GOOD["commands"][0], "silence": 16.0}]}, "16.0 s of silence"),
        (
            {"commands": [{**GOOD["commands"][0], "code": 2, "last_line": "no folder"}]},
            "exit code 2: no folder",
        ),
    ],
)
def test_what_is_missed_is_told(changes: dict[str, Any], told: str) -> None:
    assert own_data.missed(GOOD) == []
    (line,) = own_data.missed({**GOOD, **changes})
    assert told in line
