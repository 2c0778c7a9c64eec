"""Suites on real shards and a small network: what runs by itself, what is left to be looked at, images of two sizes."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pairs import png, source, write_pairs
from PIL import Image

from transfusion.data.prepare.digits import DIGIT_WORDS
from transfusion.data.shards.webdataset import write_shards
from transfusion.errors import UserError
from transfusion.evaluate import captioned_images
from transfusion.evaluate.metrics import classifier as classifiers
from transfusion.evaluate.metrics.classifier import save_classifier, train_classifier
from transfusion.evaluate.metrics.metric import Metric
from transfusion.evaluate.progress_lines import ProgressLines
from transfusion.evaluate.suites.run import DEFAULT, SUITES, choose_for_training, run_suites
from transfusion.generate.budget import read_table
from transfusion.generate.pipeline import Pipeline
from transfusion.inference import image_diffusion

Open = Callable[..., Path]


def run(
    model: Path, asked: list[str], out: Path, *overrides: str, classifier: Path | None = None
) -> dict[str, Metric]:
    """`run_suites` in few steps, with short captions. What is drawn and said is not judged here."""
    quick = [
        f"{name}.{key}={value}"
        for name in asked or DEFAULT
        for key, value in (("steps", 2), ("max_tokens", 3))
        if key in SUITES[name].settings.model_fields
    ]
    return run_suites(model, asked, out, overrides=[*quick, *overrides], classifier=classifier)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_without_a_suite_losses_are_measured_and_a_few_images_drawn_and_captioned(
    open_model: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    captions = [f"a handwritten {DIGIT_WORDS[number % 10]} {number}" for number in range(70)]
    model = open_model({"validation": [source(write_pairs(tmp_path / "pairs", captions))]})
    few = ("samples.count=8", "samples.captions=32")
    read: list[int] = []
    read_values = captioned_images.read_values
    monkeypatch.setattr(
        captioned_images, "read_values", lambda *some: read.append(some[1]) or read_values(*some)
    )
    metrics = run(model, [], tmp_path / "out", *few)
    assert metrics.keys() == {"pairs_image_loss", "caption_token_f1", "distance_of_guidance"}
    assert "32 of the 70 validation images" in metrics["caption_token_f1"].how
    assert len(read) == 32 and read[0] == 0 and read[-1] == 69, "evenly spread, and no other is read"
    assert max(np.diff(read)) <= 3
    left = tmp_path / "out" / "evaluation"
    drawn = lines_of(left / "generated" / "index.jsonl")
    assert [line["prompt"] for line in drawn] == [
        captions[read[place]] for place in (0, 4, 9, 13, 18, 22, 27, 31)
    ]
    assert len(list((left / "generated").glob("*.png"))) == 8
    said = lines_of(left / "captions.jsonl")
    assert [line["expected"] for line in said] == [captions[number] for number in read]
    assert all((tmp_path / "out" / line["image"]).is_file() for line in said)
    told = capsys.readouterr().err
    assert "suite validation" in told and "suite samples" in told
    assert "drawing 8 images" in told and "captioning 32 images" in told

    before = contents(left)
    run(model, [], tmp_path / "out", *few)
    assert contents(left) == before, "the same images and captions each time"


def test_the_distance_of_guidance_is_0_where_guidance_does_nothing(
    open_model: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model({"validation": [source(write_pairs(tmp_path / "pairs", ["one", "two", "three"]))]})
    found = run(model, ["samples"], tmp_path / "out")["distance_of_guidance"]
    assert found.value > 0 and found.count == 3
    with monkeypatch.context() as patched:
        patched.setattr(image_diffusion, "guide", lambda conditional, unconditional, scale: conditional)
        assert run(model, ["samples"], tmp_path / "out")["distance_of_guidance"].value == 0
    assert "distance_of_guidance" not in run(model, ["samples"], tmp_path / "out", "samples.guidance=1")


def test_of_texts_alone_the_losses_are_measured_and_what_is_left_out_is_told(
    open_model: Open, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"someone wrote {word}"}) + "\n" for word in DIGIT_WORDS))
    model = open_model({"validation": [source(str(texts), "texts")]})
    metrics = run(model, [], tmp_path / "out")
    assert metrics.keys() == {"text_loss_nats_per_token", "text_loss_nats_per_byte"}
    assert (
        "suite samples is left out: data.validation names no images with captions" in capsys.readouterr().err
    )
    assert not (tmp_path / "out" / "evaluation").exists()
    with pytest.raises(UserError, match="no images with captions"):
        run(model, ["samples"], tmp_path / "out")


def test_named_by_hand_all_captions_are_measured(open_model: Open, tmp_path: Path) -> None:
    pattern = write_pairs(tmp_path / "pairs", ["the digit seven"] * 70)
    metrics = run(open_model({"validation": [source(pattern)]}), ["captions"], tmp_path / "out")
    assert "the 70 validation images" in metrics["caption_token_f1"].how
    said = lines_of(tmp_path / "out" / "evaluation" / "captions.jsonl")
    assert len(said) == 70 and sum("image" in line for line in said) == 64


def test_stored_latents_are_looked_at_as_the_codec_shows_them(open_model: Open, tmp_path: Path) -> None:
    latents = np.random.default_rng(0).uniform(-1, 1, (4, 1, 8, 8)).astype(np.float32)
    samples = []
    for latent in latents:
        stream = io.BytesIO()
        np.save(stream, latent)
        samples.append({"latent.npy": stream.getvalue(), "txt": b"the digit seven"})
    write_shards(samples, tmp_path / "latents")
    model = open_model({"validation": [source(f"{tmp_path}/latents/*.tar")]})
    run(model, ["samples"], tmp_path / "out")
    for number, latent in enumerate(latents):
        with Image.open(tmp_path / "out" / "evaluation" / "validation" / f"{number:04d}.png") as image:
            assert np.abs(np.asarray(image) - (latent[0] + 1) * 127.5).max() <= 0.5


def test_nothing_of_a_former_evaluation_is_left_among_the_new_images(
    open_model: Open, tmp_path: Path
) -> None:
    left = tmp_path / "out" / "evaluation"
    for folder in ("generated", "validation"):
        (left / folder).mkdir(parents=True)
        (left / folder / "0500.png").write_bytes(png((8, 8), 0))
    (left / "generated" / "index.jsonl").write_text('{"file": "0500.png", "prompt": "old"}\n')
    (left / "captions.jsonl").write_text('{"caption": "old"}\n' * 99)
    pattern = write_pairs(tmp_path / "pairs", ["the digit seven"] * 3)
    run(open_model({"validation": [source(pattern)]}), ["samples"], tmp_path / "out")
    names = ["0000.png", "0001.png", "0002.png"]
    assert sorted(path.name for path in (left / "validation").iterdir()) == names
    assert sorted(path.name for path in (left / "generated").iterdir()) == [*names, "index.jsonl"]
    assert len(lines_of(left / "captions.jsonl")) == 3


def test_shards_that_are_not_here_are_told_with_the_folder_where_they_were_sought(
    open_model: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pairs(tmp_path / "start" / "pairs", ["the digit seven"])
    (tmp_path / "elsewhere").mkdir()
    model = open_model({"validation": [source("pairs/*.tar")]})
    monkeypatch.chdir(tmp_path / "elsewhere")
    remedy = f"{re.escape(str(tmp_path / 'elsewhere'))}: change to that folder"
    with pytest.raises(UserError, match=rf"no shard pairs/\*\.tar.*training was started.*{remedy}"):
        run(model, [], tmp_path / "out")
    monkeypatch.chdir(tmp_path / "start")
    assert run(model, ["samples"], tmp_path / "out")


TWO_SIZES = {"image_sizes": ["8x16", "8x8"], "position": "2d"}


def test_images_of_two_sizes_are_captioned_and_drawn_at_their_own_sizes(
    open_model: Open, tmp_path: Path
) -> None:
    captions = [f"the digit {DIGIT_WORDS[number]}" for number in range(8)]
    pattern = write_pairs(tmp_path / "pairs", captions, [(8, 8), (8, 16)])
    model = open_model({"validation": [source(pattern)]}, **TWO_SIZES)
    run(model, ["samples", "captions"], tmp_path / "out")
    left = tmp_path / "out" / "evaluation"
    drawn = lines_of(left / "generated" / "index.jsonl")
    assert sorted(line["prompt"] for line in drawn) == sorted(captions)
    assert sorted(line["seed"] for line in drawn) == list(range(8))
    for line in drawn:
        with Image.open(left / "generated" / line["file"]) as image:
            wide = captions.index(line["prompt"]) % 2
            assert image.size == ((16, 8) if wide else (8, 8))
    assert [line["expected"] for line in lines_of(left / "captions.jsonl")] == captions


def test_a_classifier_of_two_sizes_judges_images_of_both(
    open_model: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classifiers, "MIN_IMAGES", 3)
    captions = [f"the digit {DIGIT_WORDS[number % 3]}" for number in range(12)]
    pattern = write_pairs(tmp_path / "pairs", captions, [(8, 8), (8, 16)])
    model = open_model({"sources": [source(pattern)], "validation": [source(pattern)]}, **TWO_SIZES)
    pipeline = Pipeline.from_export(model)
    found = captioned_images.captioned_images(pipeline.config, pipeline.tokenizer, validation=False)
    path = tmp_path / "classifier.safetensors"
    save_classifier(train_classifier(*found, epochs=1, say=lambda line: None), path)
    metrics = run(model, ["images"], tmp_path / "out", "images.count=10", classifier=path)
    assert 0 <= metrics["classifier_word_recall"].value <= 1
    assert metrics["classifier_frechet_of_validation"].value < 1e-6, "the same images as those of training"


def write_edits(folder: Path, count: int) -> str:
    """Shards of an image, a text and an image, and between them a document of two texts and an image."""
    samples = []
    for number in range(count):
        elements = [
            {"type": "image", "image": "img0.png"},
            {"type": "text", "text": f"turn it into number {number}"},
            {"type": "image", "image": "img1.png"},
        ]
        other = [{"type": "text", "text": "the image"}, {"type": "image", "image": "img0.png"}]
        for each in (elements, other):
            members = {"img0.png": png((8, 8), number), "img1.png": png((8, 8), number + 1000)}
            used = {name: data for name, data in members.items() if name in json.dumps(each)}
            samples.append({**used, "json": json.dumps({"elements": each}).encode()})
    write_shards(samples, folder, per_shard=25)
    return f"{folder}/*.tar"


def test_edits_are_scored_behind_their_image_and_without_it_and_drawn(
    open_model: Open, tmp_path: Path
) -> None:
    model = open_model({"validation": [source(write_edits(tmp_path / "edits", 20))]})
    metrics = run(model, ["edit"], tmp_path / "out", "edit.draws=4")
    assert "20 documents" in metrics["edit_distance"].how
    behind, alone = (metrics[f"edit_nats_per_value{which}"].value for which in ("", "_without_the_image"))
    assert np.isfinite([behind, alone]).all() and behind != alone
    # Of two images of independent values.
    assert metrics["edit_distance_of_no_change"].value == pytest.approx(255 / 6**0.5, rel=0.1)
    with Image.open(tmp_path / "out" / "evaluation" / "edits.png") as shown:
        assert shown.size == (16 * 52 + 4, 3 * 52 + 4)
    model = open_model({"validation": [source(write_pairs(tmp_path / "pairs", ["one", "two"]))]})
    with pytest.raises(UserError, match="the suite edit needs documents of an image, a text and an image"):
        run(model, ["edit"], tmp_path / "out")


def test_digits_are_drawn_at_the_size_of_the_digits_where_a_model_has_another_first(
    open_model: Open, tmp_path: Path
) -> None:
    captions = [f"a handwritten {word}" for word in DIGIT_WORDS] * 2
    square = write_pairs(tmp_path / "square", captions)
    model = open_model({"sources": [source(square)], "validation": [source(square)]}, **TWO_SIZES)
    metrics = run(model, ["digits"], tmp_path / "out", "digits.count=2")
    assert metrics["classifier_accuracy_on_real"].value == 1.0
    assert len(lines_of(tmp_path / "out" / "evaluation" / "generated" / "index.jsonl")) == 20
    mixed = write_pairs(tmp_path / "mixed", captions, [(8, 8), (8, 16)])
    model = open_model({"sources": [source(mixed)], "validation": [source(mixed)]}, **TWO_SIZES)
    with pytest.raises(UserError, match="needs images of one size"):
        run(model, ["digits"], tmp_path / "out")


def test_digits_are_judged_by_digits_and_not_by_all_that_names_a_number(
    open_model: Open, tmp_path: Path
) -> None:
    digits = source(write_pairs(tmp_path / "digits", [f"a handwritten {word}" for word in DIGIT_WORDS] * 2))
    clocks = source(write_pairs(tmp_path / "clocks", ["two-thirty", "a clock face"] * 5)) | {"name": "clocks"}
    model = open_model({"sources": [clocks, digits], "validation": [digits]})
    metrics = run(model, ["digits"], tmp_path / "out", "digits.count=2")
    assert "trained on 20 real images" in metrics["generation_accuracy"].how
    other = digits | {"name": "other"}
    model = open_model({"sources": [clocks, digits], "validation": [other]})
    metrics = run(model, ["digits"], tmp_path / "out", "digits.count=2")
    assert "trained on 25 real images" in metrics["generation_accuracy"].how


def test_whoever_waits_is_told_at_the_beginning_and_every_ten_seconds() -> None:
    told: list[str] = []
    now = [0.0]
    tell = ProgressLines("drawing 8 images", say=told.append, now=lambda: now[0])
    for done in range(25):
        now[0] += 1.0
        tell(done, 25)
    for _ in tell.each("abcdef"):
        now[0] += 1.0
    assert told == [
        "drawing 8 images",
        "drawing 8 images: 9 of 25",
        "drawing 8 images: 19 of 25",
        "drawing 8 images: 5",
    ]


def test_steps_tell_how_close_each_sampler_comes(open_model: Open, tmp_path: Path) -> None:
    """Against many steps of the same path: more steps come closer, and `--budget` finds the figures."""
    pairs = source(write_pairs(tmp_path / "pairs", ["one", "two", "three"]))
    model = open_model({"validation": [pairs]})
    metrics = run(model, ["steps"], tmp_path / "out", "steps.steps=64", "steps.tried=[2,16]")
    assert metrics.keys() == {
        f"distance_{name}_{count}_steps" for name in ("ddim", "dpmpp_2m") for count in (2, 16)
    }
    for name in ("ddim", "dpmpp_2m"):
        few, many = (metrics[f"distance_{name}_{count}_steps"].value for count in (2, 16))
        assert 0 < many < few
    table = read_table(tmp_path / "out")
    assert {(choice.sampler, choice.steps): choice.distance for choice in table} == {
        (name.split("_", 1)[1].rsplit("_", 2)[0], int(name.split("_")[-2])): metric.value
        for name, metric in metrics.items()
    }


def test_a_file_of_suites_says_what_runs_and_how(open_model: Open, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs", ["the digit seven"] * 5)
    others = write_pairs(tmp_path / "others", ["the digit eight"] * 6)
    model = open_model({"validation": [source(pairs)]})
    file = tmp_path / "suites.yaml"
    file.write_text(
        f"validation:\nsamples: {{steps: 2}}\n"
        f"captions: {{max_tokens: 2, data: [{{name: others, shards: '{others}'}}]}}\n"
    )
    metrics = run_suites(model, [str(file), "captions"], tmp_path / "out")
    assert metrics.keys() == {"caption_token_f1", "caption_cider", "caption_bleu4"}
    assert "the 6 validation" in metrics["caption_token_f1"].how
    overrides = ["samples.count=2", "samples.max_tokens=1"]
    metrics = run_suites(model, [str(file)], tmp_path / "out", overrides=overrides)
    assert metrics.keys() == {
        "pairs_image_loss",
        "distance_of_guidance",
        "caption_token_f1",
        "caption_cider",
        "caption_bleu4",
    }
    left = tmp_path / "out" / "evaluation"
    drawn = lines_of(left / "generated" / "index.jsonl")
    assert [line["prompt"] for line in drawn] == ["the digit seven"] * 2
    assert {line["expected"] for line in lines_of(left / "captions.jsonl")} == {"the digit eight"}, (
        "it ran last"
    )


@pytest.mark.parametrize(
    ("asked", "overrides", "words"),
    [
        (["picture"], [], "no suite named 'picture'; there are validation, samples, .* or name a .yaml file"),
        (
            ["samples"],
            ["samples.step=2"],
            "the overrides: samples.step is not a known key; did you mean samples.steps",
        ),
        (["samples"], ["samples.steps=0"], "the overrides: samples.steps"),
        (
            ["validation"],
            ["validation.data=[{name: a, shards: one.tar}, {name: a, shards: two.tar}]"],
            "two sources of a suite's data are named a, which their figures would share; rename one",
        ),
        (["samples"], ["nearest.steps=2"], "nearest is set and does not run; add --suite nearest"),
        ([], ["images.count=2"], "images is set and does not run"),
        (["one.yaml", "two.yml"], [], "two.yml is a second file of suites; name one"),
        (["missing.yaml"], [], "missing.yaml"),
        (["images"], [], "needs? --classifier"),
    ],
)
def test_what_is_asked_in_vain_is_told_with_the_remedy(
    open_model: Open, tmp_path: Path, asked: list[str], overrides: list[str], words: str
) -> None:
    model = open_model({"validation": [source(write_pairs(tmp_path / "pairs", ["one", "two"]))]})
    with pytest.raises(UserError, match=words):
        run_suites(model, asked, tmp_path / "out", overrides=overrides)


def test_each_figure_tells_what_it_was_made_of(open_model: Open, tmp_path: Path) -> None:
    folder, file = tmp_path / "pairs", tmp_path / "out" / "metrics.json"
    model = open_model({"validation": [source(write_pairs(folder, ["the digit seven"] * 3))]})

    def details(*overrides: str) -> dict[str, Any]:
        run(model, ["captions"], tmp_path / "out", *overrides)
        return dict(json.loads(file.read_text())["details"]["caption_token_f1"])

    first = details("captions.caption_batch=2")
    assert first["suite"] == "captions" and first["settings"] == {"max_tokens": 3, "caption_batch": 2}
    assert first["codec"] == "pixels"
    assert first["count"] == 3 and first["interval"][0] <= first["value"] <= first["interval"][1]
    assert details()["data"] == first["data"] and list(first["data"]) == ["pairs"]
    write_pairs(folder, ["the digit eight"] * 3)
    assert details()["data"] != first["data"]


def test_figures_stay_where_a_later_suite_fails(open_model: Open, tmp_path: Path) -> None:
    model = open_model({"validation": [source(write_pairs(tmp_path / "pairs", ["one", "two"]))]})
    with pytest.raises(UserError, match="the digits suite needs"):
        run(model, ["captions", "digits"], tmp_path / "out")
    assert "caption_token_f1" in json.loads((tmp_path / "out" / "metrics.json").read_text())


def test_what_ranks_share_is_no_suite_of_a_training(tmp_path: Path) -> None:
    assert list(choose_for_training("")) == list(DEFAULT)
    file = tmp_path / "suites.yaml"
    file.write_text("captions:\ntext_to_image: {count: 5}\n")
    with pytest.raises(UserError, match=r"eval\.suites: text_to_image is not for a training; leave it to"):
        choose_for_training(str(file))
