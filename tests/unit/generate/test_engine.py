"""The engine: answers do not depend on their company, and nobody waits for long."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from transfusion.errors import UserError
from transfusion.generate import (
    Done,
    Engine,
    Event,
    ImageDone,
    ImagePreview,
    ImageSampling,
    ImageStart,
    Pipeline,
    Request,
    TextDelta,
    TextSampling,
)
from transfusion.inference.cache import PagedCache, pages_for
from transfusion.inference.runner import ModelRunner

Build = Callable[..., Pipeline]


def answer(events: Sequence[Event]) -> tuple[str, list[Tensor]]:
    """All that was said, and the images."""
    text = "".join(event.text for event in events if isinstance(event, TextDelta))
    return text, [event.pixels for event in events if isinstance(event, ImageDone)]


def run(engine: Engine, requests: Sequence[Request]) -> list[list[Event]]:
    numbers = [engine.submit(request) for request in requests]
    found: dict[int, list[Event]] = {number: [] for number in numbers}
    while not engine.is_idle:
        for number, event in engine.tick():
            found[number].append(event)
    return [found[number] for number in numbers]


def assert_same(mine: Sequence[Event], theirs: Sequence[Event]) -> None:
    (text, images), (other_text, other_images) = answer(mine), answer(theirs)
    assert text == other_text and len(images) == len(other_images)
    for image, other in zip(images, other_images, strict=True):
        assert (image.int() - other.int()).abs().max() <= 1
    assert mine[-1] == theirs[-1]


def random_request(draw: random.Random, make_image: Any) -> Request:
    prompt: list[str | Tensor] = []
    for _ in range(draw.randint(1, 3)):
        if draw.random() < 0.3:
            prompt.append(torch.from_numpy(make_image(draw.randint(0, 3))))
        else:
            prompt.append("one two three seven "[: draw.randint(1, 20)])
    image = ImageSampling(
        guidance=draw.choice((1.0, 3.0)),
        steps=draw.randint(1, 5),
        sampler=draw.choice(("ddim", "ddpm")),
        seed=draw.randint(0, 99),
    )
    text = TextSampling(
        temperature=draw.choice((0.0, 1.0)), top_p=draw.choice((1.0, 0.7)), seed=draw.randint(0, 99)
    )
    return Request(
        prompt=prompt,
        text=text,
        image=image,
        max_tokens=draw.randint(1, 12),
        max_images=draw.randint(0, 2),
        draws=image.guidance == 1 and draw.random() < 0.2,
    )


@pytest.mark.parametrize("others", [1, 7])
@pytest.mark.parametrize("seed", range(3))
def test_an_answer_does_not_depend_on_its_company(
    build_pipeline: Build, make_image: Any, others: int, seed: int
) -> None:
    """Requests that enter and leave at random ticks, one of them cancelled, in a cache that is too small for all."""
    draw = random.Random(10 * seed + others)
    pipeline = build_pipeline(image=2.0, end=2.0)
    requests = [random_request(draw, make_image) for _ in range(others + 1)]
    alone = [run(pipeline.engine(), [request])[0] for request in requests]
    engine = pipeline.engine(pages=40, most_requests=5, prompt_positions=draw.choice((8, 30, None)))
    enter = [draw.randint(0, 8) for _ in requests]
    left = draw.randrange(len(requests))
    found: dict[int, list[Event]] = {}
    requested: dict[int, int] = {}
    for tick in range(2000):
        for place, request in enumerate(requests):
            if enter[place] == tick:
                number = engine.submit(request)
                found[number], requested[number] = [], place
        if tick == enter[left] + 3:
            engine.cancel(next(number for number, place in requested.items() if place == left))
        for number, event in engine.tick():
            found[number].append(event)
        if len(found) == len(requests) and engine.is_idle:
            break
    assert engine.is_idle
    for number, events in found.items():
        if events[-1].reason != "cancelled":  # type: ignore[union-attr]
            assert_same(events, alone[requested[number]])


def test_events_tell_the_answer_of_generate(build_pipeline: Build) -> None:
    pipeline = build_pipeline(image=50.0)
    settings = {"max_tokens": 12, "max_images": 2, "steps": 3, "temperature": 1.0, "seed": 4}
    expected = pipeline.generate([["one"]], **settings)[0][1:]
    events = list(pipeline.stream("one", **settings))
    text, images = answer(events)
    assert text == "".join(part for part in expected if isinstance(part, str))
    assert len(images) == 2 and all(
        torch.equal(image, part)
        for image, part in zip(images, (p for p in expected if isinstance(p, Tensor)), strict=True)
    )
    *others, last = events
    assert isinstance(last, Done) and last.images == 2 and not any(isinstance(e, Done) for e in others)
    starts = [place for place, event in enumerate(events) if isinstance(event, ImageStart)]
    ends = [place for place, event in enumerate(events) if isinstance(event, ImageDone)]
    assert len(starts) == 2 and all(start < end for start, end in zip(starts, ends, strict=True))
    assert [events[place] for place in starts] == [
        ImageStart(index, pipeline.runner.sizes.first, 3) for index in range(2)
    ]
    # The first image of an answer is drawn again by its seed.
    assert [events[place].seed & 0xFFFF for place in ends] == [4, 4]  # type: ignore[union-attr]


@pytest.mark.parametrize("diffusion", [{}, {"prediction": "flow"}])
def test_previews_become_the_image(build_pipeline: Build, diffusion: Any) -> None:
    pipeline = build_pipeline(image=50.0, diffusion=diffusion)
    settings = {"max_tokens": 1, "max_images": 1, "steps": 7, "guidance": 3.0, "seed": 4}
    events = list(pipeline.stream("one", preview_every=2, **settings))
    previews = [event for event in events if isinstance(event, ImagePreview)]
    (done,) = (event for event in events if isinstance(event, ImageDone))
    assert [preview.step for preview in previews] == [2, 4, 6] and {p.index for p in previews} == {0}
    assert all(preview.pixels.shape == done.pixels.shape for preview in previews)
    assert_same(
        [e for e in events if not isinstance(e, ImagePreview)], list(pipeline.stream("one", **settings))
    )
    with pytest.raises(UserError, match="preview_every -1"):
        pipeline.stream("one", preview_every=-1)


def test_text_comes_token_by_token_and_letters_whole(build_pipeline: Build) -> None:
    pipeline = build_pipeline()
    tokenizer, said = pipeline.tokenizer, "naïve 🎈 text\ufffd of ▁ marks"
    ids = tokenizer.encode(said)
    head = pipeline.runner.model.lm_head
    place = iter(ids)

    def next_id(hidden_ND: Tensor) -> Tensor:
        logit_NV = torch.zeros(len(hidden_ND), pipeline.config.model.vocabulary)
        logit_NV[:, next(place)] = 1.0
        return logit_NV

    pipeline.runner.model.lm_head.forward = next_id  # type: ignore[method-assign]
    deltas = [
        event.text for event in pipeline.stream("one", max_tokens=len(ids), max_images=0)
        if isinstance(event, TextDelta)
    ]  # fmt: skip
    assert "".join(deltas) == said == tokenizer.decode(ids)
    assert len(deltas) > 10 and "🎈" in "".join(deltas)
    assert head is pipeline.runner.model.lm_head


def test_a_closed_stream_and_a_cancelled_request_give_back_all(build_pipeline: Build) -> None:
    pipeline = build_pipeline(image=5.0)
    engine = pipeline.engine(pages=30)
    request = Request(prompt=["one"], max_tokens=5, max_images=1, image=ImageSampling(steps=4))
    for ticks in range(9):
        number = engine.submit(request)
        for _ in range(ticks):
            engine.tick()
        engine.cancel(number)
        # What is left is to tell of its end, unless it had come before.
        told = [] if engine.is_idle else [event for _, event in engine.tick()]
        assert engine.is_idle and (not told or isinstance(told[-1], Done))
        engine.cancel(number)
    kept = sum(len(prompt.row.pages) for prompt in engine._kept)
    assert engine.cache.free_pages == 30 - kept
    stream = pipeline.stream("one", max_tokens=5)
    next(stream)
    stream.close()  # type: ignore[attr-defined]


def test_what_has_ended_holds_no_memory(build_pipeline: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, and not when Python looks for circles: on a GPU it is gigabytes."""
    pipeline = build_pipeline(image=5.0)
    made: list[weakref.ref[PagedCache]] = []
    cache = ModelRunner.cache

    def noted(runner: ModelRunner, pages: int) -> PagedCache:
        new = cache(runner, pages)
        made.append(weakref.ref(new))
        return new

    monkeypatch.setattr(ModelRunner, "cache", noted)
    gc.disable()
    try:
        pipeline.sample(["one", "two"], steps=2)
        pipeline.generate(["one"], max_tokens=3, max_images=1, steps=2)
        stream = pipeline.stream("one", max_tokens=5, steps=2)
        next(stream)
        del stream
        assert len(made) == 3 and all(one() is None for one in made)
    finally:
        gc.enable()


def test_a_request_that_the_cache_could_never_hold(build_pipeline: Build) -> None:
    """The cache is made for what comes first."""
    engine = build_pipeline().engine()
    engine.tick()
    engine.cancel(engine.submit(Request(prompt=["one"], max_tokens=200, max_images=0)))
    engine.tick()
    assert len(run(engine, [Request(prompt=["one"], max_tokens=20, max_images=0)])[0]) > 1
    with pytest.raises(UserError, match=r"takes \d+ pages of the cache, which has \d+; ask for fewer"):
        engine.submit(Request(prompt=["one"], max_tokens=200, max_images=0))


def test_memory_stays_as_it_is(build_pipeline: Build, make_image: Any) -> None:
    draw = random.Random(3)
    pipeline = build_pipeline(image=2.0, end=2.0)
    engine = pipeline.engine(pages=40, most_requests=4)
    for _ in range(60):
        engine.submit(random_request(draw, make_image))
    while not engine.is_idle:
        engine.tick()
    pages = {page for prompt in engine._kept for page in prompt.row.pages}
    assert engine.cache.free_pages == 40 - len(pages)


def test_equal_beginnings_are_read_once(build_pipeline: Build, make_image: Any) -> None:
    """A second request with the same prompt reads nothing, one with the same beginning only what is its own."""
    pipeline = build_pipeline()
    engine = pipeline.engine(pages=60)
    read: list[int] = []
    prompt_block = pipeline.runner.prompt_block

    def watched(pieces: Any, images: Any = ()) -> Any:
        read.append(sum(end - first for _, first, end in pieces))
        return prompt_block(pieces, images)

    pipeline.runner.prompt_block = watched  # type: ignore[method-assign]
    image = torch.from_numpy(make_image(1))
    long = ["one two three four five six seven", image, "eight"]
    first = Request(prompt=long, max_tokens=3, max_images=0)
    assert_same(*run(engine, [first, first]))
    assert len(read) == 1
    other = Request(prompt=[*long, "nine"], max_tokens=3, max_images=0)
    (events,) = run(engine, [other])
    assert read[1] == len(pipeline.tokenizer.encode("nine"))
    assert_same(events, run(build_pipeline().engine(), [other])[0])
    changed = Request(prompt=[long[0], image ^ 1, "eight"], max_tokens=3, max_images=0)
    (events,) = run(engine, [changed])
    assert_same(events, run(build_pipeline().engine(), [changed])[0])


def test_nobody_waits_for_long(build_pipeline: Build) -> None:
    """Beside a long prompt that is read in pieces, and beside images: a token every tick."""
    pipeline = build_pipeline(sequence_length=400)
    engine = pipeline.engine(pages=200, prompt_positions=32)
    talker = engine.submit(Request(prompt=["one"], max_tokens=40, max_images=0))
    engine.tick()
    engine.submit(Request(prompt=["seven " * 30], max_tokens=2, max_images=0))
    drawer = engine.submit(
        Request(prompt=["two"], image=ImageSampling(steps=6, size=pipeline.runner.sizes.first), draws=True)
    )
    late = engine.submit(Request(prompt=["three"], max_tokens=3, max_images=0))
    said: dict[int, list[int]] = {talker: [], late: []}
    done = {}
    for tick in range(30):
        for number, event in engine.tick():
            if isinstance(event, TextDelta) and number in said:
                said[number].append(tick)
            if isinstance(event, Done):
                done[number] = tick
    assert said[talker] == list(range(30))
    assert done[drawer] - 6 <= len(pipeline.tokenizer.encode("seven " * 30)) // 32 + 3
    assert said[late] == list(range(said[late][0], said[late][0] + 3))


def test_first_words_come_at_once(build_pipeline: Build) -> None:
    engine = build_pipeline().engine(pages=100)
    for turn in range(5):
        number = engine.submit(Request(prompt=[f"{turn} one"], max_tokens=20, max_images=0))
        told = [event for own, event in engine.tick() if own == number]
        assert isinstance(told[0], TextDelta)


def test_requests_wait_for_pages_in_their_order(build_pipeline: Build) -> None:
    pipeline = build_pipeline()
    request = Request(prompt=["one"], max_tokens=20, max_images=0)
    prompts = [Request(prompt=[f"{number} one"], max_tokens=20, max_images=0) for number in range(6)]
    pages = 2 * pages_for(len(pipeline.tokenizer.encode("5 one")) + 21) + 1
    engine = pipeline.engine(pages=pages)
    ended = []
    numbers = [engine.submit(each) for each in prompts]
    while not engine.is_idle:
        ended += [number for number, event in engine.tick() if isinstance(event, Done)]
    assert ended == numbers
    with pytest.raises(UserError, match=r"takes \d+ pages of the cache, which has 2; ask for fewer"):
        pipeline.engine(pages=2).submit(Request(prompt=["one"], max_tokens=99, max_images=0))
    assert run(engine, [request])[0]


def test_what_cannot_be_answered_is_refused_at_once(build_pipeline: Build) -> None:
    pipeline = build_pipeline()
    with pytest.raises(UserError, match="max_tokens"):
        pipeline.stream("one", max_tokens=0)
    with pytest.raises(UserError, match="leaves no room"):
        pipeline.stream("one " * 500)
