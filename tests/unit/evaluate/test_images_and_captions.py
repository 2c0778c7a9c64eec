"""The classifier learns to read words off images, and the suites around it answer what they say."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from transfusion.config import Config
from transfusion.errors import UserError
from transfusion.evaluate import captioned_images
from transfusion.evaluate.metrics.caption_scores import cider_d, corpus_bleu
from transfusion.evaluate.metrics.classifier import (
    Classifier,
    common_words,
    features_of,
    load_classifier,
    recall,
    save_classifier,
    train_classifier,
)
from transfusion.evaluate.metrics.frechet import frechet_distance, gaussian_of
from transfusion.evaluate.metrics.ptb import ptb_words
from transfusion.evaluate.suites import images_and_captions, nearest
from transfusion.evaluate.suites.images_and_captions import token_f1
from transfusion.evaluate.suites.settings import CaptionsSuite, GuidanceSuite, ImagesSuite, NearestSuite
from transfusion.generate import image_files
from transfusion.generate.pipeline import SampledImage

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "grey": (90, 90, 90)}


def coloured(count: int) -> tuple[torch.Tensor, list[str]]:
    """Squares of one of four colours on noise, and captions that name it."""
    generator = torch.Generator().manual_seed(count)
    names = [list(COLOURS)[number % 4] for number in range(count)]
    pixels = torch.randint(0, 256, (count, 3, 16, 16), generator=generator, dtype=torch.uint8)
    for number, name in enumerate(names):
        pixels[number, :, 4:12, 4:12] = torch.tensor(COLOURS[name], dtype=torch.uint8)[:, None, None]
    return pixels, [f"A {name} square." for name in names]


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return train_classifier(*coloured(240), epochs=6, say=lambda line: None)


def test_the_classifier_reads_words_off_images_it_has_not_seen(classifier: Classifier) -> None:
    pixels, captions = coloured(40)
    assert sorted(classifier.words) == sorted(COLOURS)
    assert recall(classifier, pixels, captions) > 0.95
    assert recall(classifier, pixels, captions[1:] + captions[:1]) < 0.2


def test_the_same_seed_gives_the_same_classifier_and_a_file_gives_it_back(
    classifier: Classifier, tmp_path: Path
) -> None:
    again = train_classifier(*coloured(240), epochs=6, say=lambda line: None)
    save_classifier(classifier, tmp_path / "classifier.safetensors")
    loaded = load_classifier(tmp_path / "classifier.safetensors")
    pixels, _ = coloured(8)
    assert loaded.images == 240
    assert (
        frechet_distance(loaded.reference, gaussian_of(features_of(classifier, coloured(240)[0]).numpy()))
        < 1e-6
    )
    for other in (again, loaded):
        assert torch.equal(features_of(classifier, pixels), features_of(other, pixels))
    with pytest.raises(UserError, match="train one for their size"):
        features_of(classifier, pixels[:, :, :8, :8])
    (tmp_path / "other").write_bytes(b"nothing")
    with pytest.raises(UserError, match="is not a classifier"):
        load_classifier(tmp_path / "other")
    save_file(classifier.state_dict(), tmp_path / "other")
    with pytest.raises(UserError, match=r"is not a classifier \(it says so nowhere\)"):
        load_classifier(tmp_path / "other")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"to_words.bias": None}, r"to_words\.bias is missing"),
        ({"more": torch.ones(1)}, r"more is left over"),
        ({"to_words.bias": torch.ones(4, dtype=torch.int8)}, r"to_words\.bias is stored as I8"),
        ({"to_words.bias": torch.ones(5)}, r"to_words\.bias has shape \[5\] instead of \[4\]"),
    ],
)
def test_a_classifier_with_other_tensors_is_refused_by_name(
    classifier: Classifier, tmp_path: Path, changes: dict[str, torch.Tensor | None], told: str
) -> None:
    path = tmp_path / "classifier.safetensors"
    save_classifier(classifier, path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    changed = {**classifier.state_dict(), **changes}
    weights = {name: each for name, each in changed.items() if each is not None}
    save_file(weights, path, metadata=metadata)
    with pytest.raises(UserError, match=rf"is not a classifier \({told}"):
        load_classifier(path)


def test_words_are_common_but_not_everywhere() -> None:
    captions = ["a cat"] * 50 + ["a Dog!"] * 30 + ["a rare bird"] * 3
    assert common_words(captions) == ["cat", "dog"]
    alphabet = "abcdefghijklmnopqrst"
    equals = [" ".join(alphabet)] * 20 + ["z y"] * 21 + ["other"] * 9
    assert common_words(equals) == ["y", "z", *alphabet], "whatever the hash seed, equals follow the alphabet"
    with pytest.raises(UserError, match="nothing to learn"):
        train_classifier(coloured(4)[0], ["the same"] * 4)


@pytest.mark.parametrize(
    ("said", "expected", "score"),
    [
        ("A red cat", "a red cat.", 1.0),
        ("red", "a red cat", 0.5),
        ("red red red", "red cat", 0.4),
        ("dog", "a red cat", 0.0),
        ("", "a red cat", 0.0),
        ("", "", 1.0),
    ],
)
def test_token_f1_by_hand(said: str, expected: str, score: float) -> None:
    assert token_f1(said, expected) == pytest.approx(score)


def drawn_by(
    what: str, classifier: Classifier, folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> tuple[dict[str, float], dict[str, Any]]:
    """What the suite says of a pipeline that draws what is asked for, always red, or noise; and how it was called."""
    validation, training = coloured(40), coloured(240)
    called: dict[str, Any] = {}

    def sample(prompts: list[str], **options: Any) -> list[SampledImage]:
        called.update(options, prompts=prompts)
        by_caption = dict(zip(training[1], training[0], strict=True))
        noise = torch.randint(0, 256, training[0][0].shape, dtype=torch.uint8)
        choose = {
            "asked": lambda prompt: by_caption[prompt],
            "red": lambda prompt: by_caption["A red square."],
            "noise": lambda prompt: noise,
        }[what]
        return [SampledImage(choose(prompt), prompt, number) for number, prompt in enumerate(prompts)]

    def images(config: Any, tokenizer: Any, *, validation: bool) -> Any:
        assert validation
        return coloured(40)

    monkeypatch.setattr(images_and_captions, "captioned_images", images)
    save_path = folder / "classifier.safetensors"
    save_classifier(classifier, save_path)
    config = Config.model_validate(settings)
    pipeline: Any = SimpleNamespace(config=config, tokenizer=None, sample=sample)
    metrics = images_and_captions.images(pipeline, folder, ImagesSuite(classifier=str(save_path)))
    assert called["prompts"][: len(validation[1])] == validation[1]
    return {name: metric.value for name, metric in metrics.items()}, called


def test_images_as_asked_for_are_nearer_than_one_kind_of_them_or_noise(
    classifier: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (asked, called), (red, _), (noise, _) = (
        drawn_by(what, classifier, tmp_path, monkeypatch) for what in ("asked", "red", "noise")
    )
    assert len(called["prompts"]) == 1000 and called["guidance"] == 3.0 and called["sampler"] == "ddim"
    distances = [found["classifier_frechet"] for found in (asked, red, noise)]
    assert distances[0] < 0.1 * min(distances[1:])
    assert asked["classifier_frechet_of_validation"] < 0.1 * min(distances[1:])
    assert asked["classifier_word_recall"] > 0.95 and red["classifier_word_recall"] < 0.3
    assert len(list((tmp_path / "evaluation" / "generated").glob("*.png"))) == 64


def test_the_sampler_and_the_guidance_are_those_that_the_model_can_have(
    classifier: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"diffusion": {"prediction": "flow"}, "data": {"caption_dropout": 0.0}}
    _, called = drawn_by("asked", classifier, tmp_path, monkeypatch, **settings)
    assert (called["sampler"], called["guidance"]) == ("euler", 1.0)


def test_the_scale_of_guidance_is_chosen_by_other_images_than_the_figure(
    classifier: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = dict(zip(*reversed(coloured(240)), strict=True))
    calls: list[tuple[float, int, int]] = []

    def sample(prompts: list[str], *, guidance: float, seed: int, **_: Any) -> list[SampledImage]:
        calls.append((guidance, seed, len(prompts)))
        drawn = [pictures[prompt if guidance == 2 else "A red square."] for prompt in prompts]
        return [SampledImage(image, prompt, 0) for image, prompt in zip(drawn, prompts, strict=True)]

    monkeypatch.setattr(images_and_captions, "captioned_images", lambda *_, **__: coloured(40))
    path = tmp_path / "classifier.safetensors"
    save_classifier(classifier, path)

    def measured(**data: float) -> dict[str, float]:
        calls.clear()
        config = Config.model_validate({"data": data})
        pipeline: Any = SimpleNamespace(config=config, tokenizer=None, sample=sample)
        found = images_and_captions.guidance(pipeline, tmp_path, GuidanceSuite(classifier=str(path)))
        return {name: metric.value for name, metric in found.items()}

    found = measured()
    assert calls == [*((scale, 1000, 250) for scale in (1, 2, 3, 5, 8)), (2, 0, 1000)]
    tried = {name: value for name, value in found.items() if "at_guidance" in name}
    assert min(tried, key=tried.__getitem__) == "classifier_frechet_at_guidance_2" and len(tried) == 5
    assert found["classifier_frechet_at_best_guidance"] < 0.1 * found["classifier_frechet_at_guidance_3"]
    assert found["classifier_word_recall_at_best_guidance"] > 0.95
    measured(caption_dropout=0.0)
    assert calls == [(1, 1000, 250), (1, 0, 1000)]


def test_captions_are_scored_against_their_own_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images_and_captions, "captioned_images", lambda *_, **__: coloured(4))
    said = ["a red square", "square", "", "a grey square"]
    pipeline: Any = SimpleNamespace(config=None, tokenizer=None, caption=lambda pixels, **_: said)
    metrics = images_and_captions.captions(pipeline, tmp_path, CaptionsSuite())
    assert metrics["caption_token_f1"].value == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    # The words of four references, "a" and "square" in all, the colours in one each: idf 0 and log 4.
    words, references = [ptb_words(each) for each in said], [[ptb_words(each)] for each in coloured(4)[1]]
    assert references[0] == [["a", "red", "square"]]
    assert metrics["caption_cider"].value == fmean(cider_d(words, references)) > 3
    assert metrics["caption_bleu4"].value == corpus_bleu(words, references)[3] > 0
    assert "4 validation images" in metrics["caption_cider"].how
    lines = (tmp_path / "evaluation" / "captions.jsonl").read_text().splitlines()
    said = {"caption": "square", "expected": "A green square.", "f1": 0.5}
    assert json.loads(lines[1]) == {"image": "evaluation/validation/0001.png", **said}


def test_of_one_image_there_is_no_cider(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images_and_captions, "captioned_images", lambda *_, **__: coloured(1))
    pipeline: Any = SimpleNamespace(config=None, tokenizer=None, caption=lambda pixels, **_: ["A red square"])
    metrics = images_and_captions.captions(pipeline, tmp_path, CaptionsSuite())
    assert metrics.keys() == {"caption_token_f1", "caption_bleu4"}


def test_copies_are_found_and_shown_under_the_images_that_were_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures, captions = coloured(40)
    monkeypatch.setattr(nearest, "_BLOCK", 7)
    found = nearest.nearest_of(pictures[30:34], pictures)
    assert [place for place, _ in found] == [30, 31, 32, 33] and all(distance == 0 for _, distance in found)
    shifted = pictures[3].clone()
    shifted[:, 0, 0] ^= 64
    [(place, distance)] = nearest.nearest_of([shifted], pictures)
    assert place == 3 and distance == pytest.approx((3 * (64 / 255) ** 2) ** 0.5, rel=1e-5)
    with pytest.raises(UserError, match="no training image is 3 x 5 x 5"):
        nearest.nearest_of([torch.zeros(3, 5, 5, dtype=torch.uint8)], pictures)

    def sample(prompts: list[str], **_: Any) -> list[SampledImage]:
        return [SampledImage(pictures[number], prompt, number) for number, prompt in enumerate(prompts)]

    monkeypatch.setattr(nearest, "captioned_images", lambda *_, **__: (pictures, captions))
    monkeypatch.setattr(nearest, "training_images", lambda _: pictures)
    pipeline: Any = SimpleNamespace(config=Config(), tokenizer=None, sample=sample)
    metrics = nearest.nearest(pipeline, tmp_path, NearestSuite())
    assert [metric.value for metric in metrics.values()] == [0.0, 0.0]
    side = max(pictures[0].shape[1], image_files.GRID_CELL) + image_files.GRID_GAP
    with Image.open(tmp_path / "evaluation" / "nearest.png") as image:
        assert image.size == (16 * side + image_files.GRID_GAP, 6 * side + image_files.GRID_GAP)


def test_stored_latents_come_decoded_in_their_places_and_few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def decode(latents_NCHW: torch.Tensor) -> torch.Tensor:
        calls.append(len(latents_NCHW))
        return latents_NCHW.to(torch.uint8).repeat_interleave(2, -1)

    stored = [torch.full((1, 2, 2 + number % 2), float(number)) for number in range(200)]
    stored[7] = torch.full((1, 4, 4), 7, dtype=torch.uint8)
    found = [("key", values, "a caption") for values in stored]
    monkeypatch.setattr(captioned_images, "single_images", lambda *_: iter(found))
    data = SimpleNamespace(data=SimpleNamespace(sources=[]))
    runner = SimpleNamespace(codec=SimpleNamespace(decode=decode), device="cpu")
    images = captioned_images.training_images(SimpleNamespace(config=data, tokenizer=None, runner=runner))
    assert [int(image.max()) for image in images] == list(range(200))
    assert images[7].shape == (1, 4, 4) and images[8].shape == (1, 2, 4) and images[9].shape == (1, 2, 6)
    assert max(calls) <= 64 and sum(calls) == 199
