"""Sounds and arrays through the server: what it tells is what `Pipeline` makes, and what is none is refused."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from numpy.typing import NDArray

from transfusion.generate import Media, MediaDone, Part, Pipeline
from transfusion.generate.media_files import read_media
from transfusion.serve.limits import Limits

from .conftest import SPEECH, Live, events_of, file_url, squares, url_of, wav

SETTINGS: dict[str, Any] = {"steps": 2, "guidance": 1.0}
TALK: dict[str, Any] = {**SETTINGS, "max_tokens": 24, "max_images": 2, "temperature": 1.0}
ARRAY = "application/octet-stream"


def npy(*shape: int, kind: Any = np.float32) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.linspace(-1, 1, int(np.prod(shape))).reshape(shape).astype(kind))
    return stream.getvalue()


def speech(data: bytes, **more: str) -> dict[str, str]:
    return {"media": file_url(data), "modality": "speech", **more}


def trace(data: bytes) -> dict[str, str]:
    return {"media": file_url(data, ARRAY), "modality": "trace"}


def heard(pipeline: Pipeline) -> Media:
    """The sound of `wav()` as the network reads it."""
    read = read_media(wav(), pipeline.config, "x")
    assert isinstance(read, Media)
    return read


def told(answer: httpx.Response) -> str:
    """The message of a refusal, in OpenAI's shape."""
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"]
    return str(error["message"])


def values_of(data: bytes) -> NDArray[Any]:
    """Of a NumPy file or of a WAV as this project writes them, all in one row."""
    if data.startswith(b"RIFF"):
        return np.frombuffer(data[44:], "<i2") / 32767
    return np.asarray(np.load(io.BytesIO(data))).flatten()


def assert_same(encoded: Sequence[str], parts: Sequence[Part]) -> None:
    """These files hold the sounds and arrays among these parts, as near as company allows."""
    media = [part for part in parts if isinstance(part, Media)]
    assert len(encoded) == len(media) > 0
    for each, part in zip(encoded, media, strict=True):
        found, expected = values_of(base64.b64decode(each)), part.values.flatten().numpy()
        expected = expected.clip(-1, 1) if part.modality == "speech" else expected
        np.testing.assert_allclose(found, expected, atol=0.01)


def test_native_events_are_those_of_the_pipeline(sounding: Live) -> None:
    (image,) = squares(1)
    prompt = ["one", speech(wav()), trace(npy(2, 1, 4)), {"image": url_of(image)}, "two"]
    body = {"prompt": prompt, "seed": 3, "modalities": ["image", "speech", "trace"], **TALK}
    with sounding.http.stream("POST", "/v1/generate", json=body) as answer:
        found = list(events_of(answer))
    array = Media("trace", torch.linspace(-1, 1, 8).reshape(2, 1, 4))
    given: list[Any] = ["one", heard(sounding.pipeline), array, image, "two"]
    asked = {**TALK, "modalities": body["modalities"]}
    events = [
        event for event in sounding.pipeline.stream(given, seed=3, **asked) if isinstance(event, MediaDone)
    ]
    media = [data for name, data in found if name == "media"]
    assert [each["modality"] for each in media] == [event.media.modality for event in events] != []
    assert [(each["index"], each["seed"]) for each in media] == [(each.index, each.seed) for each in events]
    assert_same([each["data"] for each in media], [event.media for event in events])
    kinds = {"speech": "audio/wav", "trace": ARRAY}
    assert all(each["media_type"] == kinds[each["modality"]] for each in media)
    assert found[-1][0] == "done" and found[-1][1]["usage"]["images"] == len(media)


@pytest.mark.parametrize(
    ("modality", "asked", "settings"),
    [
        ("speech", {}, {}),
        ("speech", {"size": "2048x1", "sampler": "heun"}, {"size": (1, 2048), "sampler": "heun"}),
        ("trace", {}, {}),
    ],
)
def test_one_is_drawn_at_once(
    sounding: Live, modality: str, asked: dict[str, str], settings: dict[str, Any]
) -> None:
    body = {"prompt": "one", "seed": 7, "draws": True, "modalities": [modality], **SETTINGS, **asked}
    found = list(events_of(sounding.http.post("/v1/generate", json=body)))
    assert [name for name, _ in found] == ["media", "done"] and found[1][1]["reason"] == "image"
    drawn = sounding.pipeline.sample_media(modality, ["one"], seed=7, **SETTINGS, **settings)
    assert_same([found[0][1]["data"]], drawn)
    # And what was told can be sent back as it came.
    again = {"media": f"data:{found[0][1]['media_type']};base64,{found[0][1]['data']}"}
    inspected = sounding.http.post("/v1/inspect", json={"document": ["one", {**again, "modality": modality}]})
    assert inspected.is_success


def test_an_answer_holds_what_it_is_asked_for(sounding: Live) -> None:
    for asked, may in (([], set()), (["speech"], {"speech"}), (["trace"], {"trace"})):
        more = {"modalities": asked} if asked else {}
        answer = sounding.http.post("/v1/generate", json={"prompt": "one", **TALK, **more})
        assert {data["modality"] for name, data in events_of(answer) if name == "media"} == may


def test_a_document_is_inspected(sounding: Live) -> None:
    (image,) = squares(1)
    document = [speech(wav()), "one", {"image": url_of(image)}, trace(npy(2, 1, 4))]
    found = sounding.http.post("/v1/inspect", json={"document": document}).json()
    # 2000 samples take the shape of 2048: two patches of 1024.
    shapes = [(each["patches"], each["columns"]) for each in found["images"]]
    assert shapes == [(2, 2), (16, 4), (2, 2)]
    assert len(found["tokens"]) == len(found["nats"])


def test_the_schema_tells_what_there_is(sounding: Live, live: Live) -> None:
    schema = sounding.http.get("/v1/schema").json()
    assert schema["modalities"] == [
        {"name": "speech", "kind": "mel", "channels": 1, "shapes": ["4096x1", "2048x1"]},
        {"name": "trace", "kind": "latents", "channels": 2, "shapes": ["4x1"]},
    ]
    fields = schema["bodies"]["GenerateBody"]["properties"]
    assert fields["modalities"]["items"]["enum"] == ["image", "speech", "trace"]
    assert fields["modalities"]["default"] == ["image"]
    assert fields["size"]["enum"] == ["auto", "8x8", "4096x1", "2048x1", "4x1"]
    assert {"ddim", "euler"} <= set(fields["sampler"]["enum"])
    assert sounding.http.get("/openapi.json").is_success
    plain = live.http.get("/v1/schema").json()
    assert "modalities" not in plain
    bodies = str(plain["bodies"])
    assert "modalities" not in plain["bodies"]["GenerateBody"]["properties"]
    assert not any(word in bodies for word in ("audio", "media", "PromptMedia", "speech"))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (speech(wav()[:-100]), "speech 1 of the prompt: it is cut short; give the whole file"),
        (speech(wav()[:30]), "speech 1 of the prompt: it is no sound that can be read; give a WAV or FLAC"),
        (speech(wav(0)), "speech 1 of the prompt: it holds no sound"),
        (speech(wav(5000)), "speech 1 of the prompt: it is longer than 0.26 s; cut it"),
        (speech(npy(2, 1, 4)), "it is no sound that can be read"),
        (speech(b""), "it holds no sound"),
        (speech(b"", media="data:audio/wav;base64,UklGR"), "its base64 is broken; encode the file again"),
        (speech(b"", media="data:audio/wav;base64,é"), "its base64 is broken"),
        (speech(b"", media="http://127.0.0.1:1/a.wav"), "this server fetches no URL; send the file itself"),
        (speech(b"", media="file:///etc/hostname"), "this server fetches no URL"),
        (speech(b"", media=file_url(wav(), "text/html")), "this server fetches no URL"),
        (speech(wav(), modality="video"), "prompt.1.modality: Input should be 'speech' or 'trace'"),
        (speech(wav(), modality="trace"), "trace 1 of the prompt: it is no array that can be read"),
        (
            trace(npy(2, 1, 5)),
            r"a trace must be finite floats of shape [2, 1, 4], got torch.float32 of shape",
        ),
        (trace(npy(2, 1, 4, kind=np.int64)), "give a NumPy file of float16 or float32"),
        (trace(npy(2, 1, 4)[:-4]), "it is no array that can be read"),
        ({"media": file_url(wav())}, "prompt.1.modality: Field required"),
        ({"media": 5, "modality": "speech"}, "prompt.1.media: Input should be a valid string"),
        ({"media": file_url(wav()), "image": "x", "modality": "speech"}, "prompt.1.image: this server knows"),
        ({"image": file_url(wav())}, "image 1 of the prompt: this server fetches no URL"),
        ({"sound": file_url(wav())}, "prompt.1"),
        (5, "prompt.1"),
    ],
)
def test_what_is_none_is_refused(sounding: Live, part: Any, message: str) -> None:
    for path, name in (("generate", "prompt"), ("inspect", "document")):
        answer = sounding.http.post(f"/v1/{path}", json={name: ["one", part]})
        assert message.replace("prompt.1", f"{name}.1") in told(answer)
    assert sounding.http.get("/healthz").is_success


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"modalities": ["video"]}, "modalities.0: Input should be 'image', 'speech' or 'trace'"),
        ({"modalities": []}, "modalities: List should have at least 1 item"),
        ({"modalities": "speech"}, "modalities: Input should be a valid array"),
        ({"modalities": ["speech", "image"], "draws": True}, "draws takes one of the modalities"),
        (
            {"modalities": ["speech"], "draws": True, "size": "8x8"},
            "size: 8x8 is of another modality; choose",
        ),
        ({"size": "4096x1"}, "size: 4096x1 is of another modality; choose auto or 8x8"),
        ({"modalities": ["speech"], "draws": True, "sampler": "ddim"}, "choose euler or heun"),
        (
            {"prompt": ["a"] + 17 * [speech(b"")]},
            "a prompt of 17 images or other media; this server takes 16",
        ),
    ],
)
def test_what_cannot_be_asked_is_told(sounding: Live, extra: dict[str, Any], message: str) -> None:
    assert message in told(sounding.http.post("/v1/generate", json={"prompt": "one", **SETTINGS, **extra}))


def test_a_sound_that_is_too_large_is_refused(
    serve: Callable[..., Live], build_pipeline: Callable[..., Pipeline]
) -> None:
    small = serve(build_pipeline(modalities=[SPEECH]), limits=Limits(body_bytes=20_000))
    answer = small.http.post("/v1/generate", json={"prompt": [speech(wav(20_000))]})
    assert answer.status_code == 413 and "over 20,000 bytes" in answer.json()["error"]["message"]


def test_a_model_without_sounds_refuses_them(live: Live) -> None:
    prompt = told(live.http.post("/v1/generate", json={"prompt": ["one", speech(wav())]}))
    assert prompt.startswith("prompt.1")
    asked = live.http.post("/v1/generate", json={"prompt": "one", "modalities": ["image"]})
    assert told(asked) == "modalities: this server knows no such field; GET /v1/schema lists what it knows"
    for extra in ({"modalities": ["text", "audio"]}, {"audio": {"voice": "alloy", "format": "wav"}}):
        body = {"messages": [{"role": "user", "content": "one"}], **extra}
        assert next(iter(extra)) in told(live.http.post("/v1/chat/completions", json=body))
    assert "input_audio" in told(live.http.post("/v1/chat/completions", json=chat_of(wav())))


def chat_of(data: bytes, **extra: Any) -> dict[str, Any]:
    encoded = base64.b64encode(data).decode()
    content = [
        {"type": "text", "text": "one"},
        {"type": "input_audio", "input_audio": {"data": encoded, "format": "wav"}},
    ]
    return {"messages": [{"role": "user", "content": content}], **extra}


CONFIG = {"num_inference_steps": 2, "guidance_scale": 1.0}
CHAT: dict[str, Any] = {
    "model": "small", "seed": 3, "max_tokens": 24, "temperature": 1.0,
    "extra_body": {"max_images": 2, "image_config": CONFIG},
}  # fmt: skip


def test_a_chat_has_sounds_both_ways(sounding: Live) -> None:
    pipeline = sounding.pipeline
    prompt: list[Any] = ["one", heard(pipeline)]
    answers = (
        (seed, pipeline.generate([prompt], seed=seed, modalities=["speech"], **TALK)[0]) for seed in range(50)
    )
    seed, parts = next(each for each in answers if {str, Media} == set(map(type, each[1][2:])))
    asked = {**chat_of(wav()), **CHAT, "seed": seed, "modalities": ["text", "audio"]}
    asked["audio"] = {"voice": "alloy", "format": "wav"}
    message: Any = sounding.client.chat.completions.create(**asked).choices[0].message
    assert message.content == "".join(part for part in parts[2:] if isinstance(part, str))
    sounds = [part["input_audio"]["data"] for part in message.parts if part["type"] == "input_audio"]
    assert_same(sounds, parts[2:])
    assert message.audio.data == sounds[0] and message.audio.id and message.audio.transcript == ""

    streamed = [
        chunk.choices[0].delta for chunk in sounding.client.chat.completions.create(stream=True, **asked)
    ]
    audio: list[Any] = [each.audio for each in streamed if getattr(each, "audio", None)]
    assert_same([each.data for each in audio], parts[2:])

    # As it came, with a question behind it.
    again = {
        **asked,
        "messages": [*asked["messages"], message.model_dump(), {"role": "user", "content": "two"}],
    }
    assert sounding.client.chat.completions.create(**again).usage.prompt_tokens > 0


def test_audio_alone_is_drawn_at_once(sounding: Live) -> None:
    asked = {**CHAT, "messages": [{"role": "user", "content": "one"}], "modalities": ["audio"]}
    choice = sounding.client.chat.completions.create(**asked).choices[0]
    (drawn,) = sounding.pipeline.sample_media("speech", ["one"], seed=3, **SETTINGS)
    assert choice.finish_reason == "stop" and choice.message.content is None
    assert choice.message.audio is not None
    assert_same([choice.message.audio.data], [drawn])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "UklGR"}, "the sound of message 0: its base64 is broken"),
        ({"data": base64.b64encode(wav()[:-100]).decode()}, "the sound of message 0: it is cut short"),
        ({"format": "mp3"}, r"input_audio.format: Input should be 'wav' or 'flac'"),
    ],
)
def test_a_chat_refuses_what_is_no_sound(sounding: Live, changes: dict[str, str], message: str) -> None:
    asked = chat_of(wav())
    asked["messages"][0]["content"][1]["input_audio"] |= changes
    with pytest.raises(openai.BadRequestError, match=message):
        sounding.client.chat.completions.create(model="small", **asked)
