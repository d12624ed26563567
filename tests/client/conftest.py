"""Two servers for the client: a scripted one on a real loopback socket, and a real one with the bundled model."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.server.conftest import VARIANTS, Served, start, stop


@dataclass
class Reply:
    """What the stub answers: a JSON body, or raw bytes sent in `parts` (then the connection closes)."""

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    parts: list[bytes] | None = None
    missing: int = 0  # bytes promised by Content-Length and never sent


@dataclass
class Stub:
    """`answer` maps (method, path, body) to a Reply; `seen` records what arrived."""

    url: str = ""
    answer: Callable[[str, str, Any], Reply] = lambda method, path, body: Reply({})
    seen: list[tuple[str, str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    most_at_once: int = 0
    at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def replies(self, *replies: Reply) -> None:
        """Answer with these in turn, whatever is asked."""
        queue = iter(replies)
        self.answer = lambda method, path, body: next(queue)


@pytest.fixture
def stub() -> Iterator[Stub]:
    state = Stub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def handle_any(self) -> None:
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = json.loads(raw) if raw else None
            with state.lock:
                state.seen.append((self.command, self.path, body))
                state.headers.append({k.lower(): v for k, v in self.headers.items()})
                state.at_once += 1
                state.most_at_once = max(state.most_at_once, state.at_once)
            try:
                self.reply(state.answer(self.command, self.path, body))
            finally:
                with state.lock:
                    state.at_once -= 1

        def reply(self, reply: Reply) -> None:
            content = b"" if reply.parts is not None else json.dumps(reply.body).encode()
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            if reply.parts is None:
                self.send_header("Content-Length", str(len(content) + reply.missing))
            else:
                self.send_header("Connection", "close")
            self.end_headers()
            for part in [content] if reply.parts is None else reply.parts:
                self.wfile.write(part)
                self.wfile.flush()
            self.close_connection = reply.parts is not None or reply.missing > 0

        do_GET = do_POST = do_DELETE = handle_any

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: the test's output is its own."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="session")
def pocket() -> Iterator[Served]:
    """A real octavo-serve of the bundled model in three variants, on the CPU."""
    server = start(variants=",".join(VARIANTS))
    yield server
    stop(server)
