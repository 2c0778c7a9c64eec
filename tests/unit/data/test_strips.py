"""Pictures finished together are the pictures that `decode` gives one by one."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
from PIL import Image

from transfusion.data import strips as module
from transfusion.data.images.decode import decode, decode_to
from transfusion.data.strips import Strips
from transfusion.sequence.sizes import Size

SQUARE = Size(16, 16)


def png(chance: random.Random, mode: str, width: int, height: int, format: str = "PNG") -> bytes:
    depth = {"L": 1, "RGB": 3, "RGBA": 4}[mode]
    values = np.frombuffer(chance.randbytes(width * height * depth), np.uint8)
    shape = (height, width) if depth == 1 else (height, width, depth)
    stream = io.BytesIO()
    Image.fromarray(values.reshape(shape)).save(stream, format)
    return stream.getvalue()


@pytest.mark.parametrize("channels", [1, 3])
def test_as_one_by_one(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All kinds mixed, to three sizes: larger, smaller, right, wide, tall, alone, with alpha, grey, no PNG."""
    chance = random.Random(0)
    sizes = [(24, 24), (24, 24), (24, 24), (9, 9), (16, 16), (31, 17), (31, 17), (17, 31), (16, 40), (13, 16)]
    kinds = [("RGBA", "PNG"), ("RGBA", "PNG"), ("RGB", "PNG"), ("L", "PNG"), ("RGB", "JPEG")]
    monkeypatch.setattr(module, "_STRIP_BYTES", 4 * 24 * 24 * 4)
    pictures, wanted = {}, {}
    strips = Strips(channels=channels)
    for number in range(300):
        (mode, format), size = chance.choice(kinds), chance.choice(sizes)
        pictures[number] = png(chance, mode, *size, format)
        wanted[number] = chance.choice([SQUARE, Size(16, 24), Size(28, 14)])
        strips.add(number, pictures[number], wanted[number])
    finished, faults = strips.finish()
    assert finished.keys() == pictures.keys() and not faults
    for number, data in pictures.items():
        assert np.array_equal(finished[number], decode_to(data, wanted[number], channels=channels)), number
    assert strips.finish() == ({}, {})


def test_most_are_resampled_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most as many at once as the strip holds, and none that is large."""
    pytest.importorskip("cv2")
    counts, together = [], module.resampled

    def counted(pictures: module.Picture, height: int, width: int) -> module.Picture:
        counts.append(len(pictures))
        return together(pictures, height, width)

    monkeypatch.setattr(module, "resampled", counted)
    monkeypatch.setattr(module, "_STRIP_BYTES", 3 * 24 * 24 * 4)
    chance, strips = random.Random(0), Strips(channels=3)
    for number in range(8):
        strips.add(number, png(chance, "RGBA", 24, 24), SQUARE)
    for number, (side, size) in enumerate([(40, SQUARE), (64, SQUARE), (24, Size(48, 48))], start=4):
        strips.add(2 * number, png(chance, "RGBA", side, side), size)
        strips.add(2 * number + 1, png(chance, "RGBA", side, side), size)
    assert len(strips.finish()[0]) == 14
    assert counts == [3, 3, 2]


def test_few_files_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    opened, opening = [], module.single.opened

    def noted(data: bytes) -> object:
        opened.append(len(data))
        return opening(data)

    chance, strips = random.Random(0), Strips(channels=3)
    data = png(chance, "RGBA", 24, 24)
    monkeypatch.setattr(module.single, "opened", noted)
    monkeypatch.setattr(module, "_FILE_BYTES", 3 * len(data))
    counts = []
    for number in range(7):
        strips.add(number, data, SQUARE)
        counts.append(len(opened))
    assert counts == [0, 0, 3, 3, 3, 6, 6]
    assert len(strips.finish()[0]) == len(opened) == 7


@pytest.mark.parametrize("file_bytes", [1, 3000, 1 << 20])
def test_a_fault_leaves_the_others(file_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many files are read before they are decoded."""
    monkeypatch.setattr(module, "_FILE_BYTES", file_bytes)
    chance, strips = random.Random(0), Strips(channels=3)
    good = [png(chance, "RGBA", 24, 24) for _ in range(3)]
    for number, data in enumerate(good):
        strips.add(number, data, SQUARE)
        strips.add(-1 - number, data[: len(data) // 2], SQUARE)
    finished, faults = strips.finish()
    assert finished.keys() == {0, 1, 2}
    assert {number: str(fault) for number, fault in faults.items()} == dict.fromkeys(
        [-1, -2, -3], "image_corrupt"
    )
    for number, data in enumerate(good):
        assert np.array_equal(finished[number], decode(data, channels=3, image_size=16))
