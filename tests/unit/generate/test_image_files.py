"""An output folder of images holds what its index says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from transfusion.errors import UserError
from transfusion.generate.image_files import INDEX, SampleFolder, save_samples
from transfusion.generate.pipeline import SampledImage


def drawn(count: int, prompt: str) -> list[SampledImage]:
    return [SampledImage(torch.full((1, 4, 4), 9 * n, dtype=torch.uint8), prompt, n) for n in range(count)]


def test_images_of_a_former_call_are_removed_and_others_stay(tmp_path: Path) -> None:
    save_samples(drawn(5, "three"), tmp_path)
    (tmp_path / "0009.png").write_bytes(b"of the user")
    (tmp_path / "notes.txt").write_text("mine")
    save_samples(drawn(2, "seven"), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / INDEX).read_text().splitlines()]
    assert [(line["file"], line["prompt"]) for line in lines] == [
        ("0000.png", "seven"),
        ("0001.png", "seven"),
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "0000.png", "0001.png", "0009.png", INDEX, "notes.txt",
    ]  # fmt: skip


def test_each_image_is_there_as_soon_as_it_is_drawn(tmp_path: Path) -> None:
    """The index names it, and what stood there before is gone only then."""
    save_samples(drawn(3, "former"), tmp_path)
    folder = SampleFolder(tmp_path)
    assert (tmp_path / "0002.png").exists()
    folder.add(drawn(1, "new"))
    assert [json.loads(line)["prompt"] for line in (tmp_path / INDEX).read_text().splitlines()] == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0000.png", INDEX]
    folder.add(drawn(2, "more"))
    assert folder.count == 3 and len((tmp_path / INDEX).read_text().splitlines()) == 3


def test_a_folder_that_cannot_be_is_told_before_anything_is_drawn(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write images to .*name another folder"):
        SampleFolder(tmp_path / "file")
