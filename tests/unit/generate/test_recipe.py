"""A recipe makes its image again, from the PNG alone, and says why where it cannot."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from transfusion.errors import UserError
from transfusion.generate import ImageDone, Pipeline, read_recipe
from transfusion.generate.image_files import save_samples
from transfusion.generate.recipe import KEYWORD, Origin, pixel_digest

Build = Callable[..., Pipeline]


def test_a_png_makes_its_image_again(build_pipeline: Build, tmp_path: Path) -> None:
    pipeline = build_pipeline()
    drawn = pipeline.sample(
        ["one", "two"],
        per_prompt=2,
        seed=4,
        steps=3,
        guidance=2.0,
        negative_prompt="three",
        guidance_interval=(0.2, 0.8),
        guidance_rescale=0.3,
        sampler="dpmpp_2m",
    )
    save_samples(drawn, tmp_path / "out")
    for number, image in enumerate(drawn):
        recipe = read_recipe(tmp_path / "out" / f"000{number}.png")
        assert recipe == image.recipe and recipe.image.seed == 4 + number
        again = pipeline.replay(recipe)
        assert torch.equal(again.pixels, image.pixels) and again.recipe == recipe
        assert recipe.pixels == pixel_digest(image.pixels)


def test_auto_is_told_by_its_name(build_pipeline: Build) -> None:
    """So that another default of a later version changes nothing."""
    (image,) = build_pipeline().sample(["one"], steps=2)
    assert image.recipe is not None and image.recipe.image.sampler == "ddim"


def test_an_image_within_an_answer(build_pipeline: Build, make_image: Any) -> None:
    """Text is drawn again too, for the images behind it stand on it. The prompt's images are given."""
    pipeline = build_pipeline(image=50.0)
    image, other = (torch.from_numpy(make_image(number)) for number in (3, 4))
    settings: Any = {"max_tokens": 9, "max_images": 3, "steps": 2, "temperature": 1.0, "seed": 6}
    events = pipeline.stream([image, "one", other, image], **settings)
    done = [event for event in events if isinstance(event, ImageDone)]
    assert len(done) == 3
    for event in done:
        again = pipeline.replay(event.recipe, [other, image])
        assert torch.equal(again.pixels, event.pixels) and again.seed == event.seed
    with pytest.raises(UserError, match="none of the given images is image 2 of the prompt; give the very"):
        pipeline.replay(done[0].recipe, [image])


def test_what_cannot_be_made_again(build_pipeline: Build) -> None:
    pipeline = build_pipeline()
    (image,) = pipeline.sample(["one"], steps=2)
    assert image.recipe is not None
    for name, value in {"model": "a1b2", "weights": "ema", "dtype": "int8"}.items():
        recipe = replace(image.recipe, origin=replace(Origin(), **{name: value}))
        with pytest.raises(UserError, match=f"made with {name} {value}, this is unknown"):
            pipeline.replay(recipe)
    with pytest.raises(UserError, match="steps 5000 must lie in"):
        pipeline.replay(replace(image.recipe, image=replace(image.recipe.image, steps=5000)))
    for seed in (-5, 1 << 70):
        with pytest.raises(UserError, match=f"seed {seed} must lie in"):
            pipeline.replay(replace(image.recipe, image=replace(image.recipe.image, seed=seed)))
    for parts, message in (
        (("one " * 400,), "leaves no room in a sequence"),
        (("\ud800",), "is not Unicode"),
    ):
        with pytest.raises(UserError, match=message):
            pipeline.replay(replace(image.recipe, prompt=parts))
    with pytest.raises(UserError, match="has no image number 3"):
        pipeline.replay(replace(image.recipe, index=3))


def png(path: Path, text: str | None) -> Path:
    info = PngInfo()
    if text is not None:
        info.add_itxt(KEYWORD, text)
    Image.new("L", (8, 8)).save(path, "PNG", pnginfo=info)
    return path


def test_files_without_a_recipe(build_pipeline: Build, tmp_path: Path) -> None:
    (image,) = build_pipeline().sample(["one"], steps=2)
    assert image.recipe is not None
    plain: dict[str, Any] = json.loads(image.recipe.as_json())
    good = png(tmp_path / "good.png", json.dumps(plain))
    assert read_recipe(good) == image.recipe
    cut = tmp_path / "cut.png"
    cut.write_bytes(good.read_bytes()[:60])
    cases = {
        png(tmp_path / "none.png", None): "carries no recipe",
        png(tmp_path / "empty.png", ""): r"does not read \(no JSON\)",
        png(tmp_path / "text.png", "a cat, trending"): r"does not read \(no JSON\)",
        png(tmp_path / "list.png", "[1]"): "does not read",
        png(tmp_path / "lacks.png", json.dumps(plain | {"pixels": None})): r"does not read \(pixels\)",
        png(tmp_path / "next.png", json.dumps(plain | {"format": 2})): r"does not read \(format\)",
        cut: "it is no whole PNG",
        tmp_path / "absent.png": "No such file",
        tmp_path: "Is a directory",
    }
    for path, message in cases.items():
        with pytest.raises(UserError, match=message):
            read_recipe(path)


def test_a_recipe_names_no_place(build_pipeline: Build, tmp_path: Path) -> None:
    (image,) = build_pipeline().sample(["one"], steps=2)
    save_samples([image], tmp_path)
    assert image.recipe is not None and str(tmp_path) not in image.recipe.as_json()
    assert str(tmp_path).encode() not in (tmp_path / "0000.png").read_bytes()
