"""The command line of the server, and its process from the start to the end."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from transfusion.cli import main, serving
from transfusion.errors import UserError
from transfusion.generate import Pipeline
from transfusion.serve.connection import bind
from transfusion.serve.guard import read_token
from transfusion.serve.memory import cache_pages

from .conftest import PATIENCE, wait_for


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["transfusion", "serve", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_what_cannot_be_served_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def told(*arguments: object) -> str:
        message = refused(monkeypatch, capsys, tmp_path / "none", *arguments)
        assert message.count("\n") == 1
        return message

    assert "--token-file" in told("--host", "0.0.0.0")
    weak = tmp_path / "weak"
    for content in ("short", "", "with a space in it, though long", "\u00fc" * 20):
        weak.write_text(content, encoding="utf-8")
        assert "openssl rand" in told("--token-file", weak)
    assert "cannot read" in told("--token-file", tmp_path / "missing")
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        assert "choose another --port" in told("--port", taken.getsockname()[1])
    assert "cannot listen on no.such.host" in told("--host", "no.such.host", "--token-file", _token(tmp_path))
    assert "none" in told("--port", 0)


def _token(folder: Path) -> Path:
    path = folder / "token"
    path.write_text("0123456789abcdef0123\n")
    return path


def test_a_token_is_read_without_the_end_of_its_line(tmp_path: Path) -> None:
    assert read_token("0.0.0.0", _token(tmp_path)) == "0123456789abcdef0123"
    assert read_token("::1", None) is None


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else object())
    with pytest.raises(UserError, match=r'serving needs uvicorn; .*"transfusion-mm\[serve\]"'):
        serving._need_packages()


def test_the_cache_takes_what_requests_need_or_memory_allows(build_pipeline: Callable[..., Pipeline]) -> None:
    pipeline = build_pipeline()
    # A sequence of 256 positions is 16 pages, and an answer under guidance has two rows.
    assert cache_pages(pipeline, 64) == 64 * 32
    page = 2 * 2 * 16 * 16 * 4  # layers, keys and values, their width, slots of a page, bytes of a float
    assert cache_pages(pipeline, 64, gigabytes=100.5 * page / 1e9) == 100
    with pytest.raises(UserError, match="--cache-gb"):
        cache_pages(pipeline, 64, gigabytes=31 * page / 1e9)


@pytest.fixture
def process(folder: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[str], str]]]:
    """process(arguments) -> a server of its own, once it is there, and its address."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: object) -> tuple[subprocess.Popen[str], str]:
        command = [
            sys.executable,
            "-m",
            "transfusion",
            "serve",
            str(folder),
            "--port",
            "0",
            *map(str, arguments),
        ]
        server = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        started.append(server)
        assert server.stderr is not None
        found = re.search(r"(\S+) is served at (http://\S+)", server.stderr.readline())
        assert found is not None
        url = found[2]
        wait_for(lambda: _is_ready(url))
        return server, url

    yield start
    for server in started:
        server.kill()
        server.communicate()


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").is_success
    except httpx.TransportError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_ends_when_it_is_told_to(
    process: Callable[..., tuple[subprocess.Popen[str], str]], number: signal.Signals
) -> None:
    server, url = process("--name", "mine", "--log-prompts")
    assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "mine"
    answer = httpx.post(f"{url}/v1/generate", json={"prompt": "one", "max_tokens": 3}, timeout=PATIENCE)
    assert answer.is_success
    server.send_signal(number)
    _, told = server.communicate(timeout=PATIENCE)
    assert server.returncode == 0 and "Traceback" not in told
    assert "prompt: one" in told and re.search(r"POST /v1/generate 200 \d\.\d\d s", told)


@pytest.mark.slow
def test_a_server_that_was_killed_can_be_started_again_at_once(
    process: Callable[..., tuple[subprocess.Popen[str], str]], folder: Path
) -> None:
    server, url = process()
    port = url.rpartition(":")[2]
    with socket.create_connection(("127.0.0.1", int(port))):
        server.kill()
        server.wait()
    _, again = process("--port", port)
    assert again == url
