"""A web server in a thread that serves a folder, well or badly, and remembers what it was asked for."""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple


class Answer(NamedTuple):
    """What is sent: `cut`: so many bytes although more were promised; pause: seconds before the last byte."""

    body: bytes
    status: int = 200
    cut: int | None = None
    pause: float = 0.0


class Web:
    """asked: requests by name. behave(name, number of this request of it, its bytes) -> Answer; None hangs up."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: collections.Counter[str] = collections.Counter()
        self.sent = 0
        self.behave: Callable[[str, int, bytes], Answer | None] = lambda name, number, body: Answer(body)
        # Bytes a second of each connection; 0: as fast as can be.
        self.rate = 0
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.partition("?")[0].lstrip("/")
                web.asked[name] += 1
                answer = web.behave(name, web.asked[name], (folder / name).read_bytes())
                if answer is None:
                    self.close_connection = True
                    return
                self.send_response(answer.status)
                self.send_header("Content-Length", str(len(answer.body)))
                self.end_headers()
                body = answer.body if answer.cut is None else answer.body[: answer.cut]
                self.close_connection = answer.cut is not None
                self.send(body[:-1])
                time.sleep(answer.pause)
                self.send(body[-1:])

            def send(self, body: bytes) -> None:
                step = max(1, web.rate // 20) if web.rate else len(body) or 1
                for first in range(0, len(body), step):
                    self.wfile.write(body[first : first + step])
                    web.sent += len(body[first : first + step])
                    if web.rate:
                        time.sleep(step / web.rate)

            def log_message(self, *words: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *words: Any) -> None:
                """Clients of these tests hang up as they please."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
