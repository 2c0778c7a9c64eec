"""Who may call, how much may be sent, and what is told to browsers and the log."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from transfusion.serve import connection
from transfusion.serve.limits import Limits

from .conftest import PATIENCE, Live, squares, url_of, wait_for

TOKEN = "correct-horse-battery-staple"
BODY = {"prompt": "a secret wish", "num_inference_steps": 1}


def raw(live: Live, data: bytes) -> bytes:
    """What comes back for these bytes, to the end of the connection or of the first answer."""
    with socket.create_connection(("127.0.0.1", int(live.url.rpartition(":")[2])), PATIENCE) as connection:
        connection.sendall(data)
        found = b""
        while b"\r\n\r\n" not in found or b"}" not in found:
            piece = connection.recv(1 << 16)
            if not piece:
                break
            found += piece
        return found


@pytest.mark.parametrize(
    "given",
    [
        None,
        "",
        "Bearer",
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        f"Basic {TOKEN}",
        "Bearer \u00fc".encode("latin-1"),
    ],
)
def test_a_server_with_a_token_answers_nobody_without_it(serve: Callable[..., Live], given: Any) -> None:
    live = serve(token=TOKEN)
    headers = {} if given is None else {"Authorization": given}
    for path in ("/v1/models", "/v1/schema", "/metrics", "/openapi.json", "/v1/none"):
        refused = live.http.get(path, headers=headers)
        assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
        assert refused.json()["error"]["code"] == "invalid_api_key"
    assert live.http.post("/v1/images/generations", json=BODY, headers=headers).status_code == 401
    assert live.http.get("/healthz", headers=headers).is_success and live.http.get("/readyz").is_success


def test_the_client_sends_the_token(serve: Callable[..., Live]) -> None:
    live = serve(token=TOKEN)
    assert live.client.images.generate(prompt="one", extra_body={"num_inference_steps": 1}).data
    # With a token, any name of the server will do.
    headers = {"Authorization": f"bearer {TOKEN}", "Host": "example.org"}
    assert live.http.get("/v1/models", headers=headers).is_success


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "localhost.evil.example", ""])
def test_a_name_of_elsewhere_does_not_reach_a_server_without_a_token(live: Live, host: str) -> None:
    refused = live.http.get("/v1/models", headers={"Host": host})
    assert refused.status_code == 403 and refused.json()["error"]["code"] == "foreign_origin"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1:1", "[::1]", "[::1]:8000"])
def test_names_of_this_machine_reach_it(live: Live, host: str) -> None:
    assert live.http.get("/v1/models", headers={"Host": host}).is_success


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:1", "localhost:8000"])
def test_pages_of_others_may_not_call(live: Live, origin: str) -> None:
    headers = (
        {"Origin": origin, "Host": "localhost:8000"} if origin != "localhost:8000" else {"Origin": origin}
    )
    assert live.http.post("/v1/images/generations", json=BODY, headers=headers).status_code == 403
    own = {"Origin": "http://localhost:8000", "Host": "localhost:8000"}
    assert live.http.post("/v1/images/generations", json=BODY, headers=own).is_success


def test_every_answer_has_the_headers_that_keep_a_page_safe(live: Live) -> None:
    answers = [live.http.get(path) for path in ("/healthz", "/v1/none", "/v1/schema")]
    answers.append(live.http.post("/v1/generate", json={"prompt": "one", "max_tokens": 1}))
    answers.append(live.http.get("/v1/models", headers={"Host": "evil.example"}))
    for answer in answers:
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy and "http" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff" and "server" not in answer.headers
        assert "access-control-allow-origin" not in answer.headers


def test_a_body_over_the_limit_is_refused_before_it_is_read(serve: Callable[..., Live]) -> None:
    live = serve(limits=Limits(body_bytes=1000))
    head = b"POST /v1/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    announced = raw(live, head + b"Content-Length: 1001\r\n\r\n")
    assert announced.startswith(b"HTTP/1.1 413") and b"1,000 bytes" in announced
    chunk = b"400\r\n" + b" " * 0x400 + b"\r\n"
    chunked = raw(live, head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk)
    assert chunked.startswith(b"HTTP/1.1 413")
    assert live.http.post("/v1/generate", json={"prompt": "one", "max_tokens": 1}).is_success


def test_a_body_that_does_not_come_is_not_waited_for(serve: Callable[..., Live]) -> None:
    live = serve(limits=Limits(body_seconds=0.1))
    head = b"POST /v1/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    assert raw(live, head + b"Content-Length: 100\r\n\r\n{").startswith(b"HTTP/1.1 408")


def test_prompts_are_not_in_the_log_unless_asked(
    serve: Callable[..., Live], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transfusion"), "propagate", True)
    caplog.set_level(logging.INFO)
    live = serve()
    live.http.post("/v1/images/generations", json=BODY)
    live.http.post("/v1/images/generations", json={**BODY, "num_inference_steps": 0})
    live.http.post("/v1/images/generations", json={**BODY, "prompt": "a secret wish " * 1000})
    assert "secret" not in caplog.text and "POST /v1/images/generations 200" in caplog.text
    other = serve(logs_prompts=True)
    other.http.post("/v1/images/generations", json=BODY)
    assert "prompt: a secret wish" in caplog.text


def test_limits_are_those_that_the_schema_tells(serve: Callable[..., Live]) -> None:
    live = serve(limits=Limits(steps=4, images=2, tokens=9, prompt_images=1))
    schema = live.http.get("/v1/schema").json()
    assert schema["limits"]["steps"] == 4 and schema["sizes"] == ["8x8"] and schema["model"] == "small"
    fields = schema["bodies"]["ImagesBody"]["properties"]
    assert fields["num_inference_steps"]["maximum"] == 4 and fields["n"]["maximum"] == 2
    refused = {
        "/v1/images/generations": [{"num_inference_steps": 5}, {"n": 3}],
        "/v1/generate": [
            {"max_tokens": 10},
            {"max_images": 3},
            {"prompt": [{"image": url} for url in map(url_of, squares(2))]},
        ],
    }
    for path, bodies in refused.items():
        for body in bodies:
            assert live.http.post(path, json={"prompt": "one", **body}).status_code == 400, body


def test_bodies_of_all_requests_have_a_limit(serve: Callable[..., Live]) -> None:
    live = serve(limits=Limits(held_bytes=3000))
    head = b"POST /v1/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    port = int(live.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as held:
        held.sendall(head + b"Content-Length: 2999\r\n\r\n" + b" " * 2500)
        wait_for(lambda: live.http.post("/v1/generate", content=b" " * 1000).status_code == 429)
    wait_for(lambda: live.http.post("/v1/generate", json={"prompt": "one", "max_tokens": 1}).is_success)


def test_a_head_that_does_not_come_is_not_waited_for(
    serve: Callable[..., Live], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.1)
    live = serve()
    for sent in (b"", b"GET /healthz HT", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\nGET /"):
        with socket.create_connection(("127.0.0.1", int(live.url.rpartition(":")[2]))) as held:
            held.sendall(sent)
            held.settimeout(PATIENCE)
            while held.recv(1 << 16):
                pass


def test_a_client_that_reads_nothing_is_left(
    serve: Callable[..., Live], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "SWEEP_SECONDS", 0.2)
    live = serve()
    with socket.create_connection(("127.0.0.1", int(live.url.rpartition(":")[2]))) as held:
        # More than the buffers of both sides take, of which nothing is read.
        held.sendall(b"GET /v1/schema HTTP/1.1\r\nHost: localhost\r\n\r\n" * 400)
        connections = live.server.server_state.connections
        wait_for(lambda: any(each.transport.get_write_buffer_size() for each in connections))
        wait_for(lambda: not connections)


def test_a_path_that_is_none_and_a_method_that_is_none(live: Live) -> None:
    for method, path, status in (
        ("GET", "/none", 404),
        ("GET", "/v1/generate", 405),
        ("PUT", "/v1/models", 405),
    ):
        refused = httpx.request(method, live.url + path)
        assert refused.status_code == status and set(refused.json()["error"]) == {
            "message",
            "type",
            "param",
            "code",
        }
