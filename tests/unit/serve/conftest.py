"""A server in a thread of this process, over the small talkative model, and the official client."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from openai import OpenAI
from PIL import Image
from torch import Tensor

from transfusion.data.sounds.files import as_wav
from transfusion.generate import Pipeline, to_image
from transfusion.serve.connection import bind
from transfusion.serve.server import Server, ServeSettings, build_context

SPEECH: dict[str, Any] = {
    "name": "speech", "kind": "mel", "shapes": ["1x4096", "1x2048"], "patch": "1x1024", "scale": 0.3, "shift": -6.0,
    "diffusion": {"prediction": "flow"},
}  # fmt: skip
TRACE: dict[str, Any] = {
    "name": "trace", "channels": 2, "shapes": ["1x4"], "patch": "1x2", "diffusion": {"prediction": "flow"},
}  # fmt: skip
# As long as a server of another test may keep the cores busy.
PATIENCE = 30.0


class Live:
    """A server that runs in a thread."""

    def __init__(self, pipeline: Pipeline, token: str | None = None, **settings: Any) -> None:
        self.pipeline = pipeline
        self.settings = ServeSettings(cache_gb=0.1, **settings)
        self.context = build_context(pipeline, "small", self.settings)
        self.worker = self.context.worker
        self.server = Server(self.context, token, self.settings.grace)
        self._listener = bind("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self.server.run, args=([self._listener],), daemon=True)
        self._thread.start()
        wait_for(lambda: self.server.started)
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE)
        self.client = OpenAI(
            base_url=f"{self.url}/v1", api_key=token or "none", max_retries=0, timeout=PATIENCE
        )

    def stop(self) -> None:
        """Tell the server to stop, as a signal does, and wait for its end."""
        self.server.should_exit = True
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        self._listener.close()


def wait_for(holds: Callable[[], object]) -> None:
    """Until something holds."""
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.002)


@pytest.fixture
def serve(build_pipeline: Callable[..., Pipeline]) -> Iterator[Callable[..., Live]]:
    """serve(pipeline=, token=, limits=, ...) -> a running server, stopped at the end."""
    with contextlib.ExitStack() as stack:

        def start(pipeline: Pipeline | None = None, **settings: Any) -> Live:
            live = Live(pipeline or build_pipeline(), **settings)
            stack.callback(live.stop)
            return live

        yield start


@pytest.fixture
def live(serve: Callable[..., Live]) -> Live:
    return serve()


@pytest.fixture
def sounding(serve: Callable[..., Live], build_pipeline: Callable[..., Pipeline]) -> Live:
    """Says some letters, begins sounds and traces by itself where it may, and ends by itself."""
    for name in ("soundfile", "soxr"):
        pytest.importorskip(name, reason=f"{name} is not installed (extra: audio)")
    return serve(build_pipeline(media=2.0, end=-1.0, modalities=[SPEECH, TRACE]))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a screen, as the system has it. While it is there, this thread can run no other event loop."""
    sync = pytest.importorskip("playwright.sync_api", reason="no playwright; pip install playwright")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium; apt-get install chromium")
    with sync.sync_playwright() as started:
        # Root has no sandbox.
        chromium = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def slow_down(live: Live, seconds: float = 0.05) -> None:
    """Let each tick take so long."""
    engine = live.worker._engine
    tick = engine.tick

    def slow() -> Any:
        time.sleep(seconds)
        return tick()

    engine.tick = slow  # type: ignore[method-assign]


def events_of(answer: httpx.Response) -> Iterator[tuple[str, Any]]:
    """Names and contents of the events of a stream."""
    name = ""
    for line in answer.iter_lines():
        kind, _, value = line.partition(": ")
        if kind == "event":
            name = value
        elif kind == "data":
            yield name, value if value == "[DONE]" else json.loads(value)


def pixels_of(encoded: str) -> Tensor:
    """uint8 [1, H, W] of base64 or of a data URL."""
    data = base64.b64decode(encoded.rpartition(",")[2])
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("L")))[None]


def file_of(pixels_CHW: Tensor) -> bytes:
    """A PNG."""
    stream = io.BytesIO()
    to_image(pixels_CHW).save(stream, "PNG")
    return stream.getvalue()


def url_of(pixels_CHW: Tensor) -> str:
    """A data URL."""
    return "data:image/png;base64," + base64.b64encode(file_of(pixels_CHW)).decode()


def wav(samples: int = 2000, hertz: int = 220) -> bytes:
    """A tone of so many samples at 16 kHz."""
    return as_wav((np.sin(np.arange(samples) * hertz / 2546) / 2).astype(np.float32))


def file_url(data: bytes, media_type: str = "audio/wav") -> str:
    """A data URL."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def squares(count: int, side: int = 8) -> list[Tensor]:
    """Images uint8 [1, side, side], no two alike."""
    generator = torch.Generator().manual_seed(0)
    return list(torch.randint(256, (count, 1, side, side), generator=generator, dtype=torch.uint8))


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two images agree as far as company allows: one level of 255."""
    return one.shape == other.shape and int((one.int() - other.int()).abs().max()) <= 1
