"""The judge learns to read words off pictures, and the suites around it answer what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from transfusion.errors import UserError
from transfusion.evaluate.classifier import (
    Classifier,
    common_words,
    features_of,
    load_classifier,
    recall,
    save_classifier,
    train_classifier,
)
from transfusion.evaluate.drawing import token_f1

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
def judge() -> Classifier:
    return train_classifier(*coloured(240), epochs=6, say=lambda line: None)


def test_the_classifier_reads_words_off_pictures_it_has_not_seen(judge: Classifier) -> None:
    pixels, captions = coloured(40)
    assert sorted(judge.words) == sorted(COLOURS)
    assert recall(judge, pixels, captions) > 0.95
    assert recall(judge, pixels, captions[1:] + captions[:1]) < 0.2


def test_the_same_seed_gives_the_same_classifier_and_a_file_gives_it_back(
    judge: Classifier, tmp_path: Path
) -> None:
    again = train_classifier(*coloured(240), epochs=6, say=lambda line: None)
    save_classifier(judge, tmp_path / "judge.safetensors")
    loaded = load_classifier(tmp_path / "judge.safetensors")
    pixels, _ = coloured(8)
    for other in (again, loaded):
        assert torch.equal(features_of(judge, pixels), features_of(other, pixels))
    with pytest.raises(UserError, match="train one of their size"):
        features_of(judge, pixels[:, :, :8, :8])
    (tmp_path / "other").write_bytes(b"nothing")
    with pytest.raises(UserError, match="no classifier"):
        load_classifier(tmp_path / "other")


def test_words_are_common_but_not_everywhere() -> None:
    captions = ["a cat"] * 50 + ["a Dog!"] * 30 + ["a rare bird"] * 3
    assert common_words(captions) == ["cat", "dog"]
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
