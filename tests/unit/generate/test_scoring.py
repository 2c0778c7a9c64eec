"""Scores equal what the plain forward says, and tell their error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from statistics import mean, stdev
from typing import Any

import pytest
import torch

from transfusion.diffusion.bound import DiffusionBound
from transfusion.diffusion.noise import counter_normal
from transfusion.diffusion.objective import ImageObjective
from transfusion.errors import UserError
from transfusion.generate import Pipeline
from transfusion.inference import image_scores
from transfusion.schema import Batch, ImageSegment, Segment, TextSegment

from .conftest import Truth

Build = Callable[..., Pipeline]


def test_texts(build_pipeline: Build, pack: Callable[..., Batch], make_image: Any) -> None:
    """Behind nothing, a text, an image, and both, of any lengths at once."""
    pipeline = build_pipeline()
    truth, tokenizer, codec = Truth(pipeline, pack), pipeline.tokenizer, pipeline.runner.codec
    image = torch.from_numpy(make_image(3))
    contexts: list[Any] = ["", "one two", image, ["a three", image, "seven"], [image, "two", image]]
    texts = ["one", " three", "two seven one", " two", "three"]
    scores = pipeline.score(contexts, texts)
    for context, text, score in zip(contexts, texts, scores, strict=True):
        parts = context if isinstance(context, list) else [context]
        head = parts[-1] if isinstance(parts[-1], str) else ""
        before: list[Segment] = []
        for part in parts if not head else parts[:-1]:
            if not isinstance(part, str):
                before.append(ImageSegment(None, 16))
            elif part:
                before.append(TextSegment(tuple(tokenizer.encode(part))))
        ids, known = tokenizer.encode(head + text), tokenizer.encode(head)
        assert ids[: len(known)] == known, "these texts do not change the tokens before them"
        clean = [codec.encode(part[None])[0] for part in parts if not isinstance(part, str)]
        state_SD = truth.states([*before, TextSegment(tuple(ids))], clean, [0] * len(clean))
        end = 1 + sum(len(s.token_ids) if isinstance(s, TextSegment) else 18 for s in before) + len(ids)
        with torch.no_grad():
            nats_SV = truth.model.lm_head(state_SD[:end]).double().log_softmax(-1)
        expected = sum(
            nats_SV[end - len(ids) + place - 1, token].item()
            for place, token in enumerate(ids)
            if place >= len(known)
        )
        likeliest_N = nats_SV[end - len(ids) + len(known) - 1 : end - 1].argmax(-1)
        assert score.is_greedy == (likeliest_N.tolist() == list(ids[len(known) :]))
        assert score.count == len(ids) - len(known) and score.standard_error == 0
        assert score.log_likelihood == pytest.approx(expected, abs=1e-3, rel=1e-5)
    alone = [pipeline.score([context], [text])[0] for context, text in zip(contexts, texts, strict=True)]
    in_twos = pipeline.score(contexts, texts, batch=2)
    for one, two, all_at_once in zip(alone, in_twos, scores, strict=True):
        assert one.log_likelihood == pytest.approx(all_at_once.log_likelihood, abs=1e-3, rel=1e-5)
        assert two.log_likelihood == pytest.approx(all_at_once.log_likelihood, abs=1e-3, rel=1e-5)


def test_an_empty_text_is_certain(build_pipeline: Build) -> None:
    (score,) = build_pipeline().score(["one"], [""])
    assert score.log_likelihood == 0 and score.count == 0


@pytest.mark.parametrize("prediction", ["epsilon", "v", "flow", "x"])
def test_images(
    build_pipeline: Build,
    pack: Callable[..., Batch],
    make_image: Any,
    prediction: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same draws, each by the plain forward. Six are two forwards of four and two rows."""
    monkeypatch.setattr(image_scores, "ROWS", 4)
    pipeline = build_pipeline(diffusion={"prediction": prediction})
    truth, config = Truth(pipeline, pack), pipeline.config.diffusion
    image, first = torch.from_numpy(make_image(5)), torch.from_numpy(make_image(1))
    (score,) = pipeline.score([[first, "two"]], [image], samples=6, seed=3)
    objective = ImageObjective(config)
    bound, codec = DiffusionBound(objective.schedule), pipeline.runner.codec
    clean, before = codec.encode(image[None]), codec.encode(first[None])[0]
    ids = tuple(pipeline.tokenizer.encode("two"))
    segments = [ImageSegment(None, 16), TextSegment(ids), ImageSegment(None, 16)]
    terms = []
    for draw in range(6):
        key = torch.tensor([(3 << 24) + draw])
        share = torch.special.ndtr(counter_normal(key, (1,), stream=image_scores.TIMESTEP_STREAM).double())
        place = (draw // 2 + share.item()) / 3
        timestep = int((bound.share_T.cumsum(0) < place).sum())
        timestep_I = torch.tensor([timestep])
        noise = counter_normal(key, clean.shape[1:], stream=image_scores.NOISE_STREAM)
        noisy = objective.schedule.add_noise(clean, noise, timestep_I)
        with torch.no_grad():
            output = truth.noise(segments, [before, noisy[0]], [0, timestep], 20 + len(ids))
        predicted = objective.clean(noisy.double(), output.double(), timestep_I).clamp(-1, 1)
        terms.append((bound.terms(clean, predicted, timestep_I) / bound.share_T[timestep]).item())
    assert score.count == 64
    expected = bound.constant(clean).item() + mean(terms)
    assert -score.log_likelihood == pytest.approx(expected, rel=1e-4)
    pairs = [(terms[2 * k] - terms[2 * k + 1]) ** 2 for k in range(3)]
    assert score.standard_error == pytest.approx(sum(pairs) ** 0.5 / 6, rel=1e-3)


def test_the_error_is_told(build_pipeline: Build, make_image: Any) -> None:
    """Scores of many seeds spread as each says of itself."""
    pipeline = build_pipeline(diffusion={"prediction": "v"})
    image = torch.from_numpy(make_image(5))
    scores = [pipeline.score(["two"], [image], samples=32, seed=seed)[0] for seed in range(40)]
    spread = stdev(score.log_likelihood for score in scores)
    told = mean(score.standard_error**2 for score in scores) ** 0.5
    assert 0.7 < spread / told < 1.4
    more = pipeline.score(["two"], [image], samples=512)[0]
    assert more.standard_error < told / 2


def test_scores_of_one_seed_share_their_draws(build_pipeline: Build, make_image: Any) -> None:
    """An image is as likely as the same image, whatever stands beside it in the call."""
    pipeline = build_pipeline()
    image, other = (torch.from_numpy(make_image(number)) for number in (1, 2))
    one, two, three = pipeline.score(["one"] * 3, [image, other, image], samples=8)
    assert one == three != two


def test_best_of_keeps_what_the_model_reads_best(build_pipeline: Build) -> None:
    pipeline = build_pipeline()
    settings: Any = {"steps": 2, "guidance": 1.0, "seed": 5}
    drawn = pipeline.sample(["one", "two"], per_prompt=3, **settings)
    scores = [pipeline.score([image.pixels], [image.prompt])[0].log_likelihood for image in drawn]
    best = pipeline.best_of(["one", "two"], count=3, **settings)
    for place, image in enumerate(best):
        mine = scores[3 * place : 3 * place + 3]
        expected = drawn[3 * place + mine.index(max(mine))]
        assert image.seed == expected.seed and torch.equal(image.pixels, expected.pixels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 5}, "samples 5 must be an even number"),
        ({"samples": 2}, "samples 2 must be an even number"),
        ({"batch": 0}, "batch 0 must be at least 1"),
        ({"seed": -1}, "seed -1 must lie in"),
        ({"targets": ["two"]}, "2 contexts and 1 targets"),
        ({"targets": ["two", "three " * 140]}, "a document takes .* positions"),
        ({"targets": ["two", "\ud800"]}, "is not Unicode text"),
        ({"targets": ["two", ["a", "b"]]}, "a target is one text or one image, got 2 parts"),
        ({"targets": ["two", []]}, "a target is one text or one image, got 0 parts"),
        ({"targets": ["two", torch.zeros(1, 9, 9)]}, "an image must be uint8 of shape"),
    ],
)
def test_what_cannot_be_scored(build_pipeline: Build, arguments: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_pipeline().score(["one", "two"], **{"targets": ["two", "three"], **arguments})


def test_a_family_may_not_tell(build_pipeline: Build, make_image: Any) -> None:
    pipeline = build_pipeline()
    pipeline.family = replace(pipeline.family, score=None)
    with pytest.raises(UserError, match=r"images of model.family transfusion cannot be scored; score texts"):
        pipeline.score(["one"], [torch.from_numpy(make_image(1))])
    assert pipeline.score(["one"], ["two"])[0].count
