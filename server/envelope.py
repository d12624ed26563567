"""What stands around every request: its id, the last net for exceptions, the count. Plain ASGI."""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.logs import ACCESS
from server.errors import ApiError, ClientGone
from server.metrics import REJECTED, REQUESTS, Counters

ENDPOINTS = {
    "/v1/completions": "completions",
    "/v1/chat/completions": "chat",
    "/v1/compare": "compare",
    "/v1/models": "models",
    "/v1/variants": "variants",
    "/tokenize": "tokenize",
    "/detokenize": "detokenize",
    "/tokenizer_info": "tokenizer_info",
    "/health": "health",
    "/ready": "ready",
    "/version": "version",
    "/metrics": "metrics",
}
CLIENT_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")

PROBES = frozenset({"health", "ready", "metrics"})  # logged at level debug: they come every few seconds

logger = logging.getLogger("octavo.api")
access = logging.getLogger(ACCESS)


def new_request_id() -> str:
    return uuid.uuid4().hex


class Envelope:
    """Gives each request its id (the client's own if it is short and plain), answers what nobody caught, and counts.

    `scope["state"]` carries `request_id` and `arrival` (monotonic seconds); handlers add `variant` once they know it,
    `usage`, a function that tells the tokens so far, streams `failed_status`, and who refuses a request `rejected`,
    the reason.
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
        state["arrival"] = time.monotonic()
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
            logger.exception("request %s failed", request_id, extra={"fields": {"request_id": request_id}})
            if status:
                raise
            state["rejected"] = "internal_error"
            await ApiError("internal_error").response(request_id)(scope, receive, send_with_id)
        finally:
            endpoint = ENDPOINTS.get(scope["path"], "other")
            final = state.get("failed_status", status or 499)  # no status: cancelled
            self.counters.add(REQUESTS, endpoint, state.get("variant", ""), str(final))
            if "rejected" in state:
                self.counters.add(REJECTED, state["rejected"])
            _log(scope, endpoint, final)


def _log(scope: Scope, endpoint: str, status: int) -> None:
    level = logging.DEBUG if endpoint in PROBES else logging.INFO
    if not access.isEnabledFor(level):
        return
    state = scope["state"]
    seconds = time.monotonic() - state["arrival"]
    fields = {"request_id": state["request_id"], "method": scope["method"], "endpoint": endpoint, "status": status}
    fields |= {"seconds": round(seconds, 4), "variant": state.get("variant"), "rejected": state.get("rejected")}
    if "usage" in state:
        usage = state["usage"]()
        fields |= {name: usage[name] for name in ("prompt_tokens", "completion_tokens")}
        fields["cached_tokens"] = usage["prompt_tokens_details"]["cached_tokens"]
    words = (state["request_id"], scope["method"], endpoint, status, seconds)
    access.log(level, "%s %s %s %d in %.3f s", *words, extra={"fields": fields})


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and CLIENT_ID.fullmatch(value):
            return str(value, "ascii")
    return new_request_id()
