"""What stands around every request: its id, the last net for exceptions, the count. Plain ASGI."""

from __future__ import annotations

import logging
import re
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import ApiError, ClientGone
from server.metrics import REQUESTS, Counters

ENDPOINTS = {
    "/v1/completions": "completions",
    "/v1/chat/completions": "chat",
    "/v1/models": "models",
    "/tokenize": "tokenize",
    "/detokenize": "detokenize",
    "/tokenizer_info": "tokenizer_info",
    "/health": "health",
    "/ready": "ready",
    "/version": "version",
    "/metrics": "metrics",
}
CLIENT_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")

logger = logging.getLogger("octavo.api")


def new_request_id() -> str:
    return uuid.uuid4().hex


class Envelope:
    """Gives each request its id (the client's own if it is short and plain), answers what nobody caught, and counts.

    `scope["state"]` carries `request_id`; handlers add `variant` once they know it, and streams `failed_status`.
    """

    def __init__(self, app: ASGIApp, counters: Counters) -> None:
        self.app = app
        self.counters = counters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["request_id"] = request_id = _request_id(scope)
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except ClientGone:
            state["failed_status"] = 499  # nobody is left to answer
        except Exception:
            logger.exception("request %s failed", request_id)
            if status:
                raise
            await ApiError("internal_error").response(request_id)(scope, receive, send_with_id)
        finally:
            endpoint = ENDPOINTS.get(scope["path"], "other")
            final = state.get("failed_status", status or 499)  # no status: cancelled
            self.counters.add(REQUESTS, endpoint, state.get("variant", ""), str(final))


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and CLIENT_ID.fullmatch(value):
            return str(value, "ascii")
    return new_request_id()
