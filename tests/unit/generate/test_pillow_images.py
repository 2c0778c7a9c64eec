"""Images of Pillow go in and come out, of any size and mode, as training takes them."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from transfusion.data.images.decode import decode_fitting
from transfusion.errors import UserError
from transfusion.generate import ImageDone, Pipeline, to_image

Build = Callable[..., Pipeline]


def picture(mode: str, height: int = 30, width: int = 20) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "1", "CMYK", "YCbCr", "HSV", "I", "F"])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_mode(build_pipeline: Build, mode: str, channels: int) -> None:
    pipeline = build_pipeline(channels=channels)
    image = picture(mode)
    (answer,) = pipeline.generate([[image, "one"]], max_tokens=1, max_images=0)
    read = answer[0]
    assert isinstance(read, torch.Tensor) and read.shape == (channels, 8, 8) and read.dtype == torch.uint8
    stream = io.BytesIO()
    (image if mode in ("L", "RGB", "RGBA", "LA", "P", "1") else image.convert("RGB")).save(stream, "PNG")
    expected = decode_fitting(stream.getvalue(), pipeline.config.media_sizes, channels=channels)
    assert np.array_equal(read.numpy(), expected)


def test_an_image_is_turned_upright(build_pipeline: Build) -> None:
    """A photograph on its side is read as viewers show it."""
    pipeline = build_pipeline()
    image = picture("L", 8, 8)
    exif = image.getexif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    image.save(stream, "PNG", exif=exif)
    turned = Image.open(io.BytesIO(stream.getvalue()))
    (answer,) = pipeline.generate([[turned]], max_tokens=1, max_images=0)
    assert np.array_equal(answer[0][0].numpy(), np.rot90(np.asarray(image), -1))  # type: ignore[index, union-attr]


def test_images_come_out(build_pipeline: Build) -> None:
    pipeline = build_pipeline(image=50.0)
    (drawn,) = pipeline.sample(["one"], steps=2)
    assert isinstance(drawn.image, Image.Image) and drawn.image.size == (8, 8)
    assert np.array_equal(np.asarray(drawn.image), drawn.pixels[0].numpy())
    done = next(e for e in pipeline.stream("one", steps=2) if isinstance(e, ImageDone))
    assert done.image.tobytes() == to_image(done.pixels).tobytes()
    # What came out goes in again as it is.
    assert pipeline.caption([drawn.image], max_tokens=3) == pipeline.caption([drawn.pixels], max_tokens=3)


def test_what_is_no_image_for_the_model(build_pipeline: Build) -> None:
    pipeline = build_pipeline()
    with pytest.raises(UserError, match=r"more than .* times as long as wide; cut it"):
        pipeline.caption([picture("L", 8, 4000)])
    with pytest.raises(UserError, match="an image must be uint8 of shape"):
        pipeline.caption([torch.zeros(1, 9, 9, dtype=torch.uint8)])


def test_an_edit_follows_image_and_instruction(build_pipeline: Build, make_image: Any) -> None:
    """Each result has the size of its image, and is what `sample` draws behind both."""
    pipeline = build_pipeline(image_sizes=["8x8", "8x16"])
    square, wide = torch.from_numpy(make_image(2)), torch.zeros(1, 8, 16, dtype=torch.uint8)
    settings: Any = {"steps": 2, "guidance": 1.0}
    edited = pipeline.edit([square, wide, square], ["one", "two", "three"], seed=5, **settings)
    assert [tuple(image.pixels.shape) for image in edited] == [(1, 8, 8), (1, 8, 16), (1, 8, 8)]
    assert [image.seed for image in edited] == [5, 6, 7]
    for given, text, image in zip([square, wide, square], ["one", "two", "three"], edited, strict=True):
        size: Any = tuple(given.shape[1:])
        (alone,) = pipeline.sample([[given, text]], seed=image.seed, size=size, **settings)
        assert (alone.pixels.int() - image.pixels.int()).abs().max() <= 1
        assert image.prompt == text
    (tall,) = pipeline.edit([wide], ["one"], size=(8, 8), **settings)
    assert tall.pixels.shape == (1, 8, 8)
    with pytest.raises(UserError, match="1 images and 2 instructions"):
        pipeline.edit([wide], ["one", "two"])
