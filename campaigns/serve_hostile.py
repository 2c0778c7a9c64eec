"""Sends what no client should send to `transfusion serve`: each is refused in one line, and the server lives on.

    .venv/bin/python campaigns/serve_hostile.py [--requests 1000] [--seed 0] [--case KIND/NUMBER] [--data DIR]

A tiny random model is served by two processes, one of them with a token and few open files. Two of five requests have
one wrong value in one field, and the others take the kinds of `KINDS` in turn: broken JSON and forms, odd framing, odd
paths, images that are none, foreign callers, garbage. Seed, kind and number give the same request each time, and
`--case` sends one alone. Every answer must have a status of its kind's row, OpenAI's shape of an error, and one line
that names the field or the remedy. It holds no trace, nothing of this machine, and none of pydantic's own names. No
answer takes over 10 s. /healthz is asked after each hundred, and the log holds no trace, no prompt and no token.

Then schemathesis makes requests of the server's own description. At last many connections are left open that send half
a request, and a server is told to end while some are open. Exits with 1 when something is wrong, with one line for
each. --requests 2700 sends every wrong value of every field. --data is a folder of hostile shards as
`campaigns/hostile.py` takes, whose images are sent too. `tests/unit/serve/test_serve_hostile.py` holds a sample.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import functools
import gzip
import http.client
import importlib.util
import io
import itertools
import json
import math
import os
import random
import re
import resource
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from limits import record_head, write_json
from transfusion.checkpoint import export
from transfusion.config import load_config
from transfusion.families.build import build_model
from transfusion.files import file_digest
from transfusion.model.initialise import initialise
from transfusion.sequence.tokenizer import train_tokenizer
from transfusion.tokens import MAX_SAMPLING_SEED

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "serve-hostile.json"
WRONG = 1
MODEL = (
    *(
        "model.layers=1",
        "model.hidden_size=16",
        "model.heads=2",
        "model.num_kv_heads=1",
        "model.patch_size=2",
    ),
    *("codec.image_size=8", "codec.image_sizes=[8x8, 8x16]", "data.sequence_length=256"),
)
# The server's limits, small so that what it does answer is cheap.
STEPS, IMAGES, TOKENS = 2, 2, 8
PROMPT_IMAGES, FORM_FIELDS, MESSAGES = 16, 64, 1024
TOKEN = "0123456789abcdef-hostile"
# In every prompt. Nothing of a prompt may stand in the log.
CANARY = "quokka"
HANG_SECONDS = 10.0
START_SECONDS = 120.0
# How long a client that owes the rest of its request may be left waiting before nothing was answered.
SILENCE_SECONDS = 0.2
# Files that the server with a token may hold open, and connections that are made to it at last.
OPEN_FILES, CONNECTIONS = 200, 400
# What a server gives answers under way, and what it may take beyond that to end.
GRACE, END_SECONDS = 1.0, 5.0
TELL_SECONDS = 10.0
SHOWN_BYTES = 300
# Of a server. Bodies are at most 32 MiB by default.
MOST_MIB = 2048

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
CHAT, GENERATE, INSPECT = "/v1/chat/completions", "/v1/generate", "/v1/inspect"
JSON_PATHS = (GENERATIONS, CHAT, GENERATE, INSPECT)
POSTS = (*JSON_PATHS, EDITS)
GETS = ("/v1/models", "/v1/models/small", "/v1/schema", "/healthz", "/readyz", "/metrics")
# What asks for no token.
OPEN = ("/healthz", "/readyz")
JSON_TYPE, BOUNDARY = "application/json", "hostile-boundary"
FORM_TYPE = f"multipart/form-data; boundary={BOUNDARY}"
# What uvicorn answers to bytes that are no HTTP.
NO_HTTP = b"Invalid HTTP request received."
# Names that pydantic has for what it checks.
OF_PYDANTIC = re.compile(
    r"tagged-union|union\[|list\[|function-|nullable|\.str\b|\b[A-Z]\w+(Body|Part|Image)\b"
)
LONGEST_MESSAGE = 1200


class Attack(NamedTuple):
    """One request.

    Attributes:
        what: For eyes.
        pieces: What is sent, with a short pause between pieces.
        says: A pattern that the message must hold. None: that of the kind.
        statuses: That are right. None: those of the kind.
        half_closed: Nothing more can be sent, and the server is told.
        is_owed: Whether an answer must come.
    """

    what: str
    pieces: tuple[bytes, ...]
    says: str | None = None
    statuses: frozenset[int] | None = None
    half_closed: bool = False
    is_owed: bool = True


class Answer(NamedTuple):
    """What came back. problem: why nothing did."""

    status: int = 0
    headers: Mapping[str, str] = MappingProxyType({})
    body: bytes = b""
    seconds: float = 0.0
    problem: str = ""


class Site(NamedTuple):
    """What requests are made for.

    Attributes:
        host: As the Host header has it.
        body_bytes: The limit of bodies.
        trap: A port of this process that nobody should call.
        files: Hostile images, if some are given.
        token: That the server asks for, or none.
    """

    host: str
    body_bytes: int
    trap: int
    files: tuple[tuple[str, bytes], ...] = ()
    token: str | None = None


@dataclass(frozen=True)
class Kind:
    """A row of the table of what each kind of request expects.

    Attributes:
        make: The request of a random state.
        statuses: That are right.
        says: A pattern that the message must hold: the field, or the remedy.
        plain: Whether uvicorn's own 400 is right too.
        needs_token: Whether it is for the server with a token.
    """

    make: Callable[[random.Random, Site], Attack]
    statuses: frozenset[int]
    says: str
    plain: bool = False
    needs_token: bool = False


KINDS: dict[str, Kind] = {}
Maker = Callable[[random.Random, Site], Attack]


def kind(name: str, *statuses: int, says: str, plain: bool = False, needs_token: bool = False) -> Any:
    """Enters the function that makes such requests into the table."""

    def enter(make: Maker) -> Maker:
        KINDS[name] = Kind(make, frozenset(statuses), says, plain, needs_token)
        return make

    return enter


# ---- what requests are made of -----------------------------------------------------------------------------


def http_request(
    site: Site,
    method: str,
    path: str,
    body: bytes = b"",
    content_type: str | None = JSON_TYPE,
    *headers: str,
    host: str | None = None,
    framing: str | None = None,
) -> bytes:
    """A request. framing: the headers that tell the length of the body, None for the right one."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {site.host if host is None else host}", *headers]
    lines += [f"Content-Type: {content_type}"] if content_type is not None else []
    if site.token is not None and not any(line.lower().startswith("authorization") for line in headers):
        lines.append(f"Authorization: Bearer {site.token}")
    lines.append(f"Content-Length: {len(body)}" if framing is None else framing)
    return "\r\n".join(line for line in lines if line).encode("latin-1") + b"\r\n\r\n" + body


def good_body(path: str) -> dict[str, Any]:
    """A small body that the endpoint takes."""
    bodies: dict[str, dict[str, Any]] = {
        GENERATIONS: {"prompt": CANARY, "num_inference_steps": 1},
        EDITS: {"prompt": CANARY, "num_inference_steps": "1"},
        CHAT: {"messages": [{"role": "user", "content": CANARY}], "max_tokens": 1},
        GENERATE: {"prompt": CANARY, "max_tokens": 1, "steps": 1},
        INSPECT: {"document": CANARY},
    }
    return bodies[path]


def post(site: Site, path: str, body: Any, what: str, **expected: Any) -> Attack:
    """An attack of a JSON body, of bytes or of what JSON can hold."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Attack(f"POST {path}: {what}", (http_request(site, "POST", path, data),), **expected)


def part(name: str, data: bytes, file: str | None = None, more: str = "") -> bytes:
    """A part of a form. more: header lines."""
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"'
    head += "" if file is None else f'; filename="{file}"'
    return f"{head}\r\n{more}\r\n".encode("latin-1") + data + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


def good_parts(*, without: str = "") -> list[bytes]:
    """Of a form that the endpoint takes."""
    fields = [part(name, value.encode()) for name, value in good_body(EDITS).items() if name != without]
    return fields if without == "image" else [part("image", png(), "a.png"), *fields]


def edit(
    site: Site, body: bytes | Sequence[bytes], what: str, content_type: str = FORM_TYPE, **expected: Any
) -> Attack:
    data = body if isinstance(body, bytes) else form(*body)
    wire = http_request(site, "POST", EDITS, data, content_type)
    return Attack(f"POST {EDITS}: {what}", (wire,), **expected)


def chunked(*chunks: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + end


@functools.cache
def png(width: int = 16, height: int = 16) -> bytes:
    return stored("PNG", Image.new("RGB", (width, height), (200, 120, 10)))


def stored(form: str, *images: Image.Image, **options: Any) -> bytes:
    stream = io.BytesIO()
    more = {"save_all": True, "append_images": images[1:]} if len(images) > 1 else {}
    images[0].save(stream, form, **more, **options)
    return stream.getvalue()


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


@functools.cache
def png_bomb(width: int, height: int) -> bytes:
    """A PNG of so many pixels by its head, whose data are some MB of zeros."""
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = png_chunk(b"IDAT", zlib.compress(bytes(10 << 20), 9))
    return b"\x89PNG\r\n\x1a\n" + head + data + png_chunk(b"IEND", b"")


@functools.cache
def text_bomb(name: bytes, before: bytes) -> bytes:
    """A small PNG with a compressed text or profile of 64 MB."""
    bomb = png_chunk(name, before + zlib.compress(bytes(64 << 20), 9))
    return png()[:33] + bomb + png()[33:]


def data_url(data: bytes, of: str = "image/png") -> str:
    return f"data:{of};base64,{base64.b64encode(data).decode()}"


def with_image(site: Site, rng: random.Random, url: str, what: str, **expected: Any) -> Attack:
    """A URL as the image of a prompt, at one of the endpoints that take some."""
    path = rng.choice((CHAT, GENERATE, INSPECT))
    return post(site, path, images_body(path, [url]), what, **expected)


def images_body(path: str, urls: Sequence[str], *texts: str) -> dict[str, Any]:
    if path == CHAT:
        images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        content = [*images, *({"type": "text", "text": text} for text in texts)]
        return {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
    name = "document" if path == INSPECT else "prompt"
    return {**good_body(path), name: [*({"image": url} for url in urls), *texts]}


def with_file(site: Site, rng: random.Random, data: bytes, what: str, **expected: Any) -> Attack:
    """The bytes of a file as an image, as a URL or in a form."""
    if rng.random() < 0.5:
        return with_image(
            site, rng, data_url(data, rng.choice(("image/png", "image/jpeg"))), what, **expected
        )
    name = rng.choice(("a.png", "a.jpg", "../../a.png", "a", ""))
    return edit(site, [part("image", data, name), *good_parts(without="image")], what, **expected)


# ---- one wrong value in one field --------------------------------------------------------------------------

FieldKind = Literal["whole", "number", "text", "flag", "choice", "interval", "other"]


class Field(NamedTuple):
    """What a field takes. wrong: of one of kind `other`."""

    kind: FieldKind
    low: float = 0
    high: float = math.inf
    may_be_null: bool = False
    wrong: tuple[Any, ...] = ()


WHOLE, NUMBER, SHARE = Field("whole"), Field("number"), Field("number", 0, 1)
TEXT, TEXT_OR_NULL = Field("text"), Field("text", may_be_null=True)
FLAG, FLAG_OR_NULL = Field("flag"), Field("flag", may_be_null=True)
CHOICE, CHOICE_OR_NULL = Field("choice"), Field("choice", may_be_null=True)
SEED = Field("whole", 0, MAX_SAMPLING_SEED)
SEED_OR_NULL = SEED._replace(may_be_null=True)
NOT_AN_OBJECT: tuple[Any, ...] = ("x", 5, True, [])

DRAWING = {
    "size": CHOICE_OR_NULL,
    "num_inference_steps": Field("whole", 1, STEPS),
    "guidance_scale": Field("number", 0, 100),
    "guidance_interval": Field("interval"),
    "guidance_rescale": SHARE,
    "negative_prompt": TEXT,
    "sampler": CHOICE,
}
IGNORED = {"user": TEXT_OR_NULL, "safety_identifier": TEXT_OR_NULL}
IMAGE_FIELDS = {
    **DRAWING,
    **IGNORED,
    "prompt": TEXT,
    "model": TEXT_OR_NULL,
    "n": Field("whole", 1, IMAGES),
    "seed": SEED_OR_NULL,
    "stream": FLAG,
    "partial_images": Field("whole", 0, 3),
    "output_format": CHOICE,
    "output_compression": Field("whole", 0, 100),
    "response_format": CHOICE_OR_NULL,
    "quality": CHOICE_OR_NULL,
    "background": CHOICE_OR_NULL,
    "moderation": CHOICE_OR_NULL,
}
SPEAKING = {
    "max_tokens": Field("whole", 1, TOKENS),
    "max_images": Field("whole", 0, IMAGES),
    "temperature": Field("number", 0, 100),
    # A border that is out is the first number above it.
    "top_p": Field("number", math.ulp(0.0), 1),
}
_NO_PARTS: tuple[Any, ...] = (5, True, {}, [5], [None], [{}], [["a"]], [{"image": 5}], [{"text": "a"}])
_PART_WITHOUT: tuple[Any, ...] = (
    [{"type": "text"}],
    [{"type": "image_url"}],
    [{"text": "a"}],
    [5],
    [None],
    {},
    5,
)
_NO_CONTENT: tuple[Any, ...] = (
    *_PART_WITHOUT,
    [{"type": "audio", "text": "a"}],
    [{"type": "text", "text": 5}],
    [{"type": "image_url", "image_url": "data:"}],
    [{"type": "image_url", "image_url": {"url": 5}}],
    [{"type": "image_url", "image_url": {}}],
    [{"type": ["text"], "text": "a"}],
)
CHAT_FIELDS = {
    **SPEAKING,
    **IGNORED,
    "max_tokens": SPEAKING["max_tokens"]._replace(may_be_null=True),
    "max_completion_tokens": SPEAKING["max_tokens"]._replace(may_be_null=True),
    "model": TEXT_OR_NULL,
    "messages": Field(
        "other", wrong=("x", 5, {}, [], None, [5], [[]], [{}], [{"role": "user"}] * (MESSAGES + 1))
    ),
    "modalities": Field(
        "other",
        wrong=("text", 5, {}, [], ["audio"], ["Text"], [5], ["text"] * 3, [["text"]]),
    ),
    "image_config": Field("other", wrong=NOT_AN_OBJECT),
    "partial_images": Field("whole", 0, 3),
    "seed": SEED_OR_NULL,
    "n": Field("whole", 1, IMAGES),
    "stop": Field("other", wrong=(5, True, {}, "", [""], [5], [None], ["a"] * 5, [["a"]])),
    "stream": FLAG,
    "stream_options": Field("other", wrong=NOT_AN_OBJECT),
    "tools": Field("other", wrong=("x", 5, {}, [{}], [{"type": "function"}])),
    "tool_choice": CHOICE_OR_NULL,
    "response_format": Field("other", wrong=(*NOT_AN_OBJECT, {}, {"type": "json_object"}, {"type": 5})),
    "logit_bias": Field("other", wrong=("x", 5, [], {"5": 1})),
    "top_logprobs": Field("whole", 0, 0, may_be_null=True),
    "reasoning_effort": TEXT_OR_NULL,
    "verbosity": TEXT_OR_NULL,
    "metadata": Field("other", wrong=NOT_AN_OBJECT),
    "store": FLAG_OR_NULL,
    "service_tier": TEXT_OR_NULL,
    "prompt_cache_key": TEXT_OR_NULL,
    "parallel_tool_calls": FLAG_OR_NULL,
    "frequency_penalty": Field("number", 0, 0, may_be_null=True),
    "presence_penalty": Field("number", 0, 0, may_be_null=True),
    "logprobs": Field("other", wrong=(True, "x", "false", 5, 0, [], {})),
    **{f"image_config.{name}": each for name, each in DRAWING.items()},
    "stream_options.include_usage": FLAG_OR_NULL,
    "stream_options.include_obfuscation": FLAG_OR_NULL,
    "messages.0.role": Field("other", wrong=("tool", "function", "User", "", 5, None, [], {})),
    "messages.0.content": Field("other", wrong=_NO_CONTENT),
    "messages.0.parts": Field("other", wrong=("x", *_NO_CONTENT)),
    "messages.0.images": Field("other", wrong=("x", *_PART_WITHOUT, [{"type": "text", "text": "a"}])),
}
GENERATE_FIELDS = {
    **SPEAKING,
    "prompt": Field("other", wrong=(*_NO_PARTS, None, ["a"] * (MESSAGES + 1))),
    "seed": SEED,
    "preview_every": WHOLE,
    "draws": FLAG,
    "guidance": DRAWING["guidance_scale"],
    "guidance_interval": DRAWING["guidance_interval"],
    "guidance_rescale": SHARE,
    "negative_prompt": TEXT,
    "steps": DRAWING["num_inference_steps"],
    "sampler": CHOICE,
    "size": CHOICE,
}


def _with_nulls(fields: dict[str, Field]) -> dict[str, Field]:
    """OpenAI's clients may send null for every field that may be left out."""
    needed = ("prompt", "messages")
    return {
        name: field
        if field.kind == "other" or "." in name or name in needed
        else field._replace(may_be_null=True)
        for name, field in fields.items()
    }


FIELDS: dict[str, dict[str, Field]] = {
    GENERATIONS: _with_nulls(IMAGE_FIELDS),
    EDITS: IMAGE_FIELDS,
    CHAT: _with_nulls(CHAT_FIELDS),
    GENERATE: GENERATE_FIELDS,
    INSPECT: {"document": GENERATE_FIELDS["prompt"]},
}
# Bodies as /v1/schema names them.
BODIES = {
    "ImagesBody": GENERATIONS,
    "EditsBody": EDITS,
    "ChatBody": CHAT,
    "GenerateBody": GENERATE,
    "InspectBody": INSPECT,
}
# What no field takes but those that take anything of their type.
TYPES: dict[str, Any] = {
    "a text": "x",
    "an empty text": "",
    "a number": 5,
    "a fraction": 0.5,
    "true": True,
    "a list": [],
    "a list of one": [1],
    "an object": {},
    "null": None,
}
_RIGHT_TYPES: dict[FieldKind, tuple[str, ...]] = {
    "whole": ("a number",),
    "number": ("a number", "a fraction"),
    "text": ("a text", "an empty text"),
    "flag": ("true",),
    "choice": (),
    "interval": (),
}
_INTERVALS: tuple[Any, ...] = (
    *([0.5], [0, 0.5, 1], ["a", 1], [None, 1], [-0.1, 1], [0, 1.1], [0.9, 0.1], [[0], [1]]),
    *("0,1", "[0, 1]", [True, 1], [0, math.nan], [-math.inf, 1]),
)


def wrong_values(of: Field) -> Iterator[tuple[str, Any]]:
    """What a field of a JSON body does not take, in words and as it is."""
    if of.kind == "other":
        yield from ((f"{str(value)[:60]}", value) for value in of.wrong)
        return
    for name, value in TYPES.items():
        if name not in _RIGHT_TYPES[of.kind] and not (name == "null" and of.may_be_null):
            yield name, value
    if of.kind == "whole":
        yield from {"a number as text": "1", "a fraction above it": 1.5, "Infinity": math.inf}.items()
        yield from {"hugely negative": -(10**30), "NaN": math.nan, "just below": int(of.low) - 1}.items()
        if of.high != math.inf:
            yield from {"just above": int(of.high) + 1, "huge": 10**30}.items()
    elif of.kind == "number":
        yield from {"a number as text": "1", "NaN": math.nan, "Infinity": math.inf, "huge": 1e300}.items()
        yield from {"hugely negative": -1e300, "-Infinity": -math.inf, "below": of.low - 1}.items()
        yield "just below", math.nextafter(of.low, -math.inf)
        yield "just above", math.nextafter(of.high, math.inf)
    elif of.kind == "flag":
        yield from {"true as text": "true", "yes": "yes", "1": 1, "0": 0}.items()
    elif of.kind == "choice":
        yield from {"another case": "AUTO", "with a space": "auto ", "with a null byte": "auto\0"}.items()
    elif of.kind == "interval":
        yield from ((json.dumps(value), value) for value in _INTERVALS)


def wrong_texts(of: Field) -> Iterator[str]:
    """What a field of a form does not take. Everything is a text there."""
    if of.kind in ("whole", "number"):
        yield from ("x", "", "nan", "inf", "[]", "1;2", "9" * 5000, "1e999", str(int(of.low) - 1))
        if of.high != math.inf:
            yield from (str(int(of.high) + 1), "9" * 30)
        if of.kind == "whole":
            yield from ("1.5", "0x1", "1e0")
    elif of.kind == "flag":
        yield from ("x", "", "2", "[]", "truetrue")
    elif of.kind == "choice":
        yield from ("x", "", "AUTO", "auto\0", "[]")
    elif of.kind == "interval":
        yield from ("x", "", "1", "[0]", "[0, 2]", "[1, 0]", "0,1,1", "{}")


def nested(body: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    """A body with a value at a place such as messages.0.role."""
    made = json.loads(json.dumps(body))
    at = made
    *outer, last = place.split(".")
    for step in outer:
        at = at[int(step)] if isinstance(at, list) else at.setdefault(step, {})
    at[last] = value
    return made


@functools.cache
def field_cases() -> tuple[tuple[str, str, str, Any], ...]:
    """All of them: path, field, what the value is, and the value."""
    found: list[tuple[str, str, str, Any]] = []
    for path, fields in FIELDS.items():
        for name, of in fields.items():
            if path == EDITS:
                found += ((path, name, f"{text[:20]!r} in a form", text) for text in wrong_texts(of))
            else:
                found += ((path, name, what, value) for what, value in wrong_values(of))
    return tuple(found)


def field_attack(site: Site, number: int, seed: int) -> Attack:
    """The case of this number, in an order of this seed."""
    cases = list(field_cases())
    random.Random(seed).shuffle(cases)
    path, name, what, value = cases[number % len(cases)]
    says = re.escape(name.rpartition(".")[2])
    if path == EDITS:
        parts = [*good_parts(without=name), part(name, value.encode())]
        return edit(site, parts, f"{name} is {what}", says=says)
    body = good_body(path)
    if name.startswith("stream_options"):
        body["stream"] = True
    return post(site, path, nested(body, name, value), f"{name} is {what}", says=says)


KINDS["field"] = Kind(lambda rng, site: field_attack(site, rng.randrange(10**6), 0), frozenset({400}), "")


# ---- JSON --------------------------------------------------------------------------------------------------


@kind("broken JSON", 400, says="JSON")
def broken_json(rng: random.Random, site: Site) -> Attack:
    path = rng.choice(JSON_PATHS)
    good = json.dumps(good_body(path))
    bodies = (
        "{", '{"prompt": }', good.replace('"', "'"), good[:-1] + ",}", "/* */" + good, good + good, good + "x",
        "prompt=a", "undefined", "nope", "{'a'}", good.replace(CANARY, CANARY + "\n"), '{"a":1,,}', '{"a" 1}', "]",
        good.replace(CANARY, CANARY + "\0"), '{"\\x":1}', '{"prompt":"\\u12"}', "+1", "01", "\x1f", "{\u200b}",
    )  # fmt: skip
    encodings = {"utf-8": 8, "utf-8-sig": 1, "utf-16": 1, "utf-32": 1}
    encoding = rng.choice([name for name, count in encodings.items() for _ in range(count)])
    text = rng.choice(bodies) if encoding == "utf-8" else good
    return post(site, path, text.encode(encoding), f"{text[:40]!r} in {encoding}")


@kind("cut JSON", 400, says="JSON")
def cut_json(rng: random.Random, site: Site) -> Attack:
    path = rng.choice(JSON_PATHS)
    good = json.dumps(good_body(path)).encode()
    length = rng.randrange(1, len(good))
    return post(site, path, good[:length], f"cut to {length} bytes")


@kind("no object", 400, says="object|dictionary")
def no_object(rng: random.Random, site: Site) -> Attack:
    body = rng.choice(("[]", "1", '"a"', "null", "true", "[{}]", "-0.0", '""'))
    return post(site, rng.choice(JSON_PATHS), body.encode(), body)


@kind("deep nesting", 400, says="JSON|values")
def deep_nesting(rng: random.Random, site: Site) -> Attack:
    path, count = rng.choice(JSON_PATHS), 100_000
    opened, closed = rng.choice(((b"[", b"]"), (b'{"a":', b"1}")))
    deep = opened * count + (closed * count if rng.random() < 0.5 else b"")
    places = {
        "at the top": deep,
        "as a prompt": b'{"prompt":' + deep + b"}",
        "in metadata": b'{"messages":[{"role":"user","content":"a"}],"metadata":{"a":' + deep + b"}}",
        "in what is ignored": b'{"messages":[{"role":"user","content":"a","x":' + deep + b"}]}",
    }
    where = rng.choice(list(places))
    path = CHAT if where in ("in metadata", "in what is ignored") else path
    return post(site, path, places[where], f"{count} brackets {where}")


@kind("many values", 400, 413, says="\\w+")
def many_values(rng: random.Random, site: Site) -> Attack:
    """Millions of small values, which cost far more than their bytes."""
    size = site.body_bytes - 1000
    keys = b",".join(b'"%x":1' % number for number in range(size // 12))
    filled = b'{"messages":[{"role":"user","content":"a"}],"max_tokens":1,"metadata":{"a":[%s]}}'
    bodies = {
        "unknown keys": b'{"prompt":"a",' + keys + b"}",
        "empty lists in metadata": filled % b",".join([b"[]"] * (size // 3)),
        "wrong parts": b'{"prompt":[' + b",".join([b"{}"] * (size // 3)) + b"]}",
        "wrong messages": b'{"messages":[' + b",".join([b"{}"] * (size // 3)) + b"]}",
    }
    what = rng.choice(list(bodies))
    path = CHAT if "messages" in what or "metadata" in what else GENERATE
    # What nobody reads may be passed over, if it costs no time.
    allowed = frozenset({200, 400, 413}) if "metadata" in what else None
    return post(site, path, bodies[what], what, statuses=allowed)


@kind("numbers that are none", 400, says="temperature|guidance|top_p|JSON")
def no_numbers(rng: random.Random, site: Site) -> Attack:
    value = rng.choice(
        ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "nan", "1.", ".5", "0x10", "1_000")
    )
    name = rng.choice(("temperature", "guidance", "top_p"))
    body = f'{{"prompt": "{CANARY}", "max_tokens": 1, "{name}": {value}}}'
    return post(site, GENERATE, body.encode(), f"{name} is {value}")


@kind("huge integers", 400, says="seed|JSON")
def huge_integers(rng: random.Random, site: Site) -> Attack:
    path, digits = (
        rng.choice((GENERATIONS, CHAT, GENERATE)),
        rng.choice((12, 19, 20, 39, 4299, 4301, 100_000)),
    )
    body = json.dumps(good_body(path))[:-1] + f', "seed": {rng.choice(("", "-"))}{"9" * digits}}}'
    return post(site, path, body.encode(), f"a seed of {digits} digits")


@kind("lone surrogates", 400, 404, says="JSON|text|UTF-8|model")
def lone_surrogates(rng: random.Random, site: Site) -> Attack:
    path = rng.choice(JSON_PATHS)
    lone = rng.choice(("\ud800", "\udfff", "a\udc00b", "\udbff\ud800", "\ud83dx"))
    where = rng.choice(("value", "key", "model", "negative_prompt", "nested"))
    body = good_body(path)
    if where == "value":
        body = json.loads(json.dumps(body).replace(CANARY, CANARY + "!"))
        body = json.loads(json.dumps(body).replace("!", ascii(lone)[1:-1]))
    elif where == "key":
        body[lone] = 1
    elif where == "nested":
        body = {**good_body(CHAT), "metadata": {lone: lone}}
        path = CHAT
    else:
        body[where] = lone
    return post(site, path, body, f"{lone!a} as {where}")


@kind("null bytes", 200, 400, 404, says="\\w+")
def null_bytes(rng: random.Random, site: Site) -> Attack:
    path = rng.choice((*JSON_PATHS, EDITS))
    where = rng.choice(("prompt", "key", "model", "size", "user"))
    if path == EDITS:
        name = "a\0b" if where == "key" else where
        return edit(
            site, [*good_parts(without=where), part(name, b"a\0b")], f"a null byte as {where} of a form"
        )
    name = "document" if (path, where) == (INSPECT, "prompt") else where
    body = {**good_body(path), **({"a\0b": 1} if where == "key" else {name: "a\0b"})}
    return post(site, path, body, f"a null byte as {where}")


@kind("invalid UTF-8", 400, says="UTF-8|unicode|JSON")
def invalid_utf8(rng: random.Random, site: Site) -> Attack:
    wrong = rng.choice((b"\xff\xfe", b"\xc3", b"\xc0\x80", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\x80"))
    path = rng.choice(POSTS)
    if path == EDITS:
        name = rng.choice(("prompt", "negative_prompt", "user"))
        return edit(
            site, [*good_parts(without=name), part(name, wrong)], f"{wrong!r} as {name} of a form", says=name
        )
    body = json.dumps(good_body(path)).encode().replace(CANARY.encode(), CANARY.encode() + wrong)
    return post(site, path, body, f"{wrong!r} in a text")


@kind("duplicate keys", 400, says="max_tokens|n\\b|model|seed")
def duplicate_keys(rng: random.Random, site: Site) -> Attack:
    """The last is wrong, so that no rule makes the whole right."""
    path = rng.choice((GENERATIONS, CHAT, GENERATE))
    name = "seed" if path == GENERATE else rng.choice(("n", "seed"))
    body = json.dumps(good_body(path))[:-1] + f', "{name}": 1, "{name}": -1}}'
    return post(site, path, body.encode(), f"{name} twice")


@kind("unknown field", 400, says="")
def unknown_field(rng: random.Random, site: Site) -> Attack:
    path = rng.choice(POSTS)
    names = (
        "promt", "Prompt", "tools", "tool_choice", "audio", "logit_bias", "top_k", "style", "input", "messages[]", "",
        " prompt", "__class__", "model_config", "constructor", "ключ", "k" * 5000, "a.b", "0", "a\nb", "\u202eabc",
    )  # fmt: skip
    name = rng.choice(names)
    shown = "" if len(name) > 100 or not name.isprintable() or not name else re.escape(name)
    if path == EDITS:
        name = rng.choice([each for each in names if each.isascii() and each.isprintable() and each])
        shown = "" if len(name) > 100 else re.escape(name)
        return edit(site, [*good_parts(), part(name, b"1")], f"{name[:30]!r} in a form", says=shown)
    places = ["", *(("image_config.", "stream_options.") if path == CHAT else ())]
    body, place = good_body(path), rng.choice(places)
    if place:
        outer = place[:-1]
        body |= {outer: {name: 1}} | ({"stream": True} if outer == "stream_options" else {})
    else:
        body[name] = rng.choice((1, None, "x", [], {}))
    return post(site, path, body, f"{name[:30]!r} in {place or 'the body'}", says=shown)


@kind("missing field", 400, says="prompt|messages|role|image|document|type")
def missing_field(rng: random.Random, site: Site) -> Attack:
    bodies: dict[str, Any] = {
        GENERATIONS: {"n": 1},
        CHAT: rng.choice(({}, {"max_tokens": 1}, {"messages": [{"content": "a"}]})),
        GENERATE: {"max_tokens": 1},
        INSPECT: {},
    }
    path = rng.choice(POSTS)
    if path == EDITS:
        name = rng.choice(("prompt", "image"))
        return edit(site, good_parts(without=name), f"without {name}", says=name)
    return post(site, path, bodies[path], "without what it needs")


@kind("empty body", 400, says="JSON|form|prompt|image")
def empty_body(rng: random.Random, site: Site) -> Attack:
    path = rng.choice(POSTS)
    kind_of = FORM_TYPE if path == EDITS else JSON_TYPE
    framing = rng.choice((None, "", "Transfer-Encoding: chunked"))
    body = chunked() if framing and "chunked" in framing else b""
    wire = http_request(site, "POST", path, b"", kind_of, framing=framing) + body
    return Attack(f"POST {path}: nothing, {framing or 'no'} framing", (wire,))


@kind("wrong content type", 415, says="application/json|multipart/form-data")
def wrong_content_type(rng: random.Random, site: Site) -> Attack:
    path = rng.choice(POSTS)
    types: list[str | None] = [
        None, "", "text/plain", "text/json", "application/jsonp", "application/xml", "application/octet-stream", "*/*",
        "application/x-www-form-urlencoded", "multipart/mixed; boundary=a", "json", ";", "application/json, text/plain",
        "application/vnd.api+json", "\xff", "a" * 3000, JSON_TYPE if path == EDITS else FORM_TYPE,
    ]  # fmt: skip
    given = rng.choice(types)
    body = form(*good_parts()) if path == EDITS else json.dumps(good_body(path)).encode()
    what = f"POST {path} as {None if given is None else given[:40]!r}"
    return Attack(what, (http_request(site, "POST", path, body, given),))


@kind("compressed body", 400, 415, says="JSON|encod")
def compressed_body(rng: random.Random, site: Site) -> Attack:
    path = rng.choice(JSON_PATHS)
    body = json.dumps(good_body(path)).encode() + b" " * rng.choice((0, 10 << 20))
    body = gzip.compress(body, mtime=0)
    wire = http_request(site, "POST", path, body, JSON_TYPE, "Content-Encoding: gzip")
    return Attack(f"POST {path}: gzip", (wire,))


@kind("what does not fit together", 400, says="partial_images|stream_options|seed|guidance_interval|stop")
def not_together(rng: random.Random, site: Site) -> Attack:
    cases: tuple[tuple[str, dict[str, Any]], ...] = (
        (GENERATIONS, {"partial_images": 1}),
        (CHAT, {"partial_images": 1}),
        (CHAT, {"stream_options": {}}),
        (CHAT, {"seed": MAX_SAMPLING_SEED, "n": 2}),
        (CHAT, {"seed": MAX_SAMPLING_SEED, "n": 2, "modalities": ["image"]}),
        (GENERATIONS, {"seed": MAX_SAMPLING_SEED, "n": 2}),
        (GENERATIONS, {"guidance_interval": [0.9, 0.1]}),
        (GENERATE, {"guidance_interval": [1, 0]}),
        (CHAT, {"image_config": {"guidance_interval": [1, 0]}}),
        (CHAT, {"stop": ["a", ""]}),
    )
    path, more = rng.choice(cases)
    return post(site, path, good_body(path) | more, json.dumps(more))


@kind("unknown model", 404, says="not served here")
def unknown_model(rng: random.Random, site: Site) -> Attack:
    name = rng.choice(
        ("gpt-4o", "", "SMALL", "small ", "../small", "m" * 10_000, "мал", "a\nb", "a\0", "\u202e")
    )
    path = rng.choice((GENERATIONS, CHAT, EDITS))
    if path == EDITS:
        name = rng.choice(("gpt-image-1", "", "../small", "m" * 10_000))
        return edit(site, [*good_parts(), part("model", name.encode())], f"the model {name[:20]!r}")
    return post(site, path, {**good_body(path), "model": name}, f"the model {name[:20]!r}")


@kind("prompt too long", 400, says="shorten|fewer|leave out|send less")
def too_long(rng: random.Random, site: Site) -> Attack:
    words = f"{CANARY} " * rng.choice((60, 300, 1000, 100_000))
    cases: tuple[tuple[str, dict[str, Any]], ...] = (
        (GENERATIONS, {"prompt": words}),
        (GENERATIONS, {"negative_prompt": words}),
        (GENERATE, {"prompt": words}),
        (GENERATE, {"prompt": [words, "a"], "draws": True}),
        (GENERATE, {"prompt": ["a"] * MESSAGES}),
        (INSPECT, {"document": words}),
        (CHAT, {"messages": [{"role": "user", "content": words}]}),
        (CHAT, {"messages": [{"role": "user", "content": "a b"}] * MESSAGES}),
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "image_config": {"negative_prompt": words}}),
        (CHAT, {"messages": [{"role": "user", "content": words}], "modalities": ["image"]}),
        (EDITS, {}),
    )
    path, more = rng.choice(cases)
    if path == EDITS:
        name = rng.choice(("prompt", "negative_prompt"))
        parts = [*good_parts(without=name), part(name, words.encode())]
        return edit(site, parts, f"{name} of {len(words)} letters")
    return post(site, path, good_body(path) | more, f"{str(more)[:40]}... of {len(words)} letters")


@kind("empty prompt under guidance", 400, says="guidance 1")
def empty_prompt(rng: random.Random, site: Site) -> Attack:
    drawn = {"draws": True, "steps": 1}
    cases: tuple[tuple[str, dict[str, Any]], ...] = (
        (GENERATIONS, {"prompt": ""}),
        (GENERATE, {"prompt": "", **drawn}),
        (GENERATE, {"prompt": [], **drawn}),
        (CHAT, {"messages": [{"role": "user", "content": ""}], "modalities": ["image"]}),
        (CHAT, {"messages": [{"role": "user"}], "modalities": ["image"]}),
    )
    path, more = rng.choice(cases)
    return post(site, path, good_body(path) | more, json.dumps(more))


# ---- images ------------------------------------------------------------------------------------------------


@kind("broken data URL", 400, says="data:image|base64|no image")
def broken_data_url(rng: random.Random, site: Site) -> Attack:
    good = data_url(png())
    urls = (
        "data:", "data:,", "data:image/png,", "data:image/png;base64", "data:text/plain;base64,aGk=", good[5:],
        "data:image/svg+xml;base64,PHN2Zy8+", "data:image/gif;base64,R0lGODlh", good.replace("base64", "base46"),
        good[1:], good.replace(";", ""), f" {good}", f"{good}#a", "data:image/png" + ";a=b" * 50_000,
        "data:image/png;base64,",
        good.replace("png", "png\0"), good.replace("base64,", "base64;"),
    )  # fmt: skip
    url = rng.choice(urls)
    return with_image(site, rng, url, f"{url[:40]!r}")


@kind("foreign URL", 400, says="fetches no URL")
def foreign_url(rng: random.Random, site: Site) -> Attack:
    here = f"127.0.0.1:{site.trap}"
    urls = (
        f"http://{here}/a.png", f"https://{here}/a.png", f"HTTP://{here}/a.png", f"ftp://{here}/a.png", f"//{here}/a",
        "file:///etc/passwd", "file:/etc/hostname", "/etc/passwd", "../../etc/passwd", "blob:null/1", "javascript:1",
        "", " ", "about:blank", "a" * 100_000, f"\nhttp://{here}/", f"http://data:image/png;base64,@{here}/", "s3://a/b",
    )  # fmt: skip
    url = rng.choice(urls)
    return with_image(site, rng, url, f"{url[:40]!r}")


@kind("odd base64", 400, says="base64|no image")
def odd_base64(rng: random.Random, site: Site) -> Attack:
    good = base64.b64encode(png()).decode()
    middle = len(good) // 2
    texts = {
        "a line end": good[:middle] + "\n" + good[middle:],
        "spaces": good[:middle] + "  " + good[middle:],
        "no padding": base64.b64encode(png() + b"a" * (1 - len(png()) % 3)).decode().rstrip("=") + "A",
        "too much padding": good.rstrip("=") + "=====",
        "padding inside": good[:middle] + "=" + good[middle:],
        "URL letters": good[:middle] + "-_" + good[middle:],
        "percent": good.replace("=", "%3D") + "%3D",
        "letters beyond ASCII": good + "é",
        "a lone surrogate's name": good + "\\ud800",
        "only padding": "====",
        "one letter": "A",
    }
    what = rng.choice(list(texts))
    return with_image(site, rng, "data:image/png;base64," + texts[what], what)


@kind("image bomb", 400, says="image")
def image_bomb(rng: random.Random, site: Site) -> Attack:
    jpeg = stored("JPEG", Image.new("RGB", (16, 16)))
    at = jpeg.index(b"\xff\xc0") + 5
    webp = b"VP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + b"\xff\x3f\0" * 2
    makers: dict[str, Callable[[], bytes]] = {
        "a PNG of 50000x50000": lambda: png_bomb(50_000, 50_000),
        "a PNG of 2**31-1": lambda: png_bomb(2**31 - 1, 2**31 - 1),
        "a PNG of 2**32-1": lambda: png_bomb(2**32 - 1, 1),
        "a PNG of 49 million pixels, of which few are there": lambda: png_bomb(7000, 7000),
        "a PNG without pixels": lambda: png_bomb(0, 0),
        "a zTXt bomb": lambda: text_bomb(b"zTXt", b"a\0\0"),
        "an iTXt bomb": lambda: text_bomb(b"iTXt", b"a\0\1\0\0\0"),
        "an iCCP bomb": lambda: text_bomb(b"iCCP", b"a\0\0"),
        "a JPEG of 65500x65500": lambda: jpeg[:at] + b"\xff\xdc\xff\xdc" + jpeg[at + 4 :],
        "a WebP of 16384x16384": lambda: b"RIFF" + struct.pack("<I", len(webp) + 4) + b"WEBP" + webp,
        "a GIF of 65535x65535": lambda: b"GIF89a\xff\xff\xff\xff\x80\0\0" + bytes(100),
    }
    what = rng.choice(list(makers))
    return with_file(site, rng, makers[what](), what)


@kind("no image", 400, says="image")
def no_image(rng: random.Random, site: Site) -> Attack:
    good, jpeg = png(), stored("JPEG", Image.new("RGB", (32, 32), (1, 2, 3)))
    damaged = bytearray(good)
    damaged[rng.randrange(8, len(good) - 12)] ^= 0xFF
    files: dict[str, bytes] = {
        "nothing": b"",
        "a cut PNG": good[: rng.randrange(1, len(good) - 12)],
        "a cut JPEG": jpeg[: rng.randrange(1, len(jpeg) // 2)],
        "a damaged PNG": bytes(damaged),
        "an SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "a PDF": b"%PDF-1.4\n1 0 obj<<>>endobj\n%%EOF",
        "a GIF": stored("GIF", Image.new("P", (16, 16))),
        "a BMP": stored("BMP", Image.new("RGB", (16, 16))),
        "a TIFF": stored("TIFF", Image.new("RGB", (16, 16))),
        "a page": b"<html><body>no</body></html>",
        "a text": CANARY.encode(),
        "zeros": bytes(10_000),
        "noise": rng.randbytes(10_000),
        "a head alone": good[:8],
        "one pixel": png(1, 1),
        "a thread": png(2000, 8),
        "two PNGs' halves": good[:40] + good[40:][::-1],
        **dict(site.files),
    }
    what = rng.choice(list(files))
    return with_file(site, rng, files[what], what)


@kind("odd image", 200, 400, says="image")
def odd_image(rng: random.Random, site: Site) -> Attack:
    """What may be read, and must not harm."""
    frames = [Image.new("RGB", (16, 16), (20 * number, 0, 0)) for number in range(3)]
    files = {
        "an animated WebP": stored("WEBP", *frames),
        "an animated PNG": stored("PNG", *frames),
        "a JPEG called PNG": stored("JPEG", frames[1]),
        "a grey PNG": stored("PNG", Image.new("L", (16, 16))),
        "a PNG of 16 bits": stored("PNG", Image.new("I;16", (16, 16))),
        "a CMYK JPEG": stored("JPEG", Image.new("CMYK", (16, 16))),
        "a PNG with more behind it": png() + b"<script>" + bytes(100),
        "a PNG of one bit": stored("PNG", Image.new("1", (16, 16))),
        "a transparent PNG": stored("PNG", Image.new("RGBA", (16, 16))),
    }
    what = rng.choice(list(files))
    return with_file(site, rng, files[what], what)


@kind("too many images", 400, says="16|shorten|fewer")
def too_many_images(rng: random.Random, site: Site) -> Attack:
    count = rng.choice((PROMPT_IMAGES, PROMPT_IMAGES + 1, 60, 1000))
    path = rng.choice((CHAT, GENERATE, INSPECT, EDITS))
    if path == EDITS:
        images = [part(rng.choice(("image", "image[]")), png(), "a.png") for _ in range(count)]
        return edit(site, [*images, *good_parts(without="image")], f"{count} images")
    return post(site, path, images_body(path, [data_url(png())] * count), f"{count} images")


@kind("images alone", 200, 400, says="image|prompt")
def images_alone(rng: random.Random, site: Site) -> Attack:
    path, count = rng.choice((CHAT, GENERATE, INSPECT)), rng.choice((1, 2))
    body = images_body(path, [data_url(png())] * count, *[""] * rng.randrange(2))
    if path != INSPECT and rng.random() < 0.5:
        body |= {"modalities": ["image"]} if path == CHAT else {"draws": True}
        body |= {"image_config": {"num_inference_steps": 1}} if path == CHAT else {}
    return post(site, path, body, f"{count} images and no text")


# ---- forms -------------------------------------------------------------------------------------------------


@kind("broken boundary", 400, 415, says="form|boundary|prompt|multipart", plain=True)
def broken_boundary(rng: random.Random, site: Site) -> Attack:
    types = (
        "multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=another",
        f"multipart/form-data; boundary={'x' * 1000}", 'multipart/form-data; boundary="', "multipart/form-data;;;",
        f"multipart/form-data; boundary={BOUNDARY}x", "multipart/form-data; boundary=\xe9", f"{FORM_TYPE}, {FORM_TYPE}",
        f'multipart/form-data; boundary="{BOUNDARY}', "multipart/form-data; boundary=a b",
        "multipart/form-data boundary",
        f"multipart/form-data; charset=punycode; boundary={BOUNDARY[1:]}", "multipart/form-data; Boundary*=utf-8''%ff",
    )  # fmt: skip
    given = rng.choice(types)
    return edit(site, good_parts(), given[:60], given)


@kind("cut form", 400, says="form|boundary|prompt|image")
def cut_form(rng: random.Random, site: Site) -> Attack:
    """Cut before the boundary that ends it. What is lost may be an image, so nothing may be answered."""
    parts = good_parts()
    whole = form(*parts, part("image", png(), "b.png")) if rng.random() < 0.5 else form(*parts)
    length = rng.randrange(1, len(whole) - 4)
    return edit(site, whole[:length], f"{length} of {len(whole)} bytes")


@kind("garbage as a form", 400, says="form|boundary|prompt|image")
def garbage_form(rng: random.Random, site: Site) -> Attack:
    start = f"--{BOUNDARY}".encode()
    bodies = {
        "noise": rng.randbytes(500),
        "line ends": b"\r\n" * 5000,
        "boundaries": (start + b"\r\n") * 5000,
        "a part without a head": start + b"\r\n\r\na\r\n" + start + b"--\r\n",
        "a head without an end": start + b'\r\nContent-Disposition: form-data; name="prompt"',
        "a head of 200 kB": form(*good_parts(), part("user", b"a", more=f"X: {'a' * 200_000}\r\n")),
        "5000 heads": form(
            *good_parts(), part("user", b"a", more="".join(f"X{n}: a\r\n" for n in range(5000)))
        ),
        "a head that is none": start + b"\r\n\xff\xfe: \0\r\n\r\na\r\n" + start + b"--\r\n",
        "no name": form(*good_parts(), start + b"\r\nContent-Disposition: form-data\r\n\r\na\r\n"),
        "no disposition": form(*good_parts(), start + b"\r\nX: y\r\n\r\na\r\n"),
        "a part in base64": form(
            *good_parts(without="prompt"),
            part("prompt", b"YQ==", more="Content-Transfer-Encoding: base65\r\n"),
        ),
        "URL encoding": b"prompt=a&image=b",
        "JSON": json.dumps(good_body(GENERATIONS)).encode(),
    }
    what = rng.choice(list(bodies))
    allowed = frozenset({200, 400}) if what in ("a part in base64", "a head that is none") else None
    return edit(site, bodies[what], what, statuses=allowed)


@kind("many form fields", 400, says="field|part|n0")
def many_form_fields(rng: random.Random, site: Site) -> Attack:
    count = rng.choice((FORM_FIELDS + 1, 1000, 10_000))
    same = rng.random() < 0.3
    parts = [part("user" if same else f"n{number}", b"a") for number in range(count)]
    return edit(site, [*good_parts(), *parts], f"{count} fields")


@kind("file as a text", 400, says="file")
def file_as_text(rng: random.Random, site: Site) -> Attack:
    name = rng.choice([name for name in IMAGE_FIELDS if name != "image"])
    return edit(
        site,
        [*good_parts(without=name), part(name, b"a", "a.txt")],
        f"a file as {name}",
        says=re.escape(name),
    )


@kind("mask", 400, says="mask")
def mask(rng: random.Random, site: Site) -> Attack:
    name = rng.choice(("m.png", "", None))
    return edit(site, [*good_parts(), part("mask", png(), name)], f"a mask named {name!r}")


@kind("text as an image", 400, says="image")
def text_as_image(rng: random.Random, site: Site) -> Attack:
    value = rng.choice((b"hello", b"", png(), data_url(png()).encode(), b"http://localhost/a.png"))
    name = rng.choice(("image", "image[]"))
    return edit(
        site, [part(name, value), *good_parts(without="image")], f"a text of {len(value)} bytes as {name}"
    )


@kind("two images, one broken", 400, says="image [01]")
def one_broken(rng: random.Random, site: Site) -> Attack:
    images = [part("image", png(), "a.png"), part("image[]", rng.choice((b"", b"no", png()[:-20])), "b.png")]
    rng.shuffle(images)
    return edit(site, [*images, *good_parts(without="image")], "two images, one broken")


@kind("odd charset", 200, 400, 415, says="\\w+", plain=True)
def odd_charset(rng: random.Random, site: Site) -> Attack:
    """A form in an encoding of the client's choice, which Python may know as something else."""
    names = (
        "bogus",
        "idna",
        "punycode",
        "undefined",
        "hex",
        "zlib",
        "utf-16",
        "utf-7",
        "rot13",
        "unicode_escape",
    )
    name = rng.choice((*names, "raw_unicode_escape", "base64", "utf-8-sig", "\xff", "a" * 3000))
    which = rng.choice(("prompt", "negative_prompt", "model", "user", "x\\ud800"))
    value = rng.choice((b"\\ud800", b"+2AA-", b"\xff", b"xn--a", b"a" * 2000))
    parts = [*good_parts(without=which), part(which, value)]
    wanted = frozenset({200, 400, 404, 415})
    return edit(
        site,
        parts,
        f"charset {name[:20]!r}, {which}={value[:10]!r}",
        f"{FORM_TYPE}; charset={name}",
        statuses=wanted,
    )


# ---- paths and callers -------------------------------------------------------------------------------------


@kind("wrong method", 405, says="Method Not Allowed")
def wrong_method(rng: random.Random, site: Site) -> Attack:
    is_post = rng.random() < 0.5
    path = rng.choice(POSTS if is_post else GETS)
    methods = ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "FOO", "get", "post", "PROPFIND")
    method = rng.choice((*methods, *(("GET", "HEAD") if is_post else ("POST",))))
    body = json.dumps(good_body(path)).encode() if is_post and rng.random() < 0.5 else b""
    return Attack(f"{method} {path}", (http_request(site, method, path, body),))


@kind("unknown path", 404, says="Not Found|not served")
def unknown_path(rng: random.Random, site: Site) -> Attack:
    path = rng.choice((
        "/v1", "/v1/", "/v2/models", "/v1/completions", "/v1/embeddings", "/v1/images", "/v1/files", "/admin", "/docs",
        "/redoc", "/.env", "/.git/config", "/favicon.ico", "/v1/models/other", "/HEALTHZ", "/v1/Generate", "/metrics2",
        "/server-status", "/v1/images/variations", "/page2", "/v1/responses", "/index.php",
    ))  # fmt: skip
    method = "GET" if "models" in path else rng.choice(("GET", "POST", "DELETE"))
    return Attack(f"{method} {path}", (http_request(site, method, path),))


@kind("path trick", 404, says="Not Found|not served|no path")
def path_trick(rng: random.Random, site: Site) -> Attack:
    path = rng.choice((
        "/%2e%2e/%2e%2e/etc/passwd", "/..%2f..%2fetc%2fpasswd", "/../../etc/passwd", "//v1/models", "/v1//models",
        "/v1/models/%2e%2e%2fschema", "/v1/models/..;/schema", "/v1/%00", "/%00", "/v1/models/%00", "/v1/models/%ff%fe",
        "/v1/models/%ed%a0%80", "/v1/./schema", "/v1/%2e/schema", "/v1\\schema", "/v1/schema%00", "/v1/schema%2f",
        "/v1/schema%20", "/v1/schema%0a", "/v1/schema%0d%0aX:%20y", "/healthz%0a", "/healthz%0d", "/readyz%3f", "/%",
        "/%zz", "/v1/models/%", "/healthz/", "/v1/schema/", "/v1/generate/", "/v1/models/small/", "/v1/models/small%0a",
        "http://localhost/v1/schema", "http://[", "//[", "//localhost/healthz", "/page/../v1/schema", "/page/%00",
        "/page/..%2f..%2fapp.py", "/page/%2e%2e/%2e%2e/app.py", "/page//etc/passwd", "/page/%2fetc%2fpasswd",
        f"/page/{'a' * 3000}", "/page/..%5capp.py", "/page/index.html/x", "/page/.", "/page/..",
        "/page/%ff", "/page/%0a",
    ))  # fmt: skip
    return Attack(f"GET {path[:60]}", (http_request(site, "GET", path),))


@kind("long head", 400, 404, 414, 431, says="Not Found", plain=True)
def long_head(rng: random.Random, site: Site) -> Attack:
    size = rng.choice((2000, 10_000, 60_000, 500_000))
    wires = {
        "path": http_request(site, "GET", "/" + "a" * size),
        "query": http_request(site, "GET", "/nope?" + "a=b&" * (size // 4)),
        "header": http_request(site, "GET", "/nope", b"", None, "X-A: " + "a" * size),
        "name of a header": http_request(site, "GET", "/nope", b"", None, "a" * size + ": b"),
        "method": http_request(site, "A" * size, "/nope"),
        "list of headers": http_request(
            site, "GET", "/nope", b"", None, *(f"X-{n}: a" for n in range(size // 10))
        ),
        "cookie": http_request(site, "GET", "/nope", b"", None, "Cookie: " + "a=b; " * (size // 5)),
    }
    what = rng.choice(list(wires))
    wire = wires[what]
    # In one piece, or as a slow client's.
    cut = rng.choice((len(wire), len(wire) // 2))
    return Attack(f"a {what} of {size}", tuple(each for each in (wire[:cut], wire[cut:]) if each))


@kind("foreign host", 403, says="token", plain=True)
def foreign_host(rng: random.Random, site: Site) -> Attack:
    port = site.host.rpartition(":")[2]
    hosts = (
        "evil.example", f"evil.example:{port}", f"localhost.evil.example:{port}", f"127.0.0.1.nip.io:{port}", "0.0.0.0",
        "", "[", "[::1", "127.0.0.1@evil.example", f"evil.example#localhost:{port}", "LOCALHOST.", "localhost,evil",
        f"127.0.0.2:{port}", "2130706433", "localhost evil", "a" * 5000, "\xe9vil", "localhost:80:80x",
    )  # fmt: skip
    host, path = rng.choice(hosts), rng.choice(("/healthz", "/v1/models", "/", "/nope"))
    return Attack(
        f"GET {path} at {host[:40]!r}",
        (http_request(site, "GET", path, host=host),),
        statuses=frozenset({400, 403}),
    )


@kind("foreign origin", 403, says="may not|token")
def foreign_origin(rng: random.Random, site: Site) -> Attack:
    origins = (
        "http://evil.example", "null", "", "http://localhost", f"http://localhost.evil:{site.host[-5:]}", "evil",
        f"http://evil@{site.host}", f"http://{site.host}.evil", f"http://{site.host}/", f"http://{site.host}, http://evil",
        "http://", "://", "\xe9", "a" * 5000, f"http://evil?://{site.host}", "file://", "chrome-extension://abc",
    )  # fmt: skip
    origin, path = rng.choice(origins), rng.choice(POSTS)
    body = json.dumps(good_body(path)).encode()
    return Attack(
        f"POST {path} from {origin[:40]!r}",
        (http_request(site, "POST", path, body, JSON_TYPE, f"Origin: {origin}"),),
    )


@kind("wrong token", 401, says="Bearer", needs_token=True)
def wrong_token(rng: random.Random, site: Site) -> Attack:
    right = site.token or ""
    values = (
        None, "", "Bearer", "Bearer ", f"Bearer {right}x", f"Bearer {right[:-1]}", f"Basic {right}", right,
        "Bearer null",
        f"Bearer {right.upper()}", "Bearer \xff\xfe", "Bearer \xe9" + right, f"Bearer\t{right}", f"Bearer {right} x",
        "Bearer " + "a" * 10_000, f"Bearer {right[::-1]}", f"Bearer={right}", f"Token {right}", f"Bearer, {right}",
        'Digest username="a"', f"Bearer {base64.b64encode(right.encode()).decode()}", f'Bearer "{right}"',
    )  # fmt: skip
    value = rng.choice(values)
    path = rng.choice(
        (*POSTS, *(each for each in GETS if each not in OPEN), "/nope", f"/v1/models?token={right}")
    )
    path = rng.choice(
        (path, path, "/healthz%2f..%2fv1/models", "/page", "/healthz/../v1/models", "/v1/schema%0a")
    )
    method = "POST" if path in POSTS else "GET"
    body = json.dumps(good_body(path)).encode() if path in POSTS else b""
    bare = site._replace(token=None)
    lines = () if value is None else (f"Authorization: {value}",)
    wire = http_request(bare, method, path, body, JSON_TYPE, *lines)
    return Attack(
        f"{method} {path.replace(right, 'TOKEN')} with {str(value)[:30].replace(right, 'TOKEN')!r}", (wire,)
    )


# ---- framing -----------------------------------------------------------------------------------------------


@kind("body over the limit", 413, says="send less")
def over_the_limit(rng: random.Random, site: Site) -> Attack:
    path, over = rng.choice(POSTS), site.body_bytes + rng.choice((1, 2, 100_000))
    kind_of = FORM_TYPE if path == EDITS else JSON_TYPE
    how = rng.choice(("whole", "told", "chunks", "small chunks", "huge chunk"))
    if how == "whole":
        pieces = (http_request(site, "POST", path, b" " * over, kind_of),)
    elif how == "told":
        length = rng.choice((over, 10**12, 10**19))
        pieces = (http_request(site, "POST", path, b"{", kind_of, framing=f"Content-Length: {length}"),)
    else:
        size = {"chunks": 1 << 16, "small chunks": 1 << 12, "huge chunk": over}[how]
        body = chunked(*[b" " * size] * (over // size + 1))
        pieces = (
            http_request(site, "POST", path, b"", kind_of, framing="Transfer-Encoding: chunked") + body,
        )
    return Attack(f"POST {path}: {over} bytes, {how}", pieces)


@kind("lying length", 400, 413, says="JSON|send less", plain=True)
def lying_length(rng: random.Random, site: Site) -> Attack:
    path = rng.choice(JSON_PATHS)
    body = json.dumps(good_body(path)).encode()
    framings = {
        "too short": f"Content-Length: {len(body) // 2}",
        "negative": "Content-Length: -1",
        "letters": "Content-Length: many",
        "a plus": f"Content-Length: +{len(body)}",
        "a fraction": f"Content-Length: {len(body)}.0",
        "hexadecimal": f"Content-Length: {len(body):#x}",
        "two of them": f"Content-Length: {len(body)}\r\nContent-Length: {len(body) - 5}",
        "a list": f"Content-Length: {len(body)}, {len(body) - 5}",
        "20 digits": "Content-Length: 99999999999999999999",
        "5000 digits": f"Content-Length: {'9' * 5000}",
        "empty": "Content-Length: ",
        "other digits": "Content-Length: \xb2\xb3",
        "an unknown coding": "Transfer-Encoding: gzip",
        "chunks and none": "Transfer-Encoding: chunked, identity",
        "no chunks": "Transfer-Encoding: chunked",
    }
    what = rng.choice(list(framings))
    wire = http_request(site, "POST", path, body, framing=framings[what])
    # A whole body that is no chunk, or the beginning of the next request.
    return Attack(f"POST {path}: {what}", (wire + b"\r\n",))


@kind("client that ends early", 400, 413, says="JSON|form|prompt", plain=True)
def ends_early(rng: random.Random, site: Site) -> Attack:
    """Less than was told, and then the end. Nothing need be answered."""
    path = rng.choice(POSTS)
    body = form(*good_parts()) if path == EDITS else json.dumps(good_body(path)).encode()
    kind_of = FORM_TYPE if path == EDITS else JSON_TYPE
    framing = f"Content-Length: {len(body) + rng.choice((1, 1000))}"
    wire = http_request(site, "POST", path, body, kind_of, framing=framing)
    return Attack(f"POST {path}: less than was told", (wire,), half_closed=True, is_owed=False)


@kind("broken chunks", 400, says="", plain=True)
def broken_chunks(rng: random.Random, site: Site) -> Attack:
    bodies = (
        b"zz\r\n", b"-5\r\nhello\r\n", b"5\r\nhello!!\r\n", b"5\nhello\n\r\n", b"\r\n\r\n", b"f" * 30 + b"\r\n",
        b"5;" + b"a" * 100_000, b"0x5\r\nhello\r\n0\r\n\r\n", b"5 \r\nhello\0\0", b"\xff\xff\r\n",
    )  # fmt: skip
    path, body = rng.choice(JSON_PATHS), rng.choice(bodies)
    head = http_request(site, "POST", path, b"", framing="Transfer-Encoding: chunked")
    pieces = (head + body,) if rng.random() < 0.5 else (head + chunked(b'{"a":', end=b""), body)
    return Attack(f"POST {path}: {body[:20]!r}", pieces)


@kind("garbage behind an answer", 400, 403, 404, 405, 413, says="\\w+", plain=True)
def garbage_behind(rng: random.Random, site: Site) -> Attack:
    """What is answered before its body ends, and goes on with what is no HTTP."""
    start = chunked(b"hello", end=b"")
    framing = "Transfer-Encoding: chunked"
    wires = {
        "GET": http_request(site, "GET", "/nope", b"", None, framing=framing) + start,
        "foreign host": http_request(site, "POST", GENERATE, b"", host="evil.example", framing=framing)
        + start,
        "wrong method": http_request(site, "PUT", GENERATE, b"", framing=framing) + start,
        "over the limit": http_request(site, "POST", GENERATE, b"", framing=framing)
        + chunked(*[b" " * (1 << 16)] * (site.body_bytes // (1 << 16) + 2), end=b""),
    }
    what = rng.choice(list(wires))
    garbage = rng.choice((b"zz\r\n", b"\xff\xfe\r\n", b"-1\r\n", b"GET / HTTP/1.1\r\n\r\n"))
    return Attack(f"{what}, then {garbage!r}", (wires[what], garbage))


@kind("garbage", 400, 403, says="token|Not Found", plain=True)
def garbage(rng: random.Random, site: Site) -> Attack:
    wires = (
        rng.randbytes(200) + b"\r\n\r\n", b"\x16\x03\x01\0\xa5\x01\0\0\xa1\x03\x03" + rng.randbytes(32) + b"\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET /healthz\r\n\r\n", b"GET  HTTP/1.1\r\n\r\n",
        b"\0" * 100 + b"\r\n\r\n",
        b"GET /healthz HTTP/9.9.9\r\n\r\n", b"EHLO evil\r\n\r\n", b"GET /healthz HTTP/1.1\r\n\r\n",
        b"*1\r\n$4\r\nPING\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET /a b HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nA B: c\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost : localhost\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", b"GET /healthz HTTP/1.1\nHost\n\n",
        b"GET /healthz HTTP/1.1\r\n Host: localhost\r\n\r\n", b"GET /healthz HTTP/1.0\r\n\r\n",
        b"<policy-file-request/>\0\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: a\0b\r\n\r\n", b"a" * 20_000, b"\r\n" * 50 + b"x\r\n\r\n",
    )  # fmt: skip
    wire = rng.choice(wires)
    return Attack(f"{wire[:30]!r}", (wire,))


@kind("half request", 400, 408, says="in time|within", plain=True)
def half_request(rng: random.Random, site: Site) -> Attack:
    """It is left open, and nothing is owed to it."""
    path = rng.choice(JSON_PATHS)
    body = json.dumps(good_body(path)).encode()
    wires = {
        "nothing": b"",
        "half a head": http_request(site, "POST", path, body)[:30],
        "a head": http_request(site, "POST", path, b"", framing=f"Content-Length: {len(body)}"),
        "half a body": http_request(site, "POST", path, body)[: -len(body) // 2],
        "half a chunk": http_request(site, "POST", path, b"", framing="Transfer-Encoding: chunked")
        + b"ff\r\nhalf",
        "waits for 100": http_request(
            site, "POST", path, b"", JSON_TYPE, "Expect: 100-continue", framing="Content-Length: 5"
        ),
    }
    what = rng.choice(list(wires))
    return Attack(f"{what}, left open", (wires[what],), is_owed=False)


# ---- servers -----------------------------------------------------------------------------------------------


def make_export(folder: Path) -> Path:
    """An export of a tiny random network, in a folder of its own."""
    made = folder / "small"
    made.mkdir()
    texts = ["a photo of a fox, some text and numbers 0123456789 {}", CANARY, "adeghiknorstvw"] * 9
    tokenizer = train_tokenizer(texts, made / export.TOKENIZER, vocabulary=300)
    config = load_config(None, [*MODEL, f"data.tokenizer={tokenizer.path}"]).with_vocabulary(
        tokenizer.vocabulary
    )
    network = build_model(config)
    initialise(network, seed=0, layers=config.model.layers)
    name, file = next(iter(export.WEIGHT_FILES.items()))
    save_file(network.state_dict(), made / file, metadata={"format": "pt", export.EXPORT_ID: "random"})
    description = {
        "format": export.FORMAT,
        "format_version": export.FORMAT_VERSION,
        export.EXPORT_ID: "random",
        "step": 0,
        "weights": {name: file},
        "digests": {export.TOKENIZER: file_digest(made / export.TOKENIZER)},
        "config": config.as_dict(),
    }
    (made / export.CONFIG).write_text(json.dumps(description), encoding="utf-8")
    return made


class Server:
    """`transfusion serve` as a process, and its log.

    Args:
        model: An export.
        log: A file for what it says.
        body_mb: The limit of bodies.
        token_file: With the token, or none.
        open_files: How many it may hold open. None: as many as this process.
    """

    def __init__(
        self,
        model: Path,
        log: Path,
        body_mb: int,
        token_file: Path | None = None,
        open_files: int | None = None,
    ) -> None:
        command = [sys.executable, "-m", "transfusion", "serve", model, "--port", 0, "--max-body-mb", body_mb]
        command += ["--max-steps", STEPS, "--max-images", IMAGES, "--max-tokens", TOKENS, "--cache-gb", 0.2]
        command += ["--grace", GRACE]
        command += [] if token_file is None else ["--token-file", token_file]
        self.log, self._read = log, 0
        self.limit_of_files = open_files
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                [*map(str, command)],
                stderr=stream,
                stdout=subprocess.DEVNULL,
                preexec_fn=functools.partial(_limit_files, open_files) if open_files else None,
            )
        self.port = 0

    def wait(self) -> None:
        """Until it answers. Raises RuntimeError where it does not come."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self.is_alive:
            found = re.search(r"served at http://[^:]+:(\d+)", self.log.read_text("utf-8", "replace"))
            if found:
                self.port = int(found[1])
                if self.is_healthy():
                    return
            time.sleep(0.05)
        raise RuntimeError(f"the server did not come up: {self.log.read_text('utf-8', 'replace')[-2000:]}")

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def is_healthy(self) -> bool:
        """Whether /healthz is 200, in time."""
        wire = http_request(Site(self.host, 0, 0), "GET", "/healthz")
        return exchange(self.port, Attack("health", (wire,))).status == 200

    def new_log(self) -> str:
        """What it has said since it was asked last."""
        with self.log.open("rb") as stream:
            stream.seek(self._read)
            said = stream.read(1 << 20)
            # Whatever more there is has nothing new to tell.
            self._read = stream.seek(0, os.SEEK_END)
        return said.decode("utf-8", "replace")

    def peak_mib(self) -> float:
        """The most memory that it has held."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii", errors="replace")
        return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))

    def stop(self) -> None:
        """End it."""
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _limit_files(most: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def exchange(port: int, attack: Attack, held: list[socket.socket] | None = None) -> Answer:
    """Send a request and read the answer. held: takes the connection, so that it stays open."""
    begin = time.monotonic()
    try:
        connection = socket.create_connection(("127.0.0.1", port), timeout=HANG_SECONDS)
    except OSError as error:
        return Answer(problem=f"no connection: {error}")
    with contextlib.ExitStack() as stack:
        if held is None:
            stack.callback(connection.close)
        else:
            held.append(connection)
        # The server may have answered and closed before all is sent.
        with contextlib.suppress(OSError):
            for number, piece in enumerate(attack.pieces):
                if number:
                    time.sleep(0.02)
                connection.sendall(piece)
            if attack.half_closed:
                connection.shutdown(socket.SHUT_WR)
        if not attack.is_owed:
            connection.settimeout(SILENCE_SECONDS)
        method = attack.pieces[0].split(b" ", 1)[0].decode("latin-1")
        response = http.client.HTTPResponse(connection, method=method)
        try:
            response.begin()
            body = response.read()
        except (OSError, http.client.HTTPException) as error:
            return Answer(problem=f"{type(error).__name__} {error}", seconds=time.monotonic() - begin)
        seconds = time.monotonic() - begin
        if len(attack.pieces) > 1:
            # So that what the server says of the last piece is in its log.
            with contextlib.suppress(OSError):
                connection.settimeout(SILENCE_SECONDS)
                connection.recv(1)
        headers = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, headers, body, seconds)


# ---- judging -----------------------------------------------------------------------------------------------


@functools.cache
def private() -> tuple[bytes, ...]:
    """What no answer may hold: signs of a trace, and places of this machine."""
    places = {str(ROOT), sys.prefix, sys.base_prefix, tempfile.gettempdir(), str(Path.home())}
    signs = {"Traceback", 'File "', "site-packages", "dist-packages"}
    return tuple(text.encode() for text in sorted(signs | {place for place in places if len(place) > 1}))


def judge(of: Kind, attack: Attack, answer: Answer) -> list[str]:
    """What is wrong with an answer."""
    if answer.problem:
        return [f"no answer: {answer.problem}"] if attack.is_owed else []
    wrong = []
    if answer.seconds > HANG_SECONDS:
        wrong.append(f"took {answer.seconds:.1f} s")
    statuses = of.statuses if attack.statuses is None else attack.statuses
    is_plain = of.plain and answer.status == 400 and answer.body == NO_HTTP
    if answer.status not in statuses and not is_plain:
        allowed = " or ".join(map(str, sorted(statuses)))
        wrong.append(f"is answered by {answer.status}, not {allowed}: {answer.body[:160]!r}")
    everything = answer.body + repr(answer.headers).encode()
    wrong += [f"tells {sign.decode()!r}" for sign in private() if sign in everything]
    if 200 <= answer.status < 300:
        wrong += ["fails in the middle of the answer"] if b"event: error" in answer.body else []
    elif answer.status >= 400 and not is_plain:
        wrong += judge_error(of.says if attack.says is None else attack.says, attack, answer)
    return wrong


def judge_error(says: str, attack: Attack, answer: Answer) -> list[str]:
    """What is wrong with an answer that is an error."""
    needed = {405: "allow", 401: "www-authenticate"}.get(answer.status)
    wrong = [f"has no header {needed}"] if needed and needed not in answer.headers else []
    if attack.pieces[0].startswith(b"HEAD "):
        return wrong
    if not answer.headers.get("content-type", "").startswith("application/json"):
        return [*wrong, f"is no JSON: {answer.body[:100]!r}"]
    try:
        error = json.loads(answer.body)["error"]
        message, param = error["message"], error["param"]
        types = {"message": str, "type": str, "param": str | None, "code": str | None}
        is_right = set(error) == set(types) and all(isinstance(error[name], types[name]) for name in types)
    except (ValueError, KeyError, TypeError):
        is_right = False
    if not is_right:
        return [*wrong, f"is not of OpenAI's shape: {answer.body[:200]!r}"]
    if not message or not message.isprintable() or len(message) > LONGEST_MESSAGE:
        wrong.append(f"has no message of one line: {message[:100]!r}")
    if re.search(says, message) is None:
        wrong.append(f"does not say {says!r}: {message[:200]!r}")
    if (found := OF_PYDANTIC.search(f"{message} {param}")) is not None:
        wrong.append(f"tells pydantic's {found[0]!r}: {message[:160]!r}")
    return wrong


# ---- the campaign ------------------------------------------------------------------------------------------


@dataclass
class Figures:
    """What was found.

    Attributes:
        counts: Answers by kind and status.
        wrong: One line each.
        slowest: Seconds of the slowest answer, and of which case.
        schemathesis: How many requests it made. None: it was not asked, or is not installed.
        peak_mib: Of the memory of both servers.
    """

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")
    schemathesis: int | None = None
    peak_mib: list[float] = field(default_factory=list)


@dataclass
class Campaign:
    """Both servers, and all that is sent to them.

    Attributes:
        folder: For the model, its tokens and logs.
        seed: Of the requests.
        body_mb: The limit of bodies.
        data: Hostile shards.
    """

    folder: Path
    seed: int = 0
    body_mb: int = 32
    data: Path | None = None
    figures: Figures = field(default_factory=Figures)

    def __enter__(self) -> Campaign:
        model = make_export(self.folder)
        token_file = self.folder / "token"
        token_file.write_text(TOKEN + "\n", encoding="ascii")
        self.servers = [
            Server(model, self.folder / "open.log", self.body_mb),
            Server(model, self.folder / "token.log", self.body_mb, token_file, OPEN_FILES),
        ]
        self._stack = contextlib.ExitStack()
        for server in self.servers:
            self._stack.callback(server.stop)
        try:
            for server in self.servers:
                server.wait()
        except BaseException:
            self._stack.close()
            raise
        self._trap = self._stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        files = tuple(hostile_images(self.data)) if self.data else ()
        plain = Site(self.servers[0].host, self.body_mb << 20, self._trap.getsockname()[1], files)
        self.sites = [plain, plain._replace(host=self.servers[1].host, token=TOKEN)]
        self.held: list[socket.socket] = []
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self.held:
            connection.close()
        # Both at once, since each takes seconds.
        for server in self.servers:
            server.process.terminate()
        self._stack.close()

    def run(self, requests: int) -> None:
        """Send so many requests, and look at the server after each hundred."""
        told = time.monotonic()
        for number, name in enumerate(plan(requests), 1):
            self.send(name)
            if number % 100 == 0 or number == requests:
                self.look(f"after {number} requests")
            if time.monotonic() - told > TELL_SECONDS:
                told = time.monotonic()
                print(f"{number} of {requests}, {len(self.figures.wrong)} wrong", file=sys.stderr, flush=True)

    def attack(self, name: str) -> tuple[Kind, Server, Attack]:
        """The case of this name: a kind and a number."""
        of, _, number = name.rpartition("/")
        row = KINDS[of]
        place = int(row.needs_token)
        site = self.sites[place]
        if of == "field":
            made = field_attack(site, int(number), self.seed)
        else:
            made = row.make(random.Random(f"{of} {self.seed} {number}"), site)
        return row, self.servers[place], made

    def send(self, name: str) -> tuple[Attack, Answer]:
        """Send a case and judge what comes."""
        row, server, attack = self.attack(name)
        held = self.held if name.startswith("half request/") else None
        answer = exchange(server.port, attack, held)
        problems = judge(row, attack, answer)
        problems += self.judge_log(server)
        if not server.is_alive:
            problems.append(f"the server ended with {server.process.returncode}")
        self.figures.counts[f"{name.rpartition('/')[0]}: {answer.status or 'none'}"] += 1
        self.figures.slowest = max(self.figures.slowest, (answer.seconds, name))
        self.figures.wrong += [
            f"--seed {self.seed} --case '{name}' ({attack.what}) {problem}" for problem in problems
        ]
        return attack, answer

    def judge_log(self, server: Server) -> list[str]:
        """What is wrong with what a server has said."""
        # A path that was asked for may hold any words.
        said = re.sub(r"(?m)^[A-Z]+ .* \d{3} \d+\.\d\d s$", "", server.new_log())
        signs = {
            "a trace": "Traceback",
            "a prompt": CANARY,
            "the token": TOKEN,
            "an ignored error": "Exception in",
        }
        return [
            f"the log holds {name}: {_around(said, sign)}" for name, sign in signs.items() if sign in said
        ]

    def look(self, when: str) -> None:
        """Whether the servers are as they should be."""
        for name, server in zip(("open", "token"), self.servers, strict=True):
            if not server.is_healthy():
                self.figures.wrong.append(f"{when}: /healthz of the {name} server is not 200 within 10 s")
            self.figures.wrong += [f"{when}: {problem}" for problem in self.judge_log(server)]
        self._trap.settimeout(0)
        with contextlib.suppress(BlockingIOError):
            self._trap.accept()[0].close()
            self.figures.wrong.append(f"{when}: the server has called a URL of a prompt")

    def check_fields(self) -> None:
        """Whether FIELDS knows all that the server takes."""
        wire = http_request(self.sites[0], "GET", "/v1/schema")
        bodies = json.loads(exchange(self.servers[0].port, Attack("schema", (wire,))).body)["bodies"]
        for body, described in bodies.items():
            known = FIELDS.get(BODIES.get(body, ""), {})
            self.figures.wrong += [
                f"FIELDS lacks {name} of {body}" for name in described["properties"] if name not in known
            ]

    def wait_for_ends(self, seconds: float) -> None:
        """Wait until the halves of requests must have been ended by the server."""
        end = time.monotonic() + seconds
        for connection in self.held:
            connection.settimeout(max(0.01, end - time.monotonic()))
            try:
                while connection.recv(1 << 16):
                    pass
            except TimeoutError:
                self.figures.wrong.append(f"half a request was still open {seconds:g} s after the last one")
                return
            except OSError:
                pass

    def flood(self) -> None:
        """Leave open more connections than a server may have files."""
        server, site = self.servers[1], self.sites[1]
        before = server.log.stat().st_size
        half = http_request(site, "GET", "/healthz")[:-2]
        with contextlib.ExitStack() as stack:
            for _ in range(CONNECTIONS):
                with contextlib.suppress(OSError):
                    made = stack.enter_context(
                        socket.create_connection(("127.0.0.1", server.port), timeout=1)
                    )
                    made.sendall(half)
            during = server.is_healthy()
        what = f"{CONNECTIONS} halves of requests to a server of at most {server.limit_of_files} files"
        if not during:
            self.figures.wrong.append(f"flood ({what}): /healthz is not 200 within 10 s while they are open")
        if not server.is_healthy():
            self.figures.wrong.append(f"flood ({what}): /healthz is not 200 within 10 s when they are closed")
        if (grown := server.log.stat().st_size - before) > 1 << 20:
            self.figures.wrong.append(f"flood ({what}): the log has grown by {grown >> 20} MiB")
        self.figures.wrong += [f"flood ({what}): {problem}" for problem in self.judge_log(server)]

    def examine(self, examples: int, phases: str = "examples,coverage,fuzzing,stateful") -> None:
        """Let schemathesis make requests. examples: at most so many of an operation in a phase."""
        self.figures.schemathesis, found = run_schemathesis(
            f"http://{self.servers[0].host}", self.seed, examples, phases, self.folder
        )
        self.figures.wrong += found
        self.look("after schemathesis")

    def end(self) -> None:
        """Tell the open server to end while halves of requests are open to it."""
        self.figures.peak_mib = [
            round(server.peak_mib(), 1) if server.is_alive else 0.0 for server in self.servers
        ]
        if (most := max(self.figures.peak_mib)) > MOST_MIB:
            self.figures.wrong.append(f"a server held {most:.0f} MiB of at most {MOST_MIB}")
        server, site = self.servers[0], self.sites[0]
        wires = (
            http_request(site, "POST", GENERATE, b"{", framing="Content-Length: 100"),
            http_request(site, "POST", GENERATE)[:30],
        )
        for wire in wires:
            exchange(server.port, Attack("a half", (wire,), is_owed=False), self.held)
        server.process.terminate()
        try:
            code = server.process.wait(GRACE + END_SECONDS)
        except subprocess.TimeoutExpired:
            self.figures.wrong.append(
                f"end: half a body keeps the server for over {GRACE + END_SECONDS:g} s, with --grace {GRACE:g}"
            )
            return
        self.figures.wrong += [f"end: {problem}" for problem in self.judge_log(server)]
        if code:
            self.figures.wrong.append(f"end: with half a body open it ends with {code}")


def plan(requests: int) -> list[str]:
    """Names of cases: two fields, and three of the other kinds in turn."""
    others = [name for name in KINDS if name != "field"]
    names = (f"{others[number % len(others)]}/{number // len(others)}" for number in itertools.count())
    fields = (f"field/{number}" for number in itertools.count())
    return [next(fields) if number % 5 < 2 else next(names) for number in range(requests)]


def hostile_images(data: Path) -> Iterator[tuple[str, bytes]]:
    """Images of hostile shards that no training takes."""
    manifest = json.loads((data / "manifest.json").read_text(encoding="utf-8"))
    for shard, facts in manifest["shards"].items():
        bad = {
            case["key"]: case["case"]
            for case in facts["samples"]
            if case["expect"] == "drop" and case.get("reason", "").startswith("image_")
        }
        if not bad:
            continue
        with tarfile.open(data / shard) as archive:
            for member in archive:
                key, _, ending = member.name.partition(".")
                stream = archive.extractfile(member) if member.isfile() else None
                if key in bad and stream is not None and ending in ("png", "jpg", "jpeg", "webp"):
                    yield f"{shard} {key}, {bad[key]}", stream.read(8 << 20)


def _around(text: str, sign: str) -> str:
    """Some of a text, in one line. Of a trace its last line."""
    begin = text.index(sign)
    if sign != "Traceback":
        return repr(text[max(0, begin - 60) : begin + 60])
    last = re.search(r"^\w[\w.]*(Error|Exception|Exit|Interrupt)\b.*$", text[begin:], re.MULTILINE)
    return repr(last[0][:160] if last else text[begin : begin + 160])


# ---- schemathesis ------------------------------------------------------------------------------------------

# A description tells what one field takes. It cannot tell which values go together, nor that bytes must be an image.
# So schemathesis' own check that all valid data are accepted is wrong here. `valid_is_refused_for_a_reason` stands in
# its place, and these are the reasons.
EXCLUDED_CHECKS = "positive_data_acceptance"
# JSON Schema calls 1.0 an integer. No client writes one so, and a server that takes it takes 1.5 soon.
REASONS = re.compile(
    r"should be a valid integer|"
    r"cannot be applied to an empty prompt|partial_images needs stream|stream_options needs stream|must rise within"
    r"|leaves no room|positions, more than|no image that can be read|fetches no URL|base64 is broken|seeds? .* must lie"
    r"|stop takes up to 4|a prompt of \d+ images|more than one part|takes \d+ pages of the cache"
)


def run_schemathesis(
    url: str, seed: int, examples: int, phases: str, folder: Path
) -> tuple[int | None, list[str]]:
    """How many requests it made, None where it is not installed, and one line for each failure."""
    if importlib.util.find_spec("schemathesis") is None:
        return None, []
    report = folder / "schemathesis.json"
    command = [sys.executable, "-m", "schemathesis.cli", "--no-color", "run", f"{url}/openapi.json"]
    command += ["--checks", "all", "--exclude-checks", EXCLUDED_CHECKS, "--seed", str(seed)]
    command += ["--phases", phases, "--max-examples", str(examples), "--continue-on-failure", "--no-shrink"]
    command += ["--generation-database", "none", "--output-sanitize", "false", "--warnings", "off"]
    command += ["--request-timeout", str(HANG_SECONDS), "--report", "json", "--report-json-path", str(report)]
    hooks = {
        "SCHEMATHESIS_HOOKS": Path(__file__).stem,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env={**os.environ, **hooks})
    if not report.exists():
        return 0, [f"schemathesis ended with {done.returncode}: {(done.stdout + done.stderr)[-500:]!r}"]
    found = json.loads(report.read_text(encoding="utf-8"))
    count = found["test_cases"]["generated"]
    wrong = list(_failures(done.stdout))
    wrong += [f"schemathesis: {str(error)[:300]}" for error in found["errors"]]
    if done.returncode and not wrong:
        wrong.append(f"schemathesis ended with {done.returncode}: {done.stdout[-500:]!r}")
    return count, wrong


def _failures(said: str) -> Iterator[str]:
    """The failures that schemathesis tells of, one line each."""
    operation, told, is_told = "", list[str](), False
    for line in map(str.rstrip, said.splitlines()):
        if found := re.fullmatch(r"_+ ([A-Z]+ /\S*) _+", line):
            operation = found[1]
        elif line.startswith("- "):
            told.append(line[2:])
            is_told = True
        elif line.startswith("["):
            # What follows is the answer.
            is_told = False
        elif is_told and line:
            told.append(line.strip()[:200])
        elif line.strip().startswith("curl "):
            yield f"schemathesis, {operation}: {' | '.join(told[:8])}; {line.strip()[:2000]}"
            told = []


def register_checks() -> None:
    """Gives schemathesis a check and images, in its process."""
    import schemathesis
    from hypothesis import strategies

    @schemathesis.check
    def valid_is_refused_for_a_reason(ctx: Any, response: Any, case: Any) -> None:
        if _is_valid(case) and response.status_code == 400 and REASONS.search(response.text) is None:
            raise AssertionError(f"valid data are refused: {response.text[:300]}")

    # No description makes bytes an image.
    schemathesis.openapi.format("binary", strategies.just(png()))


def _is_valid(case: Any) -> bool:
    return case.meta is not None and case.meta.generation.mode.is_positive


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--case", action="append", default=[], help="send this one alone, and show the answer"
    )
    parser.add_argument("--body-mb", type=int, default=32, help="the server's limit of bodies")
    parser.add_argument("--examples", type=int, default=25, help="of schemathesis. 0: it is left out")
    parser.add_argument(
        "--patience", type=float, default=75, help="seconds for halves of requests to be ended"
    )
    parser.add_argument("--data", type=Path, help="folder of hostile shards with manifest.json")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    begin = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="serve-hostile-") as folder,
        Campaign(Path(folder), options.seed, options.body_mb, options.data) as campaign,
    ):
        figures = campaign.figures
        if options.case:
            for name in options.case:
                show(*campaign.send(name))
            print("\n".join(figures.wrong))
            return WRONG if figures.wrong else 0
        campaign.check_fields()
        campaign.run(options.requests)
        if options.examples:
            campaign.examine(options.examples)
        if options.patience:
            campaign.wait_for_ends(options.patience)
        campaign.flood()
        campaign.end()
    record = record_head(torch.device("cpu")) | {
        "requests": options.requests,
        "seed": options.seed,
        "body_mb": options.body_mb,
        "cases_of_fields": len(field_cases()),
        "found": dict(sorted(figures.counts.items())),
        "slowest": {"seconds": round(figures.slowest[0], 3), "case": figures.slowest[1]},
        "schemathesis": {"requests": figures.schemathesis, "excluded_checks": EXCLUDED_CHECKS},
        "peak_mib": figures.peak_mib,
        "seconds": round(time.monotonic() - begin, 1),
        "wrong": figures.wrong,
    }
    write_json(record, options.out)
    made = "none" if figures.schemathesis is None else str(figures.schemathesis)
    print(
        "\n".join(
            [
                *figures.wrong,
                f"{options.requests} requests and {made} of schemathesis, {len(figures.wrong)} wrong, slowest"
                f" {figures.slowest[0]:.1f} s ({figures.slowest[1]}), {max(figures.peak_mib):.0f} MiB",
            ]
        )
    )
    return WRONG if figures.wrong else 0


def show(attack: Attack, answer: Answer) -> None:
    """A case for eyes."""
    print(attack.what)
    for piece in attack.pieces:
        print(f"> {piece[:SHOWN_BYTES]!r}{'...' if len(piece) > SHOWN_BYTES else ''}")
    print(f"< {answer.problem or answer.status} {answer.headers} {answer.body[: 3 * SHOWN_BYTES]!r}")


if __name__ == "__main__":
    sys.exit(main())
if os.environ.get("SCHEMATHESIS_HOOKS") == __name__:
    register_checks()
