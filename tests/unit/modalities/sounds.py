"""Texts, images and sounds, alone and together, as samples; a sound is sines of one frequency on three channels."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SOUND: dict[str, Any] = {
    "name": "sound", "channels": 3, "shapes": ["1x16", "1x8"], "patch": "1x4", "scale": 2.0, "shift": 0.5,
    "diffusion": {"prediction": "flow"},
}  # fmt: skip
WORDS = ("low", "middle", "high")


def sound(number: int, length: int = 16) -> NDArray[np.float32]:
    """float32 [3, 1, length]."""
    phase = np.arange(length) * (1 + number % 3) / 3
    return np.stack([np.sin(phase), np.cos(phase), -np.sin(phase)])[:, None].astype(np.float32) / 2 + 0.5


def npy(array: NDArray[Any]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def png(number: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((8, 8), 40 + 80 * (number % 3), np.uint8)).save(stream, format="PNG")
    return stream.getvalue()


def samples(count: int = 48) -> Iterator[dict[str, bytes]]:
    """Of four kinds in turn: a sound, an image, a text, and a document of an image, a text and two sounds."""
    for number in range(count):
        word = WORDS[number % 3]
        if number % 4 == 0:
            length = 16 if number % 8 else 8
            yield {"sound.npy": npy(sound(number, length)), "txt": f"a {word} sound, {number}".encode()}
        elif number % 4 == 1:
            yield {"png": png(number), "txt": f"a {word} grey, {number}".encode()}
        elif number % 4 == 2:
            yield {"txt": f"the word {word} stands here alone, {number}".encode()}
        else:
            elements = [
                {"type": "image", "image": "img0.png"},
                {"type": "text", "text": f"sounds {word}:"},
                {"type": "sound", "sound": "sound0.npy"},
                {"type": "sound", "sound": "sound1.npy"},
            ]
            yield {
                "img0.png": png(number),
                "sound0.npy": npy(sound(number, 8)),
                "sound1.npy": npy(sound(number + 1)),
                "json": json.dumps({"elements": elements}).encode(),
            }
