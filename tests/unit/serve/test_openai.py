"""The official client against a live server: what it gets is what `Pipeline` makes."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import openai
import pytest
import torch

from transfusion.generate import Pipeline, TextDelta
from transfusion.generate.recipe import pixel_digest

from .conftest import Live, events_of, file_of, pixels_of, same, squares, url_of

DRAWING = {"seed": 7, "num_inference_steps": 6, "guidance_scale": 2.0}
SETTINGS: dict[str, Any] = {"steps": 6, "guidance": 2.0}


def test_the_model_is_listed_by_its_name(live: Live) -> None:
    assert [model.id for model in live.client.models.list()] == ["small"]
    assert live.client.models.retrieve("small").owned_by == "transfusion"
    with pytest.raises(openai.NotFoundError, match="this is small"):
        live.client.models.retrieve("other")


def test_images_are_those_of_the_pipeline(live: Live) -> None:
    answer = live.client.images.generate(prompt="one two", n=2, size="8x8", model="small", extra_body=DRAWING)
    expected = live.pipeline.sample(["one two"], per_prompt=2, seed=7, **SETTINGS)
    assert answer.data is not None and len(answer.data) == 2
    for image, drawn in zip(answer.data, expected, strict=True):
        pixels = pixels_of(image.b64_json or "")
        assert same(pixels, drawn.pixels)
        assert image.model_extra is not None and image.model_extra["seed"] == drawn.seed
        assert image.model_extra["recipe"]["pixels"] == pixel_digest(pixels)
    assert (answer.size, answer.output_format, answer.background) == ("8x8", "png", "opaque")
    usage = answer.usage
    assert usage is not None and usage.output_tokens == 2 * 16
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens


def test_a_random_seed_is_told_and_gives_the_image_again(live: Live) -> None:
    first = live.client.images.generate(prompt="one", extra_body={"num_inference_steps": 2})
    assert first.data is not None and first.data[0].model_extra is not None
    seed = first.data[0].model_extra["seed"]
    second = live.client.images.generate(prompt="one", extra_body={"num_inference_steps": 2, "seed": seed})
    third = live.client.images.generate(prompt="one", extra_body={"num_inference_steps": 2})
    assert second.data is not None and third.data is not None
    assert second.data[0].b64_json == first.data[0].b64_json != third.data[0].b64_json


@pytest.mark.parametrize("form", ["jpeg", "webp"])
def test_images_come_in_other_formats(live: Live, form: Any) -> None:
    drawn = live.client.images.generate(prompt="one", output_format=form, extra_body=DRAWING)
    (expected,) = live.pipeline.sample(["one"], seed=7, **SETTINGS)
    assert drawn.data is not None and drawn.output_format == form
    data = base64.b64decode(drawn.data[0].b64_json or "")
    assert data[:2] == b"\xff\xd8" if form == "jpeg" else data[8:12] == b"WEBP"
    distance = (pixels_of(drawn.data[0].b64_json or "").int() - expected.pixels.int()).abs().max()
    assert distance <= (40 if form == "jpeg" else 1)


@pytest.mark.parametrize("previews", [0, 1, 2, 3])
def test_partial_images_come_before_the_image(live: Live, previews: int) -> None:
    events = list(
        live.client.images.generate(
            prompt="one two", stream=True, partial_images=previews, extra_body=DRAWING
        )
    )
    kinds = ["image_generation.partial_image"] * previews + ["image_generation.completed"]
    assert [event.type for event in events] == kinds
    assert [event.partial_image_index for event in events[:-1]] == list(range(previews))  # type: ignore[union-attr]
    (expected,) = live.pipeline.sample(["one two"], seed=7, **SETTINGS)
    assert same(pixels_of(events[-1].b64_json), expected.pixels)
    # They sharpen: each is nearer to the image than the one before.
    far = [(pixels_of(event.b64_json).int() - expected.pixels.int()).abs().sum() for event in events]
    assert far == sorted(far, reverse=True)


def test_two_images_stream_side_by_side(live: Live) -> None:
    events = list(
        live.client.images.generate(prompt="one", n=2, stream=True, partial_images=1, extra_body=DRAWING)
    )
    expected = live.pipeline.sample(["one"], per_prompt=2, seed=7, **SETTINGS)
    completed = {event.index: event for event in events if event.type.endswith("completed")}  # type: ignore[union-attr]
    assert len(events) == 4 and sorted(completed) == [0, 1]
    for number, event in completed.items():
        assert same(pixels_of(event.b64_json), expected[number].pixels)


@pytest.mark.parametrize("streams", [False, True])
def test_edits_are_those_of_the_pipeline(live: Live, streams: bool) -> None:
    (image,) = squares(1)
    (expected,) = live.pipeline.edit([image], ["one"], seed=7, **SETTINGS)
    given = ("image.png", file_of(image), "image/png")
    if streams:
        *previews, last = live.client.images.edit(
            image=given, prompt="one", stream=True, partial_images=2, extra_body=DRAWING
        )
        assert [event.type for event in previews] == ["image_edit.partial_image"] * 2
        assert last.type == "image_edit.completed" and same(pixels_of(last.b64_json), expected.pixels)
        return
    answer = live.client.images.edit(image=given, prompt="one", extra_body=DRAWING)
    assert answer.data is not None and same(pixels_of(answer.data[0].b64_json or ""), expected.pixels)
    assert answer.usage is not None and answer.usage.input_tokens_details.image_tokens == 16


def test_several_images_are_edited_together(live: Live) -> None:
    images = squares(2)
    answer = live.client.images.edit(
        image=[("0.png", file_of(images[0])), ("1.png", file_of(images[1]))], prompt="one", extra_body=DRAWING
    )
    (expected,) = live.pipeline.sample([[*images, "one"]], seed=7, **SETTINGS)
    assert answer.data is not None and same(pixels_of(answer.data[0].b64_json or ""), expected.pixels)


@pytest.fixture
def talker(serve: Callable[..., Live], build_pipeline: Callable[..., Pipeline]) -> Live:
    """Begins images by itself, and ends by itself."""
    return serve(build_pipeline(image=2.0, end=-1.0))


CONFIG = {"num_inference_steps": 3, "guidance_scale": 1.0}
TALK: dict[str, Any] = {"max_tokens": 24, "max_images": 2, "temperature": 1.0, "steps": 3, "guidance": 1.0}


def test_a_chat_has_text_and_images_both_ways_in_order(talker: Live) -> None:
    (image,) = squares(1)
    content: Any = [
        {"type": "text", "text": "see"},
        {"type": "image_url", "image_url": {"url": url_of(image)}},
        {"type": "text", "text": "again"},
    ]
    (parts,) = talker.pipeline.generate([["see", image, "again"]], seed=1, **TALK)
    expected = parts[3:]
    assert any(not isinstance(part, str) for part in expected) and any(
        isinstance(part, str) for part in expected
    )
    asked: dict[str, Any] = {
        "model": "small",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 24,
        "temperature": 1.0,
        "seed": 1,
        "extra_body": {"max_images": 2, "image_config": CONFIG, "modalities": ["text", "image"]},
    }
    answer = talker.client.chat.completions.create(**asked)
    message: Any = answer.choices[0].message
    assert message.content == "".join(part for part in expected if isinstance(part, str))
    found = [
        part["text"] if part["type"] == "text" else pixels_of(part["image_url"]["url"])
        for part in message.parts
    ]
    _assert_same_parts(found, expected)
    assert [part["image_url"]["url"] for part in message.images] == [
        part["image_url"]["url"] for part in message.parts if part["type"] == "image_url"
    ]

    streamed: list[Any] = []
    finish = None
    for chunk in talker.client.chat.completions.create(stream=True, **asked):
        delta: Any = chunk.choices[0].delta
        if delta.content:
            if streamed and isinstance(streamed[-1], str):
                streamed[-1] += delta.content
            else:
                streamed.append(delta.content)
        streamed += [pixels_of(each["image_url"]["url"]) for each in getattr(delta, "images", None) or []]
        finish = chunk.choices[0].finish_reason or finish
    _assert_same_parts(streamed, expected)
    assert finish == answer.choices[0].finish_reason


def _assert_same_parts(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        if isinstance(other, str):
            assert one == other
        else:
            assert same(one, other)


def test_an_answer_can_be_sent_back_and_gone_on_with(talker: Live) -> None:
    first: Any = {"role": "user", "content": "one"}
    asked: dict[str, Any] = {
        "model": "small",
        "max_tokens": 12,
        "temperature": 1.0,
        "seed": 5,
        "extra_body": {"max_images": 1, "image_config": CONFIG},
    }
    message = talker.client.chat.completions.create(messages=[first], **asked).choices[0].message
    again = talker.client.chat.completions.create(
        messages=[first, message.model_dump(), {"role": "user", "content": "two"}],  # type: ignore[list-item]
        **{**asked, "extra_body": {"modalities": ["text"]}},
    )
    settings = {**TALK, "max_tokens": 12, "max_images": 1}
    (parts,) = talker.pipeline.generate(["one"], seed=5, **settings)
    joined: list[Any] = ["one" + parts[1], *parts[2:]] if isinstance(parts[1], str) else parts
    joined = [*joined[:-1], joined[-1] + "\ntwo"] if isinstance(joined[-1], str) else [*joined, "two"]
    (expected,) = talker.pipeline.generate([joined], seed=5, **{**settings, "max_images": 0})
    said = "".join(part for part in expected[len(joined) :] if isinstance(part, str))
    assert again.choices[0].message.content == said


def test_image_alone_is_drawn_at_once_with_previews(live: Live) -> None:
    chunks = list(
        live.client.chat.completions.create(
            model="small",
            messages=[{"role": "user", "content": "one two"}],
            stream=True,
            seed=7,
            stream_options={"include_usage": True},
            extra_body={
                "modalities": ["image"],
                "partial_images": 2,
                "image_config": {"num_inference_steps": 6, "guidance_scale": 2.0},
            },
        )
    )
    images: list[Any] = [
        each
        for chunk in chunks
        if chunk.choices
        for each in getattr(chunk.choices[0].delta, "images", None) or []
    ]
    assert [image.get("partial_image_index") for image in images] == [0, 1, None]
    (expected,) = live.pipeline.sample(["one two"], seed=7, **SETTINGS)
    assert same(pixels_of(images[-1]["image_url"]["url"]), expected.pixels)
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None and chunks[-1].usage.model_extra == {"completion_images": 1}


def test_several_answers_have_seeds_of_their_own(live: Live) -> None:
    answer = live.client.chat.completions.create(
        model="small",
        messages=[{"role": "user", "content": "one"}],
        n=3,
        seed=4,
        temperature=1.0,
        max_completion_tokens=6,
    )
    expected = [
        live.pipeline.generate(["one"], seed=4 + number, max_tokens=6, temperature=1.0)[0][1]
        for number in range(3)
    ]
    assert [choice.message.content for choice in answer.choices] == expected
    assert [choice.finish_reason for choice in answer.choices] == ["length"] * 3
    assert answer.usage is not None and answer.usage.completion_tokens == 18


@pytest.mark.parametrize("streams", [False, True])
def test_an_answer_ends_before_a_stop_text(live: Live, streams: bool) -> None:
    whole = live.pipeline.generate(["one"], seed=4, max_tokens=24, temperature=1.0)[0][1]
    assert isinstance(whole, str)
    stop, other = whole[5:8], "never said"
    asked: dict[str, Any] = {
        "model": "small",
        "messages": [{"role": "user", "content": "one"}],
        "seed": 4,
        "temperature": 1.0,
        "max_tokens": 24,
        "stop": [other, stop],
    }
    if streams:
        chunks = list(live.client.chat.completions.create(stream=True, **asked))
        said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        finish = chunks[-1].choices[0].finish_reason
    else:
        choice = live.client.chat.completions.create(**asked).choices[0]
        said, finish = choice.message.content or "", choice.finish_reason
    assert said == whole[: whole.index(stop)] and finish == "stop"


def test_messages_are_one_document(live: Live) -> None:
    answer = live.client.chat.completions.create(
        model="small",
        messages=[
            {"role": "system", "content": "one"},
            {"role": "user", "content": "two"},
            {"role": "assistant", "content": " three"},
            {"role": "user", "content": [{"type": "text", "text": "four"}]},
        ],
        max_tokens=8,
    )
    (expected,) = live.pipeline.generate(["one\ntwo three\nfour"], max_tokens=8, max_images=0)
    assert answer.choices[0].message.content == expected[1]


def test_what_asks_for_nothing_is_taken(live: Live) -> None:
    """As clients of other servers send it."""
    nothing: dict[str, Any] = dict.fromkeys(
        (
            "temperature",
            "top_p",
            "n",
            "max_tokens",
            "stream",
            "seed",
            "stop",
            "tools",
            "modalities",
            "response_format",
        )
    )
    more = {
        "frequency_penalty": 0.0,
        "logprobs": False,
        "logit_bias": {},
        "tool_choice": "none",
        "user": "me",
    }
    hinted = [{"type": "text", "text": "one", "cache_control": {"type": "ephemeral"}}]
    answers = [
        live.http.post(
            "/v1/chat/completions", json={"messages": [{"role": "user", "content": content}], **extra}
        )
        for content, extra in (
            ("one", {}),
            (hinted, nothing | more),
            ("one", {"tools": [], "response_format": {"type": "text"}, "reasoning_effort": "low"}),
        )
    ]
    assert len({answer.json()["choices"][0]["message"]["content"] for answer in answers}) == 1
    drawn = live.http.post(
        "/v1/images/generations", json={"prompt": "one", "n": None, "stream": None, "size": None}
    )
    assert drawn.is_success


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps: .*greater than or equal to 1"),
        ({"num_inference_steps": 10_000}, "num_inference_steps: .*less than or equal to 250"),
        ({"size": "9x9"}, "size: .*8x8"),
        ({"sampler": "euler"}, "sampler: .*ddim"),
        ({"seed": -1}, "seed"),
        ({"frames": 2}, "frames: this server knows no such field"),
        ({"partial_images": 2}, "partial_images needs stream"),
        ({"prompt": ""}, "nothing to guide by; use guidance 1"),
        ({"prompt": "one two three " * 100}, "more than data.sequence_length"),
        ({"response_format": "url"}, "response_format"),
        ({"model": "gpt-image-1"}, "is not served here; this is small"),
    ],
)
def test_what_cannot_be_is_refused_with_its_name(live: Live, extra: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.APIStatusError, match=message) as refused:
        live.client.images.generate(prompt="one", extra_body=extra)
    assert refused.value.status_code == (404 if "model" in extra else 400)
    body: Any = refused.value.body
    assert set(body) == {"message", "type", "param", "code"} and body["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1/a.png", "file:///etc/hostname", "data:image/png;base64,AAA="]
)
def test_no_url_is_fetched(live: Live, url: str) -> None:
    with pytest.raises(openai.BadRequestError, match="the image of message 0"):
        live.client.chat.completions.create(
            model="small",
            messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}],
        )


def test_native_events_are_those_of_the_pipeline(talker: Live) -> None:
    (image,) = squares(1)
    settings = {**TALK, "preview_every": 1}
    body = {"prompt": ["one", {"image": url_of(image)}, "two"], "seed": 3, **settings}
    with talker.http.stream("POST", "/v1/generate", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        found = list(events_of(answer))
    events = list(talker.pipeline.stream(["one", image, "two"], seed=3, **settings))
    assert "".join(data["text"] for name, data in found if name == "text") == "".join(
        event.text for event in events if isinstance(event, TextDelta)
    )
    kinds = {"TextDelta": "text", "ImageStart": "image_start", "ImagePreview": "image_preview"}
    kinds |= {"ImageDone": "image", "Done": "done"}
    # A preview that the next one overtakes is left out.
    told = [name for name, _ in found if name != "image_preview"]
    assert told == [kinds[type(event).__name__] for event in events if kinds[type(event).__name__] in told]
    drawn = [event for event in events if type(event).__name__ == "ImageDone"]
    assert all(
        torch.equal(pixels_of(data["png"]), event.pixels)  # type: ignore[union-attr]
        for (_, data), event in zip([each for each in found if each[0] == "image"], drawn, strict=True)
    )
    assert found[-1][1]["usage"]["images"] == len(drawn) > 0
