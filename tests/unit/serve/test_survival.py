"""Clients that go away, too many of them, an engine that fails, and a server that is told to stop."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch

from transfusion.generate import Done, ImagePreview, Request, TextDelta
from transfusion.serve.endpoints.stream import EventStream
from transfusion.serve.limits import Limits
from transfusion.serve.metrics import Metrics
from transfusion.serve.worker import Answers

from .conftest import PATIENCE, Live, events_of, slow_down, wait_for

LONG = {"prompt": "one", "max_tokens": 240, "max_images": 0}


def posted(live: Live, path: str, body: Any) -> socket.socket:
    """A connection that has sent a request."""
    connection = socket.create_connection(("127.0.0.1", int(live.url.rpartition(":")[2])))
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


@pytest.mark.parametrize("path", ["/v1/generate", "/v1/chat/completions", "/v1/images/generations"])
def test_a_client_that_goes_away_frees_its_place_within_two_ticks(live: Live, path: str) -> None:
    slow_down(live)
    bodies: dict[str, Any] = {
        "/v1/generate": LONG,
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "one"}], "max_tokens": 240},
        "/v1/images/generations": {"prompt": "one", "num_inference_steps": 200},
    }
    connection = posted(live, path, bodies[path])
    wait_for(lambda: live.worker.ticks >= 3)
    before = live.worker.ticks
    connection.close()
    wait_for(lambda: not live.worker._places)
    assert live.worker.ticks - before <= 2
    metrics = live.http.get("/metrics").text
    assert 'transfusion_answers_ended_total{reason="cancelled"} 1.0' in metrics
    assert re.search(r'requests_total\{route="/v1/[^"]*",status="5', metrics) is None
    wait_for(lambda: live.worker._engine.is_idle)
    kept = sum(len(known.row.pages) for known in live.worker._engine._kept)
    assert live.worker._engine.cache.free_pages + kept == live.worker._engine.pages


def test_one_request_too_many_is_refused_and_told_when_to_come_again(serve: Callable[..., Live]) -> None:
    live = serve(limits=Limits(running=1, waiting=1))
    slow_down(live)
    held = [posted(live, "/v1/generate", LONG) for _ in range(2)]
    wait_for(lambda: len(live.worker._places) == 2)
    refused = live.http.post("/v1/generate", json=LONG)
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"] == "overloaded"
    assert live.http.get("/readyz").json() == {"status": "full"} and live.http.get("/healthz").is_success
    held[0].close()
    wait_for(lambda: len(live.worker._places) == 1)
    assert live.http.get("/readyz").json() == {"status": "ready"}
    # All images of a request have a place, or none has.
    assert live.http.post("/v1/images/generations", json={"prompt": "one", "n": 2}).status_code == 429
    held[1].close()
    wait_for(lambda: not live.worker._places)
    assert live.http.post("/v1/generate", json={**LONG, "max_tokens": 2}).is_success


def test_an_engine_that_fails_fails_its_answers_and_no_later_one(
    live: Live, caplog: pytest.LogCaptureFixture
) -> None:
    slow_down(live, 0.02)
    engine, tick = live.worker._engine, live.worker._engine.tick

    def fail() -> Any:
        if live.worker.ticks > 5:
            raise RuntimeError("secret inner words")
        return tick()

    engine.tick = fail  # type: ignore[method-assign]
    with ThreadPoolExecutor() as pool:
        whole = pool.submit(
            live.http.post,
            "/v1/chat/completions",
            json={"messages": [{"role": "user", "content": "two"}], "max_tokens": 200},
        )
        with live.http.stream("POST", "/v1/generate", json=LONG) as answer:
            *told, (name, error) = events_of(answer)
    assert told and name == "error" and error["error"]["code"] == "engine_failed"
    assert whole.result().status_code == 500 and "secret" not in whole.result().text
    assert live.worker._engine is not engine
    with live.http.stream("POST", "/v1/generate", json={**LONG, "max_tokens": 2}) as answer:
        *_, (name, done) = events_of(answer)
    assert name == "done" and done["usage"]["tokens"] == 2
    assert live.http.get("/healthz").is_success
    assert 'transfusion_answers_ended_total{reason="failed"} 2.0' in live.http.get("/metrics").text


def test_a_server_whose_engine_always_fails_ends(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> Any:
        raise RuntimeError("no")

    monkeypatch.setattr(type(live.worker._engine), "tick", fail)
    for _ in range(3):
        assert live.http.get("/healthz").is_success
        assert "engine_failed" in live.http.post("/v1/generate", json=LONG).text
    # So that whoever looks after the server starts it again.
    wait_for(lambda: not live._thread.is_alive())
    assert live.worker.is_broken


def test_a_thread_that_ends_leaves_nobody_waiting(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    def end(_: object) -> Any:
        raise SystemExit

    slow_down(live)
    with live.http.stream("POST", "/v1/generate", json=LONG) as answer:
        events = events_of(answer)
        next(events)
        live.worker._asked.put(lambda: end(None))
        *_, (name, error) = events
    assert name == "error" and error["error"]["code"] == "engine_failed"
    wait_for(lambda: not live._thread.is_alive())


def test_calls_do_not_halt_answers(live: Live) -> None:
    """One call before each tick, however many ask."""
    slow_down(live, 0.01)

    async def ask() -> int:
        before = live.worker.ticks
        for _ in range(20):
            await live.worker.call(lambda: time.sleep(0.01))
        return live.worker.ticks - before

    with live.http.stream("POST", "/v1/generate", json=LONG) as answer:
        events = events_of(answer)
        next(events)
        asked = [asyncio.run_coroutine_threadsafe(ask(), live.worker._loop) for _ in range(4)]  # type: ignore[arg-type]
        assert min(each.result(PATIENCE) for each in asked) >= 15


def test_what_runs_is_finished_when_the_server_stops(serve: Callable[..., Live]) -> None:
    live = serve(grace=PATIENCE)
    slow_down(live, 0.01)
    with live.http.stream("POST", "/v1/generate", json={**LONG, "max_tokens": 60}) as answer:
        events = events_of(answer)
        next(events)
        live.server.should_exit = True
        *_, (name, done) = events
    assert (name, done["reason"], done["usage"]["tokens"]) == ("done", "tokens", 60)
    wait_for(lambda: not live._thread.is_alive())
    with pytest.raises(httpx.ConnectError):
        httpx.post(f"{live.url}/v1/generate", json=LONG)


def test_what_is_not_finished_in_time_is_handed_back(serve: Callable[..., Live]) -> None:
    live = serve(grace=0.3)
    slow_down(live)
    chat = {"messages": [{"role": "user", "content": "one"}], "max_tokens": 240}
    with ThreadPoolExecutor() as pool:
        clients = [httpx.Client(base_url=live.url, timeout=PATIENCE) for _ in range(4)]
        streamed = pool.submit(clients[0].post, "/v1/chat/completions", json={**chat, "stream": True})
        whole = pool.submit(clients[1].post, "/v1/chat/completions", json=chat)
        image = pool.submit(
            clients[2].post, "/v1/images/generations", json={"prompt": "one", "num_inference_steps": 200}
        )
        drawn = pool.submit(
            clients[3].post,
            "/v1/images/generations",
            json={"prompt": "one", "num_inference_steps": 200, "stream": True},
        )
        wait_for(lambda: live.worker.ticks > 3)
        live.server.should_exit = True
        lines = [line for line in streamed.result().text.split("\n\n") if line]
        assert json.loads(lines[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "abort"
        assert lines[-1] == "data: [DONE]"
        (choice,) = whole.result().json()["choices"]
        assert choice["finish_reason"] == "abort" and choice["message"]["content"]
        assert image.result().status_code == 503 and image.result().headers["retry-after"]
        assert "event: error" in drawn.result().text and "stopping" in drawn.result().text
    wait_for(lambda: not live._thread.is_alive())


def test_other_requests_are_answered_while_large_ones_are_read(live: Live) -> None:
    body = {"prompt": "one " * 2_000_000}
    seconds: list[float] = []
    ends = threading.Event()

    def probe() -> None:
        with httpx.Client(base_url=live.url) as client:
            while not ends.is_set():
                begin = time.monotonic()
                client.get("/healthz")
                seconds.append(time.monotonic() - begin)

    thread = threading.Thread(target=probe)
    thread.start()
    wait_for(lambda: seconds)
    answer = live.http.post("/v1/images/generations", json=body)
    ends.set()
    thread.join()
    assert answer.status_code == 400 and "8,000,000 letters" in answer.json()["error"]["message"]
    assert max(seconds) < 2.0


async def answers_over(worker: Any, count: int = 1) -> Answers:
    return Answers(worker, [Request(prompt=["one"])] * count)


def test_a_slow_reader_misses_previews_and_nothing_else() -> None:
    pixels = torch.zeros(1, 8, 8, dtype=torch.uint8)

    async def check() -> None:
        answers = await answers_over(None, 2)
        one, other = answers.places
        told = [
            (one, None),
            (other, None),
            (one, TextDelta("a")),
            *((one, ImagePreview(0, step, pixels)) for step in (1, 2, 3, 4)),
            (other, TextDelta("b")),
            (one, ImagePreview(0, 5, pixels)),
            (one, TextDelta("c")),
            (one, ImagePreview(1, 1, pixels)),
            (one, Done("end", 1, 1, 0)),
            (other, Done("end", 1, 1, 0)),
        ]
        for place, event in told:
            answers.tell(place, event)
        found = [(index, getattr(event, "step", None)) async for index, event in answers]
        # As many as `partial_images` can ask for are there, however late they are read.
        previews = [(0, 1), (0, 2), (0, 5)]
        assert found == [(0, None), *previews, (1, None), (0, None), (0, 1), (0, None), (1, None)]

    asyncio.run(check())


def test_a_stream_that_waits_is_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transfusion.serve.endpoints.stream._HEARTBEAT", 0.02)
    sent: list[bytes] = []

    async def pieces() -> Any:
        yield b"data: one\n\n"
        await asyncio.sleep(0.1)
        yield b"data: two\n\n"

    async def never() -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))

    class Idle:
        def cancel(self, place: object) -> None:
            pass

    async def check() -> None:
        await EventStream(await answers_over(Idle()), pieces(), Metrics())({"type": "http"}, never, send)

    asyncio.run(check())
    assert sent[1] == b"data: one\n\n" and sent[-2:] == [b"data: two\n\n", b""]
    assert sent[2:-2] and set(sent[2:-2]) == {b":\n\n"}


def test_a_request_that_is_refused_takes_no_place(live: Live) -> None:
    refused = live.http.post("/v1/images/generations", json={"prompt": "one " * 150, "n": 2})
    assert refused.status_code == 400
    full = live.http.post("/v1/generate", json={**LONG, "prompt": "one two " * 300})
    assert full.status_code == 400 and "leaves no room" in full.json()["error"]["message"]
    wait_for(lambda: not live.worker._places)
