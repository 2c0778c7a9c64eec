"""An output folder of images holds what its index says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from transfusion.errors import UserError
from transfusion.generate.image_files import INDEX, SampleFolder, save_samples, write_sheet
from transfusion.generate.pipeline import SampledImage


def drawn(count: int, prompt: str) -> list[SampledImage]:
    return [SampledImage(torch.full((1, 4, 4), 9 * n, dtype=torch.uint8), prompt, n) for n in range(count)]


def test_numbers_go_on_behind_what_is_there(tmp_path: Path) -> None:
    save_samples(drawn(2, "three"), tmp_path)
    (tmp_path / "0009.png").write_bytes(b"of the user")
    (tmp_path / "notes.png").write_text("mine")
    folder = SampleFolder(tmp_path)
    folder.add(drawn(2, "seven"))
    assert str(folder) == f"{tmp_path}/0010.png to 0011.png" and folder.last == tmp_path / "0011.png"
    lines = [json.loads(line) for line in (tmp_path / INDEX).read_text().splitlines()]
    assert [(line["file"], line["prompt"]) for line in lines] == [
        ("0000.png", "three"),
        ("0001.png", "three"),
        ("0010.png", "seven"),
        ("0011.png", "seven"),
    ]
    assert (tmp_path / "0009.png").read_bytes() == b"of the user" and len(list(tmp_path.iterdir())) == 7


def test_each_image_is_there_as_soon_as_it_is_drawn(tmp_path: Path) -> None:
    """The index names it."""
    folder = SampleFolder(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    for count in (1, 3):
        folder.add(drawn(count - folder.count, "new"))
        index = (tmp_path / "new" / INDEX).read_text().splitlines()
        assert folder.count == count == len(index)
        assert len(list((tmp_path / "new").glob("*.png"))) == count


def test_a_folder_that_cannot_be_is_told_before_anything_is_drawn(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*name another folder"):
        SampleFolder(tmp_path / "file")


def test_a_sheet_has_a_row_below_each_prompt(tmp_path: Path) -> None:
    samples = [*drawn(3, "three"), *drawn(2, "a prompt that is wider than the images of its row " * 4)]
    write_sheet(samples, tmp_path / "new" / "sheet.png")
    with Image.open(tmp_path / "new" / "sheet.png") as sheet:
        values = np.asarray(sheet)
    assert values.shape == (2 * (48 + 4 + 18) + 4, 280, 3)
    for top, count in ((22, 3), (92, 2)):
        for number in range(4):
            cell = values[top : top + 48, 4 + 52 * number : 52 + 52 * number]
            assert (cell == (9 * number if number < count else 255)).all()
        assert (values[top - 18 : top] < 128).any(), "the prompt stands above its row"


def test_a_sheet_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*; name another file"):
        write_sheet(drawn(1, "three"), tmp_path / "file" / "sheet.png")
