"""The server under load: 64 clients at a time, answers that are whole and their own, and an end that loses nothing.

    .venv/bin/python campaigns/serve_load.py [--seconds 600] [--clients 64] [--seed 0] [--out FILE]

`transfusion serve` runs as a process of its own, on one thread of torch, over the export of a tiny random network. That
network says letters, begins images and ends texts. Clients ask for texts, for texts with images, for images and for
edits, as one piece or as events. Some read slowly, some go away in the middle, and a few ask for what does not fit.

Every answer must be complete and of its own request. Each prompt is sent once, and an image tells the prompt that it
came of. A seeded sample of the answers is compared with those of the same requests alone in this process. A 429 is
counted and tried again after what the server advises. It is a fault where the clients had not asked for more answers
than the server takes.

Another process asks for /healthz every 50 ms. Probes that a slow one kept from being sent count too, each with the time
that it would have waited. The memory of the server is read every second. Then /metrics must agree with what was seen.

At last the server is killed under load and started again, and then told to stop under load. Before all that, the first
byte of streamed answers of an idle server is timed. Exits with 1 when a bar is missed.
`tests/unit/serve/test_serve_load.py` holds a sample.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import http.client
import io
import json
import multiprocessing
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from limits import record_head, write_json
from mixed_load import LETTERS, MODEL, WORDS, Bar
from transfusion.checkpoint import export
from transfusion.config import load_config
from transfusion.config.objectives import SAMPLERS
from transfusion.families.build import build_model
from transfusion.files import file_digest
from transfusion.generate import Done, Pipeline
from transfusion.generate.events import extend
from transfusion.generate.pillow_images import to_image
from transfusion.generate.recipe import pixel_digest
from transfusion.model.initialise import initialise
from transfusion.parallel.parameter_shards import WEIGHT
from transfusion.schema import SpecialToken
from transfusion.sequence.tokenizer import train_tokenizer
from transfusion.serve.limits import Limits

RESULT = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "serve-load.json"
MISSED = 1
NETWORK = (*MODEL, "data.caption_dropout=0.1", "diffusion.prediction=v", "codec.image_sizes=[8x8, 8x12]")
# Height and width.
SIZES = ((8, 8), (8, 12))
# What the network leans towards: to begin an image and to end, in logits above those of letters.
BEGINS, ENDS = 0.5, 0.5
# The first coordinate of every token. It is far above the others, so that its row of the head is a bias.
FIRST_COORDINATE = 20.0
# Shares of the requests: what is asked, who goes away, who reads slowly.
KINDS = {"chat": 32, "native": 30, "image": 20, "edit": 16, "too long": 2}
LEAVES, SLOW = 0.12, 0.06
# The share of a slow reader's reads, each of a chunk, before which it pauses.
PAUSES = 0.015
# A slow reader has so small a buffer that the server has to wait for it.
SLOW_BUFFER = 4096
# Seconds after which an answer counts as lost.
DEADLINE = 120.0
# Until an answer whose client went away has surely ended.
GHOST_SECONDS = 2.0
PROBE_SECONDS = 0.05
START_BAR, HEALTH_BAR_MS, FIRST_BYTE_BAR_MS, GROWTH_BAR_PERCENT = 15.0, 100.0, 150.0, 5.0
# What the server may take to end beyond its grace.
END_SECONDS = 15.0
LEAST_WARM_UP = 10.0
HEALTH, START, GROWTH = "p99 of /healthz, ms", "seconds from a start to /readyz", "growth of memory, %"
FIRST_BYTE, FIRST_TEXT = "median of the first byte, ms", "median of the first text, ms"
# Bars that depend on how busy the machine is.
TIMED = (
    HEALTH,
    FIRST_BYTE,
    FIRST_TEXT,
    START,
)
EXAMPLES = 20
Kind = Literal["chat", "native", "image", "edit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much is done.

    Attributes:
        clients: At a time.
        seconds: Of the load.
        compared: Answers that are compared with those of this process.
        first_bytes: How often the first byte is timed, for each kind of stream.
        longest_pause: Seconds between two reads of a slow reader.
        short_seconds: Of the load in whose middle the server is killed.
        grace: Of the server that is told to stop, short enough that a fast machine has answers to hand back.
    """

    clients: int = 64
    seconds: float = 600.0
    compared: int = 200
    first_bytes: int = 20
    longest_pause: float = 2.0
    short_seconds: float = 5.0
    grace: float = 1.0


@dataclass(slots=True)
class Figures:
    """What was found.

    Attributes:
        counts: Requests by kind, how they went and how answers ended.
        examples: Of what was wrong, in words.
        seconds: Of the load, until the last answer.
        longest_seconds: That a request of a client that does not read slowly took.
        health_ms: p50, p99 and maximum of /healthz, and how many there were.
        cores: That the server, the clients and all others were busy on. With busy others the times are longer.
        memory: Resident MiB of the server, each second.
        growth_percent: The maximum of the last fifth above that of the fifth after the warm-up. None: too short a run.
        ended: Answers by how they ended, as /metrics tells.
        statuses: Of HTTP, as /metrics tells.
        ticks: Of the engine, and the mean of their seconds.
        answers_left: As /metrics tells when all clients have ended.
        disagreed: Answers that /metrics and the clients count otherwise.
        log_errors: Lines of the log that begin a traceback.
        compared: Answers.
        differing: Of them, those that are other texts, or images by more than one level of 255.
        first_byte_ms: Of streams of an idle server, each.
        first_text_ms: Until the first text of the same.
        start_seconds: Until the first server was ready, and the second.
        killed: How requests ended of a server that was killed.
        stopped: How requests ended of a server that was told to stop.
        newcomer: What a client gets that comes after that.
        stop_seconds: Until that server's process had ended.
        exit_code: Its.
    """

    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    seconds: float = 0.0
    longest_seconds: float = 0.0
    health_ms: dict[str, float] = field(default_factory=dict)
    cores: dict[str, float] = field(default_factory=dict)
    memory: list[float] = field(default_factory=list)
    growth_percent: float | None = None
    ended: dict[str, int] = field(default_factory=dict)
    statuses: dict[str, int] = field(default_factory=dict)
    ticks: dict[str, float] = field(default_factory=dict)
    answers_left: float = 0.0
    disagreed: int = 0
    log_errors: int = 0
    compared: int = 0
    differing: int = 0
    first_byte_ms: dict[str, list[float]] = field(default_factory=dict)
    first_text_ms: dict[str, list[float]] = field(default_factory=dict)
    start_seconds: list[float] = field(default_factory=list)
    killed: Counter[str] = field(default_factory=Counter)
    stopped: Counter[str] = field(default_factory=Counter)
    newcomer: str = ""
    stop_seconds: float = 0.0
    exit_code: int | None = None

    def note(self, what: str, example: str) -> None:
        """Count what is wrong, and keep some of it in words."""
        self.counts[what] += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(f"{what}: {example}"[:400])


def make_export(folder: Path) -> None:
    """The export of a random network that says letters, begins images and ends texts."""
    folder.mkdir(parents=True)
    tokenizer = train_tokenizer([" ".join(WORDS), LETTERS] * 20, folder / export.TOKENIZER, vocabulary=300)
    config = load_config(None, [*NETWORK])
    whole = config.with_vocabulary(tokenizer.vocabulary)
    model = build_model(whole)
    initialise(model, seed=0, layers=config.model.layers)
    # As initialised, the decoder answers zero and norms and biases do nothing.
    generator = torch.Generator().manual_seed(0)
    bias_V = torch.full((whole.model.vocabulary,), -50.0)
    bias_V[[tokenizer.encode(letter)[0] for letter in LETTERS]] = 0.0
    bias_V[SpecialToken.END_DOCUMENT] = ENDS
    begins = Pipeline(model, tokenizer, whole, "cpu").runner.sizes.size_by_begin_token
    bias_V[list(begins)] = BEGINS
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for name, _ in model.named_parameters():
        state[name] += 0.3 * torch.randn(state[name].shape, generator=generator)
    state["embedding.weight"][:, 0] = FIRST_COORDINATE
    state["norm.weight"][0] = 1.0
    state["lm_head.weight"] *= 3.0
    state["lm_head.weight"][:, 0] = bias_V
    weights = {WEIGHT: export.WEIGHT_FILES[WEIGHT]}
    save_file(state, folder / weights[WEIGHT], metadata={"format": "pt", export.EXPORT_ID: "one"})
    description = {
        "format": export.FORMAT,
        "format_version": export.FORMAT_VERSION,
        export.EXPORT_ID: "one",
        "step": 1,
        "weights": weights,
        "digests": {export.TOKENIZER: file_digest(folder / export.TOKENIZER)},
        "config": config.as_dict(),
    }
    (folder / export.CONFIG).write_text(json.dumps(description), encoding="utf-8")


class Server:
    """A server as a process of its own. Its log is a file, so that no pipe fills."""

    def __init__(self, model: Path, log: Path, *, grace: float, port: int = 0) -> None:
        self._begin, self.log = time.monotonic(), log
        command = [sys.executable, "-m", "transfusion", "serve", str(model), "--device", "cpu"]
        command += ["--port", str(port), "--grace", str(grace)]
        with log.open("wb") as opened:
            self.process = subprocess.Popen(
                command,
                stdout=opened,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        self.address = ""

    def wait_until_ready(self) -> float:
        """Seconds from the start to the first 200 of /readyz."""
        while time.monotonic() < self._begin + 60:
            found = re.search(r"is served at (http://\S+)", self.text())
            if self.process.poll() is not None:
                break
            if found:
                self.address = found[1]
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"{self.address}/readyz", trust_env=False).status_code == 200:
                        return time.monotonic() - self._begin
            time.sleep(0.02)
        raise RuntimeError(f"the server did not start: {self.text()[-1000:]}")

    @property
    def port(self) -> int:
        found = urlsplit(self.address).port
        assert found is not None
        return found

    def text(self) -> str:
        """Its log."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def busy_seconds(self) -> float:
        """Of the processor."""
        stat = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="utf-8")
        user, system = stat.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def memory_mib(self) -> float:
        """Memory that is in use."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request, and how its client behaves.

    Attributes:
        kind: Which endpoint is asked.
        prompt: Texts and images as the model gets them.
        seed: Of the first answer.
        count: Answers.
        settings: As `Pipeline` takes them.
        streams: Whether events are asked for.
        body: Of the request, as JSON or as the fields of a form.
        files: Images of a form.
        draws: The answer is one image.
        stop: A text before which the answer ends.
        fits: Whether the model can answer.
        leaves: After so many events the client goes away. Without events: after so many
            hundredths of a second.
        pause: The longest that the client waits between two reads.
    """

    kind: Kind
    prompt: list[str | Tensor]
    seed: int
    count: int
    settings: dict[str, Any]
    streams: bool
    body: dict[str, Any]
    files: list[bytes] = field(default_factory=list)
    draws: bool = False
    stop: str = ""
    fits: bool = True
    leaves: int | None = None
    pause: float = 0.0

    @property
    def path(self) -> str:
        return {
            "chat": "/v1/chat/completions",
            "native": "/v1/generate",
            "image": "/v1/images/generations",
            "edit": "/v1/images/edits",
        }[self.kind]

    @property
    def content(self) -> dict[str, Any]:
        """For httpx."""
        if self.kind != "edit":
            return {"json": self.body}
        files = [("image", (f"{n}.png", data, "image/png")) for n, data in enumerate(self.files)]
        return {"data": {name: str(value) for name, value in self.body.items()}, "files": files}

    @property
    def recipe_prompt(self) -> list[Any]:
        """As a recipe tells it."""
        return [part if isinstance(part, str) else {"image": pixel_digest(part)} for part in self.prompt]


class Load:
    """Requests at random, the same for the same seed. No two have the same prompt."""

    def __init__(self, seed: int, longest_pause: float, name: str) -> None:
        self.longest_pause, self.name = longest_pause, name
        shared = random.Random(f"{seed} {name}")
        self.samplers = ("auto", *SAMPLERS["v"])
        self.beginnings = [_words(shared, 12) for _ in range(4)]
        self._made = 0

    def next(self, draw: random.Random) -> Ask:
        """What a client asks next, from the client's own numbers."""
        kind = draw.choices(list(KINDS), list(KINDS.values()))[0]
        made = {"chat": self._chat, "native": self._native, "image": self._image, "edit": self._edit}
        ask = self._too_long(draw) if kind == "too long" else made[kind](draw)
        manner = draw.random()
        if not ask.fits:
            return ask
        if manner < LEAVES:
            return replace(ask, leaves=draw.randrange(12))
        if manner < LEAVES + SLOW:
            return replace(self._long_text(draw), pause=self.longest_pause)
        return ask

    def long(self, draw: random.Random) -> Ask:
        """What takes the server up to several seconds."""
        kind, count, steps = (
            draw.choice(("image", "text", "native")),
            draw.randint(1, 2),
            draw.randint(20, 250),
        )
        more: dict[str, Any]
        if kind == "text":
            ask, more = self._long_text(draw), {"max_tokens": draw.randint(30, 300), "n": count}
            ask = ask if draw.random() < 0.5 else _as_whole(ask)
        elif kind == "image":
            ask, more = self._image(draw), {"num_inference_steps": steps, "n": count}
        else:
            ask, count = self._native(draw), 1
            more = {"max_tokens": 300, "max_images": 4, "steps": steps, "temperature": 0.0}
        return replace(ask, body={**ask.body, **more}, count=count)

    def _unique(self, draw: random.Random, words: int) -> str:
        """A text that no other request has."""
        self._made += 1
        beginning = f"{draw.choice(self.beginnings)} " if draw.random() < 0.3 else ""
        return f"{beginning}{_words(draw, words)} {self.name} {self._made}"

    def _chat(self, draw: random.Random) -> Ask:
        prompt: list[str | Tensor] = [self._unique(draw, draw.randint(1, 6))]
        messages: list[dict[str, Any]] = [{"role": "user", "content": prompt[0]}]
        kind = draw.random()
        if kind < 0.2:
            first = _words(draw, 3)
            messages = [{"role": "system", "content": first}, *messages]
            prompt = [f"{first}\n{prompt[0]}"]
        elif kind < 0.4:
            image = _image(draw)
            prompt = [prompt[0], image, _words(draw, 2)]
            parts = [
                {"type": "text", "text": part}
                if isinstance(part, str)
                else {"type": "image_url", "image_url": {"url": _url(part)}}
                for part in prompt
            ]
            messages = [{"role": "user", "content": parts}]
        images, streams = draw.choice((0, 0, 1)), draw.random() < 0.6
        drawing = self._drawing(draw)
        settings = {**drawing, **_speaking(draw, 40), "max_images": images}
        body = {
            "messages": messages,
            "modalities": ["text", "image"] if images else ["text"],
            "image_config": _openai(drawing),
            **{name: settings[name] for name in ("temperature", "top_p", "max_tokens", "max_images")},
            "seed": (seed := draw.getrandbits(30)),
            "n": (count := draw.choice((1, 1, 2))),
        }
        stop = "nn" if not images and draw.random() < 0.15 else ""
        body |= {"stop": stop} if stop else {}
        if streams:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
            body |= {"partial_images": draw.randint(0, 3)} if images else {}
        return Ask(
            kind="chat",
            prompt=prompt,
            seed=seed,
            count=count,
            settings=settings,
            streams=streams,
            body=body,
            stop=stop,
        )

    def _long_text(self, draw: random.Random) -> Ask:
        """A long answer in many chunks."""
        prompt = self._unique(draw, 2)
        settings = {"temperature": 0.0, "top_p": 1.0, "max_tokens": 300, "max_images": 0}
        body = {
            "messages": [{"role": "user", "content": prompt}],
            "modalities": ["text"],
            "seed": (seed := draw.getrandbits(30)),
            "n": 2,
            **settings,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return Ask(
            kind="chat", prompt=[prompt], seed=seed, count=2, settings=settings, streams=True, body=body
        )

    def _too_long(self, draw: random.Random) -> Ask:
        """What does not fit into a sequence of the model, found by its engine."""
        text = self._unique(draw, 3) + " " + "x" * 400
        body = {"messages": [{"role": "user", "content": text}], "n": 2, "max_tokens": 5}
        return Ask(
            kind="chat", prompt=[text], seed=0, count=2, settings={}, streams=False, body=body, fits=False
        )

    def _native(self, draw: random.Random) -> Ask:
        kind = draw.random()
        words = draw.randint(15, 30) if kind < 0.1 else draw.randint(1, 5)
        prompt: list[str | Tensor] = [self._unique(draw, words)]
        if kind > 0.6:
            prompt = [_image(draw), *prompt, _image(draw)] if kind > 0.8 else [*prompt, _image(draw)]
        settings = {
            **self._drawing(draw),
            **_speaking(draw, 60),
            "temperature": 1.0,
            "max_images": draw.randint(0, 2),
        }
        body = {
            "prompt": [part if isinstance(part, str) else {"image": _url(part)} for part in prompt],
            "seed": (seed := draw.getrandbits(38)),
            "preview_every": draw.randint(0, 3),
            **_sized(settings),
        }
        return Ask(
            kind="native", prompt=prompt, seed=seed, count=1, settings=settings, streams=True, body=body
        )

    def _image(self, draw: random.Random) -> Ask:
        prompt = self._unique(draw, draw.randint(1, 5))
        settings = {**self._drawing(draw), "size": draw.choice(SIZES)}
        return self._drawn(draw, "image", [prompt], settings, prompt, [])

    def _edit(self, draw: random.Random) -> Ask:
        prompt, images = (
            self._unique(draw, draw.randint(1, 5)),
            [_image(draw) for _ in range(draw.choice((1, 1, 2)))],
        )
        settings = {**self._drawing(draw), "size": tuple(images[0].shape[1:])}
        return self._drawn(draw, "edit", [*images, prompt], settings, prompt, [_png(each) for each in images])

    def _drawn(
        self,
        draw: random.Random,
        kind: Kind,
        parts: list[str | Tensor],
        settings: dict[str, Any],
        prompt: str,
        files: list[bytes],
    ) -> Ask:
        """Images, by either endpoint."""
        streams = draw.random() < 0.5
        # An edit has the size of its image where none is asked for.
        named = {**settings, "size": None} if kind == "edit" else settings
        body = {
            "prompt": prompt,
            "seed": (seed := draw.getrandbits(30)),
            "n": (count := draw.choice((1, 1, 2))),
            "output_format": draw.choice(("png", "png", "webp")),
            **_openai(named),
        }
        if streams:
            body |= {"stream": True, "partial_images": draw.randint(0, 3)}
        return Ask(
            kind=kind,
            prompt=parts,
            seed=seed,
            count=count,
            settings=settings,
            streams=streams,
            body=body,
            files=files,
            draws=True,
        )

    def _drawing(self, draw: random.Random) -> dict[str, Any]:
        """How images are drawn."""
        guided = draw.random() < 0.5
        return {
            "steps": draw.randint(1, 12),
            "sampler": draw.choice(self.samplers),
            "guidance": 3.0 if guided else 1.0,
            "negative_prompt": _words(draw, 2) if guided and draw.random() < 0.3 else "",
        }


def _as_whole(ask: Ask) -> Ask:
    """The same in one piece."""
    body = {name: value for name, value in ask.body.items() if not name.startswith("stream")}
    return replace(ask, streams=False, body=body)


def _words(draw: random.Random, count: int) -> str:
    return " ".join(draw.choices(WORDS, k=count))


def _speaking(draw: random.Random, most: int) -> dict[str, Any]:
    """How text is chosen."""
    return {
        "temperature": draw.choice((0.0, 1.0, 1.0)),
        "top_p": draw.choice((1.0, 0.8)),
        "max_tokens": draw.randint(1, most),
    }


def _image(draw: random.Random) -> Tensor:
    height, width = draw.choice(SIZES)
    return torch.tensor(list(draw.randbytes(height * width)), dtype=torch.uint8).view(1, height, width)


def _png(pixels_CHW: Tensor) -> bytes:
    stream = io.BytesIO()
    to_image(pixels_CHW).save(stream, "PNG")
    return stream.getvalue()


def _url(pixels_CHW: Tensor) -> str:
    return "data:image/png;base64," + base64.b64encode(_png(pixels_CHW)).decode("ascii")


def _sized(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings whose size is written as the server reads it."""
    size = settings.get("size")
    plain = {name: value for name, value in settings.items() if name != "size"}
    return plain if size is None else {**plain, "size": f"{size[1]}x{size[0]}"}


def _openai(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of images under their names in OpenAI's endpoints."""
    names = {"steps": "num_inference_steps", "guidance": "guidance_scale"}
    return {names.get(name, name): value for name, value in _sized(settings).items()}


class Reading:
    """An answer as its client reads it, and what is wrong with it.

    Attributes:
        texts: Of each answer.
        images: Of each answer, uint8 [C, H, W].
        reasons: Why each ended, as the engine calls it. limit: a limit of the request or the model.
        usage: As it was told.
        is_closed: Whether the stream told that nothing follows.
        error: The code of the error that ended the stream.
        foreign: What is not of this request.
        malformed: What no answer should be.
    """

    def __init__(self, ask: Ask) -> None:
        self.ask, count = ask, ask.count
        self.texts, self.reasons = [""] * count, [""] * count
        self.images: list[list[Tensor]] = [[] for _ in range(count)]
        self.usage: dict[str, Any] = {}
        self.is_closed, self.error = False, ""
        self.foreign: list[str] = []
        self.malformed: list[str] = []
        self.pieces = 0
        self._rest = b""

    @property
    def is_complete(self) -> bool:
        return (
            self.is_closed and not self._rest and all(each not in ("", "cancelled") for each in self.reasons)
        )

    @property
    def is_handed_back(self) -> bool:
        """Whether a server that stops told so."""
        return self.error == "stopping" or (self.is_closed and "cancelled" in self.reasons)

    def feed(self, data: bytes) -> None:
        """Take bytes of a stream."""
        *whole, self._rest = (self._rest + data).split(b"\n\n")
        for piece in whole:
            lines = [line.partition(b": ") for line in piece.split(b"\n") if not line.startswith(b":")]
            found = {name.decode(): value for name, _, value in lines}
            if not found:
                continue
            self.pieces += 1
            try:
                self._piece(found.get("event", b"").decode(), found["data"])
            except (KeyError, ValueError, IndexError, TypeError, AttributeError, OSError) as error:
                self.malformed.append(f"{error!r} in {piece[:200]!r}")

    def whole(self, data: bytes) -> None:
        """Take an answer in one piece."""
        try:
            values = json.loads(data)
            self._chat_whole(values) if self.ask.kind == "chat" else self._images_whole(values)
        except (KeyError, ValueError, IndexError, TypeError, AttributeError, OSError) as error:
            self.malformed.append(f"{error!r} in {data[:200]!r}")
        self.is_closed = True

    def _piece(self, name: str, data: bytes) -> None:
        if self.is_closed:
            self.malformed.append(f"{name} {data[:80]!r} after the end")
        elif name == "error":
            self.error = json.loads(data)["error"]["code"] or "error"
        elif self.ask.kind == "native":
            self._native(name, json.loads(data))
        elif self.ask.kind == "chat":
            self._chat_chunk(data)
        else:
            self._image_event(name, json.loads(data))

    def _native(self, name: str, values: dict[str, Any]) -> None:
        if name == "text":
            self.texts[0] += values["text"]
        elif name == "image":
            self._own_image(0, values["index"], values["png"], values["recipe"], values["seed"])
        elif name == "done":
            self._end(0, values["reason"])
            self.usage, self.is_closed = values["usage"], True
        elif name not in ("image_start", "image_preview"):
            self.malformed.append(f"an event {name!r}")

    def _chat_chunk(self, data: bytes) -> None:
        if data == b"[DONE]":
            self.is_closed = True
            return
        values = json.loads(data)
        self._own_seed(values["seed"], self.ask.seed)
        self.usage = values.get("usage", {})
        for choice in values["choices"]:
            number, delta = choice["index"], choice["delta"]
            self.texts[number] += delta.get("content", "")
            for image in delta.get("images", []):
                if "partial_image_index" not in image:
                    self._chat_image(number, image)
            if choice["finish_reason"]:
                self._end(number, self._chat_reason(choice["finish_reason"]))

    def _chat_whole(self, values: dict[str, Any]) -> None:
        self._own_seed(values["seed"], self.ask.seed)
        self.usage = values["usage"]
        for choice in values["choices"]:
            number, message = choice["index"], choice["message"]
            self.texts[number] = message["content"] or ""
            for image in message["images"]:
                self._chat_image(number, image)
            self._end(number, self._chat_reason(choice["finish_reason"]))

    def _chat_reason(self, finish: str) -> str:
        return {"stop": "end", "length": "limit", "abort": "cancelled"}[finish]

    def _chat_image(self, number: int, image: dict[str, Any]) -> None:
        encoded = image["image_url"]["url"].partition(",")[2]
        with Image.open(io.BytesIO(base64.b64decode(encoded))) as opened:
            opened.load()
            recipe = json.loads(opened.text["transfusion"])  # type: ignore[attr-defined]
        self._own_image(number, image["index"], encoded, recipe, image["seed"])

    def _image_event(self, name: str, values: dict[str, Any]) -> None:
        kind = "image_generation" if self.ask.kind == "image" else "image_edit"
        number = values["index"]
        if name == f"{kind}.completed":
            self._own_image(number, 0, values["b64_json"], values["recipe"], values["seed"])
            self._end(number, "image")
            self.is_closed = all(self.reasons)
        elif name != f"{kind}.partial_image":
            self.malformed.append(f"an event {name!r}")

    def _images_whole(self, values: dict[str, Any]) -> None:
        # Of a server that stops, those that were finished.
        for image in values["data"]:
            number = image["seed"] - self.ask.seed
            self._own_image(number, 0, image["b64_json"], image["recipe"], image["seed"])
            self._end(number, "image")
        self.reasons = [reason or "cancelled" for reason in self.reasons]

    def _own_image(self, number: int, index: int, encoded: str, recipe: dict[str, Any], seed: int) -> None:
        """An image that is finished, which must be that of its recipe, and this of the request."""
        with Image.open(io.BytesIO(base64.b64decode(encoded))) as opened:
            pixels = torch.from_numpy(np.array(opened.convert("L")))[None]
        own = self.ask.seed + number
        self._own_seed(seed, own + (index << 32))
        self._own_seed(recipe["image"]["seed"], own)
        if recipe["prompt"] != self.ask.recipe_prompt:
            self.foreign.append(f"prompt {recipe['prompt']} in place of {self.ask.recipe_prompt}")
        places = {index, recipe["index"], len(self.images[number])}
        if recipe["pixels"] != pixel_digest(pixels) or len(places) > 1:
            self.malformed.append(f"image {index} of answer {number} is not that of its recipe")
        self.images[number].append(pixels)

    def _own_seed(self, seed: int, own: int) -> None:
        if seed != own:
            self.foreign.append(f"seed {seed} in place of {own}")

    def _end(self, number: int, reason: str) -> None:
        if self.reasons[number]:
            self.malformed.append(f"answer {number} ended twice")
        self.reasons[number] = "limit" if reason in ("tokens", "length") else reason


class Clients:
    """Clients of one server, and what they see.

    Args:
        server: That they ask.
        figures: That they write.
        load: What they ask.
        seed: Of the clients' own numbers, and of the sample that is kept.
        kept: How many answers are kept.
        survives: Whether the server is expected to live on. If not, a closed connection ends its client.
    """

    def __init__(
        self, server: Server, figures: Figures, load: Load, seed: int, kept: int = 0, *, survives: bool = True
    ) -> None:
        self.server, self.figures, self.load, self.seed = server, figures, load, seed
        self.survives = survives
        self.kept: list[Reading] = []
        self._most_kept, self._offered = kept, 0
        self._draw = random.Random(f"{seed} kept")
        # Answers that were asked for and have not ended, and those whose clients went away lately.
        self._asked = 0
        self._left: deque[tuple[float, int]] = deque()
        # Of answers, by how they ended, and those that nobody saw ending, surely taken or perhaps.
        self.seen: Counter[str] = Counter()
        self.surely_taken = self.perhaps_taken = 0

    async def run(self, clients: int, seconds: float) -> None:
        """So many clients for so long."""
        begin = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for number in range(clients):
                group.create_task(self._client(number, begin + seconds))
        self.figures.seconds = time.monotonic() - begin

    async def _client(self, number: int, until: float) -> None:
        draw = random.Random(f"{self.seed} {self.load.name} {number}")
        async with connected(self.server) as usual, connected(self.server, SLOW_BUFFER) as slow:
            while time.monotonic() < until:
                ask = self.load.next(draw)
                try:
                    await self._ask(slow if ask.pause else usual, ask, draw, until)
                except httpx.TransportError as error:
                    if not self.survives:
                        self.figures.counts["closed connections"] += 1
                        return
                    self.figures.note("transport errors", f"{_manner(ask)}: {error!r}")
                    self.perhaps_taken += ask.count

    async def _ask(self, http: httpx.AsyncClient, ask: Ask, draw: random.Random, until: float) -> None:
        """Ask until there is room, and look at the answer."""
        figures, begin = self.figures, time.monotonic()
        figures.counts["requests"] += 1
        figures.counts[f"asked: {_manner(ask)}"] += 1
        while True:
            self._asked += ask.count
            try:
                async with asyncio.timeout(DEADLINE):
                    status, reading, advised = await self._once(http, ask, draw)
            except TimeoutError:
                figures.note("lost answers", f"{_manner(ask)}: no end within {DEADLINE:g} s")
                self.perhaps_taken += ask.count
                return
            finally:
                self._asked -= ask.count
            if status != 429:
                break
            self._refused(ask)
            await asyncio.sleep(advised)
            if time.monotonic() > until:
                figures.counts["given up after 429"] += 1
                return
        if not ask.pause:
            figures.longest_seconds = max(figures.longest_seconds, time.monotonic() - begin)
        self._judge(ask, status, reading)

    async def _once(
        self, http: httpx.AsyncClient, ask: Ask, draw: random.Random
    ) -> tuple[int, Reading, float]:
        """Ask once: status, what was read, and the seconds after which to ask again. Status 0: the client left."""
        reading = Reading(ask)
        if not ask.streams:
            patience = None if ask.leaves is None else ask.leaves / 100
            try:
                async with asyncio.timeout(patience):
                    response = await http.post(ask.path, **ask.content)
            except TimeoutError:
                if patience is None:
                    raise
                self._leave(ask, surely=False)
                return 0, reading, 0.0
            if response.status_code == 200:
                reading.whole(response.content)
            return response.status_code, reading, float(response.headers.get("retry-after", 0))
        async with http.stream("POST", ask.path, **ask.content) as response:
            if response.status_code == 200:
                async for data in response.aiter_raw():
                    reading.feed(data)
                    if ask.leaves is not None and reading.pieces > ask.leaves and not reading.is_complete:
                        self._leave(ask, surely=True)
                        return 0, reading, 0.0
                    if ask.pause and draw.random() < PAUSES:
                        await asyncio.sleep(draw.uniform(0, ask.pause))
            return response.status_code, reading, float(response.headers.get("retry-after", 0))

    def _leave(self, ask: Ask, *, surely: bool) -> None:
        """Note that a client goes away, whose request the server surely took, or may have taken."""
        self._left.append((time.monotonic(), ask.count))
        if surely:
            self.surely_taken += ask.count
        else:
            self.perhaps_taken += ask.count

    def _refused(self, ask: Ask) -> None:
        """Note a 429, which must be due to what the clients asked for."""
        self.figures.counts["429"] += 1
        while self._left and self._left[0][0] < time.monotonic() - GHOST_SECONDS:
            self._left.popleft()
        most = self._asked + ask.count + sum(count for _, count in self._left)
        if most <= Limits().answers:
            self.figures.note("429 without need", f"{most} answers were asked for at most")

    def _judge(self, ask: Ask, status: int, reading: Reading) -> None:
        """Note what an answer is, and what is wrong with it."""
        figures = self.figures
        for text in reading.foreign:
            figures.note("foreign answers", f"{_manner(ask)}: {text}")
        for text in reading.malformed:
            figures.note("malformed answers", f"{_manner(ask)}: {text}")
        if status == 0:
            figures.counts["left"] += 1
        elif status == (200 if ask.fits else 400):
            if ask.fits and not reading.is_complete:
                how = reading.error or f"ended by {reading.reasons}"
                figures.note("lost answers", f"{_manner(ask)}: {how}")
                self.surely_taken += ask.count
            elif ask.fits:
                self._complete(ask, reading)
            else:
                figures.counts["refused as too long"] += 1
        else:
            figures.note("5xx" if status >= 500 else "other statuses", f"{_manner(ask)}: {status}")

    def _complete(self, ask: Ask, reading: Reading) -> None:
        self.figures.counts["complete"] += 1
        for number, reason in enumerate(reading.reasons):
            self.figures.counts[f"ended by {reason}"] += 1
            self.figures.counts["images"] += len(reading.images[number])
        if ask.stop:
            self.surely_taken += ask.count
        else:
            self.seen.update(reading.reasons)
        # Every answer of the run has the same chance to be kept.
        self._offered += 1
        if len(self.kept) < self._most_kept:
            self.kept.append(reading)
        elif (place := self._draw.randrange(self._offered)) < self._most_kept:
            self.kept[place] = reading


def _manner(ask: Ask) -> str:
    """What is asked, and how."""
    if not ask.fits:
        return "too long"
    slowly, leaving = " slowly" * bool(ask.pause), ", leaving" * (ask.leaves is not None)
    return f"{ask.kind}{' as events' * ask.streams}{slowly}{leaving}"


@contextlib.asynccontextmanager
async def connected(server: Server, buffer: int | None = None) -> AsyncIterator[httpx.AsyncClient]:
    """A client with connections of its own. buffer: bytes that it receives before it reads them."""
    options = [] if buffer is None else [(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)]
    transport = httpx.AsyncHTTPTransport(verify=False, socket_options=options)
    async with httpx.AsyncClient(
        base_url=server.address, transport=transport, timeout=DEADLINE, trust_env=False
    ) as http:
        yield http


def probe(port: int, ends: Connection) -> None:
    """Ask for /healthz again and again until told to end, and send the milliseconds that each took.

    None stands for one that failed.
    """
    took: list[float | None] = []
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    ends.send("ready")
    due = time.monotonic()
    while not ends.poll(max(0.0, due - time.monotonic())):
        begin = time.monotonic()
        try:
            connection.request("GET", "/healthz")
            answer = connection.getresponse()
            answer.read()
            seconds = time.monotonic() - begin
            took.append(seconds * 1e3 if answer.status == 200 else None)
        except (OSError, http.client.HTTPException):
            connection.close()
            seconds = 0.0
            took.append(None)
        due += PROBE_SECONDS
        while due < begin + seconds:
            took.append((begin + seconds - due) * 1e3)
            due += PROBE_SECONDS
    ends.send(took)


@contextlib.contextmanager
def probing(server: Server, figures: Figures) -> Iterator[None]:
    """Note how long /healthz takes meanwhile."""
    context = multiprocessing.get_context("spawn")
    mine, other = context.Pipe()
    process = context.Process(target=probe, args=(server.port, other), daemon=True)
    process.start()
    mine.recv()
    try:
        yield
    finally:
        mine.send("end")
        took = mine.recv()
        process.join()
    good = sorted(each for each in took if each is not None) or [float("inf")]
    figures.counts["failed probes"] = sum(each is None for each in took)
    figures.health_ms = {
        "probes": len(took),
        "p50": round(statistics.median(good), 2),
        "p99": round(good[int(0.99 * (len(good) - 1))], 2),
        "most": round(good[-1], 2),
    }


@contextlib.contextmanager
def counting_cores(server: Server, figures: Figures) -> Iterator[None]:
    """Note who keeps the processor busy meanwhile."""

    def spent() -> tuple[float, float, float, float]:
        # user, nice, system, idle, iowait, irq, softirq.
        times = [int(value) for value in Path("/proc/stat").read_text(encoding="ascii").split()[1:8]]
        busy = (sum(times) - times[3] - times[4]) / os.sysconf("SC_CLK_TCK")
        return time.monotonic(), server.busy_seconds(), time.process_time(), busy

    before = spent()
    yield
    seconds, of_server, of_clients, busy = (b - a for a, b in zip(before, spent(), strict=True))
    found = {"server": of_server, "clients": of_clients, "others": busy - of_server - of_clients}
    figures.cores = {name: round(value / seconds, 2) for name, value in found.items()}


async def watch_memory(server: Server, figures: Figures) -> None:
    """Note the memory of a server each second."""
    while True:
        figures.memory.append(round(server.memory_mib(), 2))
        await asyncio.sleep(1)


def growth_percent(memory: Sequence[float], seconds: float) -> float | None:
    """The maximum of the last fifth above that of the fifth after the warm-up. None: too short a run to tell."""
    fifth = seconds / 5
    warm = max(fifth, LEAST_WARM_UP)
    if warm + 2 * fifth > seconds:
        return None
    early = max(memory[int(warm) : int(warm + fifth) + 1])
    late = max(memory[int(seconds - fifth) :])
    return round((late / early - 1) * 100, 2)


async def load(server: Server, figures: Figures, scale: Scale, seed: int) -> Clients:
    """The load itself."""
    clients = Clients(server, figures, Load(seed, scale.longest_pause, "load"), seed, scale.compared)
    before = await read_metrics(server)
    watcher = asyncio.create_task(watch_memory(server, figures))
    with counting_cores(server, figures):
        await clients.run(scale.clients, scale.seconds)
    watcher.cancel()
    figures.growth_percent = growth_percent(figures.memory, scale.seconds)
    for _ in range(50):
        after = await read_metrics(server)
        figures.answers_left = after["transfusion_answers"]
        if not figures.answers_left:
            break
        await asyncio.sleep(0.1)
    count_metrics(figures, {name: value - before.get(name, 0.0) for name, value in after.items()})
    figures.disagreed = disagreed(figures.ended, clients)
    return clients


async def read_metrics(server: Server) -> dict[str, float]:
    """What the server counts."""
    async with connected(server) as http:
        return parse_metrics((await http.get("/metrics")).text)


def count_metrics(figures: Figures, found: dict[str, float]) -> None:
    """What the server counted meanwhile."""
    statuses: Counter[str] = Counter()
    for name, value in found.items():
        if ended := re.fullmatch(r'transfusion_answers_ended_total\{reason="(\w+)"\}', name):
            figures.ended[ended[1]] = int(value)
        if status := re.fullmatch(r'transfusion_requests_total\{route="/v1/.*",status="(\d+)"\}', name):
            statuses[status[1]] += int(value)
    figures.statuses = dict(sorted(statuses.items()))
    count = found["transfusion_tick_seconds_count"]
    mean = found["transfusion_tick_seconds_sum"] / max(count, 1)
    figures.ticks = {"count": count, "mean_ms": round(mean * 1e3, 2)}


def parse_metrics(text: str) -> dict[str, float]:
    """Values by names and labels."""
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


def disagreed(ended: dict[str, int], clients: Clients) -> int:
    """How many answers ended otherwise than clients saw. Of those that nobody saw ending, any reason is right."""
    told = {
        "end": ended.get("end", 0),
        "image": ended.get("image", 0),
        "limit": ended.get("tokens", 0) + ended.get("length", 0),
    }
    missing = sum(max(clients.seen[reason] - count, 0) for reason, count in told.items())
    seen = clients.seen.total() + clients.surely_taken
    total = sum(ended.values())
    return (
        missing + ended.get("failed", 0) + max(seen - total, 0) + max(total - seen - clients.perhaps_taken, 0)
    )


async def first_bytes(server: Server, figures: Figures, scale: Scale, seed: int) -> None:
    """Time the first byte, and the first text, of the streams of an idle server."""
    draw = random.Random(f"{seed} first")
    async with connected(server) as http:
        for turn in range(-2, scale.first_bytes):
            for kind in ("native", "chat"):
                byte, text = await _first(http, _short(draw, kind, turn + 2))
                # The first of a process are slower.
                if turn >= 0:
                    figures.first_byte_ms.setdefault(kind, []).append(round(byte * 1e3, 2))
                    figures.first_text_ms.setdefault(kind, []).append(round(text * 1e3, 2))


def _short(draw: random.Random, kind: Kind, seed: int) -> Ask:
    """A short text."""
    prompt = f"{_words(draw, 3)} first {seed}"
    settings = {"temperature": 1.0, "max_tokens": 8, "max_images": 0}
    asked = {"prompt": prompt} if kind == "native" else {"messages": [{"role": "user", "content": prompt}]}
    body = {**asked, **settings, "seed": seed, **({"stream": True} if kind == "chat" else {})}
    return Ask(kind=kind, prompt=[prompt], seed=seed, count=1, settings=settings, streams=True, body=body)


async def _first(http: httpx.AsyncClient, ask: Ask) -> tuple[float, float]:
    """Seconds until the first byte and the first text of a stream. A stream without a text has its end."""
    begin, byte, text, reading = time.monotonic(), 0.0, 0.0, Reading(ask)
    async with http.stream("POST", ask.path, **ask.content) as response:
        response.raise_for_status()
        async for data in response.aiter_raw():
            now = time.monotonic() - begin
            reading.feed(data)
            byte = byte or now
            if not text and (reading.texts[0] or reading.is_closed):
                text = now
    await asyncio.sleep(0.1)
    return byte, text


async def killed(server: Server, figures: Figures, scale: Scale, seed: int) -> None:
    """Kill the server in the middle of a load. Clients may see closed connections, and nothing worse."""
    seen = Figures()
    clients = Clients(server, seen, Load(seed, scale.longest_pause, "killed"), seed, survives=False)
    running = asyncio.create_task(clients.run(scale.clients, scale.short_seconds))
    await asyncio.sleep(scale.short_seconds / 2)
    server.process.send_signal(signal.SIGKILL)
    await running
    figures.killed["complete before"] = seen.counts["complete"]
    figures.killed["closed connections"] = seen.counts["closed connections"]
    worse = ("lost answers", "foreign answers", "malformed answers", "5xx", "other statuses")
    figures.killed["worse"] = sum(seen.counts[name] for name in worse)
    figures.examples += [f"killed: {each}" for each in seen.examples]


async def stopped(server: Server, figures: Figures, scale: Scale, seed: int) -> None:
    """Tell the server to stop under load. What is under way ends, or is handed back."""
    asks = Load(seed, scale.longest_pause, "stopped")
    draw = random.Random(f"{seed} stopped")
    readings = [Reading(asks.long(draw)) for _ in range(scale.clients)]
    running = [asyncio.create_task(_hold(server, reading)) for reading in readings]
    # Until the server has all of them.
    wanted = sum(reading.ask.count for reading in readings)
    for _ in range(100):
        found = await read_metrics(server)
        ended = sum(value for name, value in found.items() if "answers_ended_total{" in name)
        if found["transfusion_answers"] + ended >= wanted:
            break
        await asyncio.sleep(0.05)
    begin = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    await asyncio.sleep(min(0.5, scale.grace / 2))
    async with connected(server) as http:
        try:
            figures.newcomer = str((await http.get("/readyz")).status_code)
        except httpx.TransportError as error:
            figures.newcomer = type(error).__name__
    for reading, outcome in zip(readings, await asyncio.gather(*running), strict=True):
        figures.stopped[outcome] += 1
        if outcome not in ("ended", "handed back"):
            figures.examples.append(f"stopped: {_manner(reading.ask)}: {outcome}"[:400])
    with contextlib.suppress(subprocess.TimeoutExpired):
        await asyncio.to_thread(server.process.wait, scale.grace + END_SECONDS + 5)
    figures.stop_seconds = round(time.monotonic() - begin, 2)
    figures.exit_code = server.process.poll()


async def _hold(server: Server, reading: Reading) -> str:
    """Ask, and tell how that ends while the server is told to stop."""
    ask = reading.ask
    async with connected(server) as http:
        try:
            async with http.stream("POST", ask.path, **ask.content) as response:
                if response.status_code == 200 and ask.streams:
                    async for data in response.aiter_raw():
                        reading.feed(data)
                elif response.status_code == 200:
                    reading.whole(await response.aread())
                elif response.status_code == 503:
                    return "handed back"
                else:
                    return f"status {response.status_code}"
        except httpx.TransportError as error:
            return repr(error)
    if reading.foreign or reading.malformed:
        return f"wrong: {[*reading.foreign, *reading.malformed]}"
    if reading.is_complete:
        return "ended"
    return "handed back" if reading.is_handed_back else f"cut off, {reading.reasons} {reading.error}"


def difference(pipeline: Pipeline, reading: Reading) -> str:
    """How an answer differs from that of the same request alone. Empty: not at all."""
    ask = reading.ask
    if ask.draws:
        found = pipeline.sample([ask.prompt], per_prompt=ask.count, seed=ask.seed, **ask.settings)
        return next(
            (
                f"image {number}: {gap}"
                for number, image in enumerate(found)
                if (gap := _image_gap(reading.images[number], [image.pixels]))
            ),
            "",
        )
    tokens, done = 0, None
    for number in range(ask.count):
        parts: list[str | Tensor] = []
        for event in pipeline.stream(ask.prompt, seed=ask.seed + number, **ask.settings):
            extend(parts, event)
            done = event if isinstance(event, Done) else done
        assert done is not None
        text = "".join(part for part in parts if isinstance(part, str))
        reason = "limit" if done.reason in ("tokens", "length") else done.reason
        if ask.stop and ask.stop in text:
            text, reason = text.partition(ask.stop)[0], "end"
        if text != reading.texts[number] or reason != reading.reasons[number]:
            return f"{reading.texts[number]!r} by {reading.reasons[number]} in place of {text!r} by {reason}"
        drawn = [part for part in parts if isinstance(part, Tensor)]
        if gap := _image_gap(reading.images[number], drawn):
            return gap
        tokens += done.tokens
    names = ("prompt_positions", "tokens") if ask.kind == "native" else ("prompt_tokens", "completion_tokens")
    told = tuple(reading.usage.get(name) for name in names)
    assert done is not None
    if not ask.stop and told != (done.prompt_positions, tokens):
        return f"usage {reading.usage} in place of {done.prompt_positions} and {tokens}"
    return ""


def _image_gap(mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> str:
    """How images differ by more than one level of 255."""
    if [each.shape for each in mine] != [each.shape for each in theirs]:
        return f"{len(mine)} images in place of {len(theirs)}, or of another size"
    gaps = [int((a.int() - b.int()).abs().max()) for a, b in zip(mine, theirs, strict=True)]
    return f"images differ by {gaps} levels" if max(gaps, default=0) > 1 else ""


def compare(folder: Path, readings: Sequence[Reading], figures: Figures) -> None:
    """Compare answers with those of this process."""
    pipeline = Pipeline.from_export(folder, device="cpu")
    for reading in readings:
        figures.compared += 1
        if gap := difference(pipeline, reading):
            figures.differing += 1
            figures.examples.append(f"differs: {_manner(reading.ask)}: {gap}"[:400])


def run(folder: Path, scale: Scale, seed: int = 0) -> Figures:
    """All of it, with the files of a folder that is empty."""
    figures, model = Figures(), folder / "model"
    make_export(model)
    with contextlib.ExitStack() as stack:
        first = Server(model, folder / "first.log", grace=scale.grace)
        stack.callback(first.close)
        figures.start_seconds.append(round(first.wait_until_ready(), 2))
        asyncio.run(first_bytes(first, figures, scale, seed))
        with probing(first, figures):
            clients = asyncio.run(load(first, figures, scale, seed))
        asyncio.run(killed(first, figures, scale, seed))
        first.close()
        second = Server(model, folder / "second.log", grace=scale.grace, port=first.port)
        stack.callback(second.close)
        figures.start_seconds.append(round(second.wait_until_ready(), 2))
        asyncio.run(stopped(second, figures, scale, seed))
        for server in (first, second):
            figures.log_errors += len(re.findall(r"^Traceback|^ERROR", server.text(), re.MULTILINE))
    compare(model, clients.kept, figures)
    return figures


def bars(figures: Figures, scale: Scale) -> list[Bar]:
    """What a run must show."""
    counts = figures.counts
    none = (
        "lost answers",
        "foreign answers",
        "malformed answers",
        "5xx",
        "other statuses",
        "transport errors",
        "429 without need",
        "failed probes",
    )
    growth = figures.growth_percent
    medians = {
        name: max(statistics.median(each) for each in found.values())
        for name, found in ((FIRST_BYTE, figures.first_byte_ms), (FIRST_TEXT, figures.first_text_ms))
    }
    handed_back = ("ended", "handed back")
    wrong = sum(count for outcome, count in figures.stopped.items() if outcome not in handed_back)
    return [
        Bar("answers that are complete", counts["complete"], 1, least=True),
        *(Bar(name, counts[name], 0) for name in none),
        Bar(HEALTH, figures.health_ms["p99"], HEALTH_BAR_MS),
        *([] if growth is None else [Bar(GROWTH, growth, GROWTH_BAR_PERCENT)]),
        Bar("answers left in /metrics", figures.answers_left, 0),
        Bar("answers that /metrics counts otherwise", figures.disagreed, 0),
        Bar("errors in the log", figures.log_errors, 0),
        Bar("answers compared", figures.compared, 1, least=True),
        Bar("answers that differ from the same alone", figures.differing, 0),
        *(Bar(name, median, FIRST_BYTE_BAR_MS) for name, median in medians.items()),
        Bar("closed connections of a killed server", figures.killed["closed connections"], 1, least=True),
        Bar("worse than closed connections", figures.killed["worse"], 0),
        Bar(START, max(figures.start_seconds), START_BAR),
        Bar("handed back by a server that stops", figures.stopped["handed back"], 1, least=True),
        Bar("neither ended nor handed back", wrong, 0),
        Bar(
            "exit code of a server that stops",
            abs(255 if figures.exit_code is None else figures.exit_code),
            0,
        ),
        Bar("seconds until it ends", figures.stop_seconds, scale.grace + END_SECONDS),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    scale = Scale(clients=options.clients, seconds=options.seconds)
    with tempfile.TemporaryDirectory() as folder:
        # So that the server does not outlive this process.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(MISSED))
        figures = run(Path(folder), scale, options.seed)
    judged = bars(figures, scale)
    record = record_head(torch.device("cpu")) | {
        "seed": options.seed,
        "scale": asdict(scale),
        "load": {"kinds": KINDS, "leaves": LEAVES, "slow": SLOW, "model": NETWORK},
        "bars": [bar._asdict() for bar in judged],
        "figures": {each.name: getattr(figures, each.name) for each in fields(figures)}
        | {"counts": dict(sorted(figures.counts.items()))},
        "missed": [str(bar) for bar in judged if bar.is_missed],
    }
    write_json(record, options.out)
    print("\n".join(map(str, judged)))
    print("\n".join(figures.examples))
    print(", ".join(f"{name} {count}" for name, count in sorted(figures.counts.items())))
    for name in (
        "health_ms",
        "cores",
        "ended",
        "statuses",
        "ticks",
        "start_seconds",
        "killed",
        "stopped",
        "newcomer",
    ):
        print(f"{name}: {getattr(figures, name)}")
    return MISSED if record["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())
