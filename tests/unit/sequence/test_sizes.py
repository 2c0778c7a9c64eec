"""Which size an image takes, what begins it, and what a configuration refuses."""

from __future__ import annotations

import numpy as np
import pytest

from transfusion.config import Config, load_config
from transfusion.errors import UserError
from transfusion.schema import SpecialToken
from transfusion.sequence.sizes import MediaSizes, Size, nearest

SIZES = (Size(32, 32), Size(32, 64), Size(64, 32), Size(64, 64))


@pytest.mark.parametrize(
    ("height", "width", "chosen"),
    [
        (40, 41, "32x32"),
        (300, 290, "64x64"),  # of two squares the one nearer in area
        (10, 19, "32x64"),
        (1000, 501, "64x32"),
        (
            100,
            141,
            "32x32",
        ),  # on either side of the border, the square root of two: the ratio decides, not the area
        (100, 142, "32x64"),
        (7, 100, "32x64"),  # beyond all of them
    ],
)
def test_an_image_takes_the_nearest_ratio_then_the_nearest_area(height: int, width: int, chosen: str) -> None:
    sizes = SIZES if height != 100 else SIZES[:3]
    assert str(MediaSizes(sizes, 1, 2).for_image(height, width)) == chosen


def test_of_equals_the_first_is_taken() -> None:
    wide = (Size(8, 16), Size(16, 8))
    for sizes in (wide, wide[::-1]):
        assert nearest(sizes, np.array([10]), np.array([10])).tolist() == [0]


def test_latents_have_the_size_that_they_were_made_at() -> None:
    sizes = MediaSizes(SIZES, 8, 1)
    height, width = np.array([8, 8, 400]), np.array([4, 8, 200])
    assert sizes.numbers(height, width, np.array([True, True, False])).tolist() == [2, 3, 2]


def test_every_size_has_a_token_of_its_own() -> None:
    config = load_config(None, ["codec.image_sizes=[32x32,32x48,48x32]"])
    assert config.media_sizes.first == Size(32, 32) and config.patches_per_image == 256
    with pytest.raises(ValueError, match="vocabulary must be known"):
        config.media_sizes.begin_token(Size(32, 48))
    for pieces, asked, rows in ((320, 0, 322), (320, 400, 400), (320, 320, 322)):
        model = config.model.model_copy(update={"vocabulary": asked})
        known = config.model_copy(update={"model": model}).with_vocabulary(pieces)
        assert known.model.vocabulary == rows and known.with_vocabulary(pieces) == known
        assert list(known.media_sizes.size_by_begin_token) == [SpecialToken.BEGIN_IMAGE, rows - 2, rows - 1]
    plain = Config().with_vocabulary(320)
    assert plain.model.vocabulary == 320 and list(plain.media_sizes.size_by_begin_token) == [
        SpecialToken.BEGIN_IMAGE
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["codec.image_sizes=[32x32,32]"], "codec.image_sizes: '32' is not a size; write HEIGHTxWIDTH"),
        (["codec.image_sizes=[32x32,32x32]"], "codec.image_sizes: a size is given twice"),
        (["codec.image_sizes=[32x32,32x33]"], "image_sizes: 32x33 must be a multiple of model.patch_size 2"),
        (["codec.image_sizes=[32x32,4x32]", "model.patch_size=8"], "image_sizes: 4x32 must be a multiple of"),
        (["codec.image_sizes=[32x32,2x64]"], "image_sizes: 2x64 has an aspect ratio above 20"),
        (
            ["codec.image_sizes=[8x8,64x64]", "data.sequence_length=900"],
            "too short for an image of 1024 patches",
        ),
        (
            ["codec.image_sizes=[8x8]", "sample_grid.sizes=[8x16]"],
            "8x16 is not a size of this model's images; choose 8x8",
        ),
        (["sample_grid.sizes=wide"], "sample_grid.sizes: 'wide' is not a size"),
    ],
)
def test_sizes_that_cannot_be(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(None, overrides)
    assert message in str(caught.value)
