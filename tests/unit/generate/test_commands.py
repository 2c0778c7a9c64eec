"""The commands that generate, on an exported folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from transfusion.cli.main import main
from transfusion.generate import Pipeline, read_recipe, to_image

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> Call:
    """A command in this process, in a folder of its own: exit code, standard output, standard error."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["transfusion", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return (int(ended.value.code or 0), *capsys.readouterr())

    return run


def test_prompts_come_from_a_file_and_make_the_same_images(call: Call, folder: Path) -> None:
    Path("prompts.txt").write_text("one\n\ntwo three\n", encoding="utf-8")
    settings = ("--num-inference-steps", 2, "--guidance-scale", 2, "--negative-prompt", "seven")
    more = ("--guidance-interval", 0.2, 0.9, "--guidance-rescale", 0.5, "--sampler", "dpmpp_2m", "--seed", 3)
    code, told, _ = call("sample", folder, "--prompts", "prompts.txt", "--out", "a", *settings, *more)
    assert code == 0 and told.startswith("a/0000.png to 0001.png, and index.jsonl")
    drawn = Pipeline.from_export(folder).sample(
        ["one", "two three"],
        steps=2,
        guidance=2.0,
        negative_prompt="seven",
        guidance_interval=(0.2, 0.9),
        guidance_rescale=0.5,
        sampler="dpmpp_2m",
        seed=3,
    )
    for number, image in enumerate(drawn):
        there = np.asarray(Image.open(f"a/000{number}.png")).astype(int)
        assert np.abs(there - image.pixels[0].numpy()).max() <= 1
    lines = [json.loads(line) for line in Path("a/index.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["one", "two three"]
    assert all(line["model"] == str(folder.resolve()) for line in lines)


def test_a_drawn_image_is_made_again(call: Call, folder: Path) -> None:
    assert call("sample", folder, "--prompt", "one", "--out", "a", "--steps", 2, "--dtype", "int8")[0] == 0
    code, told, _ = call("replay", "a/0000.png")
    assert (code, told) == (0, "a/0000.png: made again, the same in every pixel\n")
    assert read_recipe(Path("a/0000.png")).origin.dtype == "int8"
    # Alone it does not know its model.
    Path("a/0000.png").rename("alone.png")
    code, _, told = call("replay", "alone.png")
    assert code == 2 and "no index beside alone.png names the model" in told
    assert call("replay", "alone.png", "--model", folder)[0] == 0


def test_what_was_changed_is_told(call: Call, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call("sample", folder, "--prompt", "one", "--out", "a", "--steps", 2)[0] == 0
    recipe = read_recipe(Path("a/0000.png"))
    with Image.open("a/0000.png") as image:
        brighter = image.point(lambda value: min(value + 9, 255))
    brighter.save("b.png", pnginfo=recipe.as_chunk())
    code, _, told = call("replay", "b.png", "--model", folder)
    assert code == 2 and "was changed after it was drawn" in told
    replayed = Pipeline.replay

    def darker(self: Pipeline, *arguments: Any) -> Any:
        from dataclasses import replace

        image = replayed(self, *arguments)
        pixels = (image.pixels.int() - 3).clamp(min=0).to(torch.uint8)
        return replace(image, pixels=pixels, recipe=replace(image.recipe, pixels="other"))

    monkeypatch.setattr(Pipeline, "replay", darker)
    code, told, _ = call("replay", "a/0000.png")
    assert code == 3 and told == "a/0000.png: made again, and it differs by up to 3 of 255\n"


def test_an_edit_and_its_replay(call: Call, folder: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)
    Image.fromarray(values).save("photo.png")
    code, told, _ = call("edit", folder, "photo.png", "one", "--steps", 2, "--cfg", 1)
    assert (code, told) == (0, "edited/0000.png\n")
    code, _, error = call("replay", "edited/0000.png")
    assert code == 2 and "the prompt has images, 1 in number; give their files with --image" in error
    assert call("replay", "edited/0000.png", "--image", "photo.png")[0] == 0


def test_the_best_of_several(call: Call, folder: Path) -> None:
    settings = ("--prompt", "one", "--prompt", "two", "--steps", 1, "--cfg", 1)
    assert call("sample", folder, *settings, "--best-of", 3, "--out", "a")[0] == 0
    best = Pipeline.from_export(folder).best_of(["one", "two"], count=3, steps=1, guidance=1.0)
    seeds = [json.loads(line)["seed"] for line in Path("a/index.jsonl").read_text().splitlines()]
    assert seeds == [image.seed for image in best]
    code, _, told = call("sample", folder, *settings, "--best-of", 3, "-n", 2, "--out", "b")
    assert code == 2 and "--best-of keeps one image of each caption; leave -n out" in told
    code, _, told = call("sample", folder, *settings, "--out", "b", "--sheet", "all.jpg")
    assert code == 2 and "--sheet all.jpg must end in .png" in told
    assert call("sample", folder, *settings, "-n", 2, "--out", "b", "--sheet", "all.png")[0] == 0
    assert Path("all.png").read_bytes().startswith(b"\x89PNG")
    code, _, told = call("sample", folder, "--out", "b")
    assert code == 2 and "nothing to draw: give --prompt TEXT" in told


def test_scores_of_a_text_and_an_image(call: Call, folder: Path, make_image: Any) -> None:
    to_image(torch.from_numpy(make_image(1))).save("a.png")
    code, told, _ = call("score", folder, "@a.png", "one two", "--json")
    record = json.loads(told)
    (score,) = Pipeline.from_export(folder).score([torch.from_numpy(make_image(1))], ["one two"])
    assert code == 0 and record["log_likelihood"] == pytest.approx(score.log_likelihood, rel=1e-5)
    code, told, _ = call("score", folder, "one", "@a.png", "--samples", 4)
    assert code == 0 and told.startswith("log-likelihood at least ") and "64 values" in told


def test_a_chat_from_standard_input(call: Call, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n/quit\n"))
    code, told, _ = call("chat", folder, "--max-tokens", 3, "--max-images", 0)
    assert code == 0 and told.strip()


def test_a_time_in_place_of_steps(call: Call, folder: Path) -> None:
    command = ("sample", folder, "--prompt", "one", "--cfg", 1, "--out", "a", "--budget")
    code, _, told = call(*command, "5s")
    assert code == 2 and "--suite steps` first" in told
    (folder / "metrics.json").write_text(json.dumps({"distance_dpmpp_2m_2_steps": 1.0}))
    code, _, told = call(*command, "5s")
    assert code == 0 and "dpmpp_2m, 2 steps" in told
    recipe = read_recipe(Path("a/0000.png"))
    assert (recipe.image.sampler, recipe.image.steps) == ("dpmpp_2m", 2)
