"""HTTP/1.1 under limits: how large a request's head may be and how long it may take to arrive.

uvicorn's httptools protocol has neither. A head that is too large gets 431, one that does not arrive in time 408,
broken HTTP 400, all as JSON in OpenAI's shape, and the connection closes. Such a request never reaches the envelope,
so it is counted here.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.envelope import new_request_id
from server.errors import ApiError
from server.metrics import REJECTED, REQUESTS

MAX_HEAD_BYTES = 64 * 2**10
MAX_HEADERS = 128
HEAD_SECONDS = 20.0

PHRASES = {400: "Bad Request", 408: "Request Timeout", 431: "Request Header Fields Too Large"}


class HeadTooLarge(Exception):
    """Raised inside the parser's callbacks, to stop it."""


class LimitedProtocol(HttpToolsProtocol):
    """One connection. `_head_bytes` counts what has come of a head that is not complete."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._in_head = True
        self._head_bytes = 0
        self._num_headers = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._head_bytes = self._head_bytes + len(data) if self._in_head else 0
        super().data_received(data)
        if self._in_head and self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse("headers_too_large")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._num_headers = 0
        self._start_timer()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > MAX_HEAD_BYTES:
            raise HeadTooLarge

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._num_headers += 1
        if self._num_headers > MAX_HEADERS or len(name) + len(value) > MAX_HEAD_BYTES:
            raise HeadTooLarge

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_timer()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """uvicorn's answer to a parser that stopped: broken HTTP, or our own HeadTooLarge."""
        large = self._num_headers > MAX_HEADERS or self._head_bytes > MAX_HEAD_BYTES
        self._refuse("headers_too_large" if large else "invalid_http")

    def _start_timer(self) -> None:
        self._stop_timer()
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self._refuse, "request_timeout")

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, kind: str) -> None:
        """Answer with an error of the table and close."""
        if self.transport.is_closing():
            return
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.close()  # in the middle of another answer there is nothing to say
            return
        error, request_id = ApiError(kind), new_request_id()
        counters = self.app_state["client"].counters  # what the application's lifespan yields
        counters.add(REQUESTS, "other", "", str(error.rule.status))
        counters.add(REJECTED, kind)
        body = error.body(request_id)
        head: dict[str, Any] = {"content-type": "application/json", "content-length": len(body)}
        head |= {"x-request-id": request_id, "connection": "close"}
        lines = [f"HTTP/1.1 {error.rule.status} {PHRASES[error.rule.status]}", *(f"{k}: {v}" for k, v in head.items())]
        self.transport.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        self.transport.close()
