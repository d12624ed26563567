"""Every error a client can see, in one table, in OpenAI's shape.

    {"error": {"message": …, "type": …, "param": …, "code": …}}

Code raises `ApiError(kind, …)` or the engine's `ParameterError`; `respond` turns either, and the router's own 404 and
405, into a response. Bodies of 5xx are constant text plus the request id: nothing from inside leaves.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from engine.sequence import ParameterError


class Rule(NamedTuple):
    status: int
    type: str
    code: str | None
    message: str = ""  # used when the raiser gives none
    headers: Mapping[str, str] = MappingProxyType({})


INVALID, SERVER = "invalid_request_error", "server_error"
LATER, CLOSE = {"retry-after": "1"}, {"connection": "close"}

# kind -> what the client sees. Codes are OpenAI's where it has one, else our own.
TABLE: dict[str, Rule] = {
    "invalid_request": Rule(400, INVALID, None),
    "invalid_json": Rule(400, INVALID, "invalid_json"),
    "invalid_body": Rule(400, INVALID, "invalid_body", "The body must be a JSON object."),
    "invalid_http": Rule(400, INVALID, "invalid_http", "The request is not valid HTTP.", CLOSE),
    "invalid_host": Rule(400, INVALID, "invalid_host", "This server does not answer for that Host."),
    "missing_required_parameter": Rule(400, INVALID, "missing_required_parameter"),
    "unsupported_parameter": Rule(400, INVALID, "unsupported_parameter"),
    "unsupported_content": Rule(400, INVALID, "unsupported_content"),
    "too_many_prompts": Rule(400, INVALID, "too_many_prompts"),
    "invalid_api_key": Rule(
        401,
        INVALID,
        "invalid_api_key",
        "Give a valid API key as 'Authorization: Bearer KEY'.",
        {"www-authenticate": "Bearer"},
    ),
    "admin_key_not_set": Rule(
        403,
        INVALID,
        "admin_key_not_set",
        "Variants cannot be changed: start the server with --admin-key (or OCTAVO_ADMIN_KEY) and send that key.",
    ),
    "admin_key_required": Rule(403, INVALID, "admin_key_required", "This needs the server's admin key as the bearer."),
    "not_found": Rule(404, INVALID, None, "There is nothing at this path."),
    "model_not_found": Rule(404, INVALID, "model_not_found"),
    "method_not_allowed": Rule(405, INVALID, None, "This path does not take that method."),
    "request_timeout": Rule(408, INVALID, "request_timeout", "The request took too long to arrive.", CLOSE),
    # no client should ask again by itself: a person must make room first
    "variant_conflict": Rule(409, INVALID, "variant_conflict", headers={"x-should-retry": "false"}),
    "request_too_large": Rule(413, INVALID, "request_too_large", headers=CLOSE),
    "unsupported_media_type": Rule(
        415, INVALID, "unsupported_media_type", "The Content-Type must be application/json."
    ),
    "headers_too_large": Rule(431, INVALID, "headers_too_large", "The request's headers are too large.", CLOSE),
    "internal_error": Rule(500, SERVER, "internal_error", "The server had an internal error."),
    "engine_dead": Rule(
        500,
        SERVER,
        "engine_dead",
        "The engine died while it served this request.",
        {"x-should-retry": "false"},  # a request that may have killed the engine must not be replayed
    ),
    "engine_loading": Rule(503, SERVER, "engine_loading", "The engine is not ready yet.", {"retry-after": "2"}),
    "unhealthy": Rule(503, SERVER, "unhealthy", "The engine does not make progress.", {"retry-after": "5"}),
    "queue_full": Rule(503, SERVER, "queue_full", "Too many requests are in flight; try again later.", LATER),
    "shutting_down": Rule(503, SERVER, "shutting_down", "The server is shutting down.", {**LATER, **CLOSE}),
    "timeout": Rule(504, SERVER, "timeout", "The engine did not answer in time."),
}

REJECT_REASONS = (*TABLE, "context_length_exceeded")


class ApiError(Exception):
    """A request ends with `TABLE[kind]`; `message` and `code` override its own, `param` names the field to blame."""

    def __init__(self, kind: str, message: str = "", param: str | None = None, code: str | None = None) -> None:
        self.kind = kind
        self.rule = TABLE[kind]
        self.message = message or self.rule.message
        self.param = param
        self.code = code or self.rule.code
        super().__init__(self.message)

    def body(self, request_id: str) -> bytes:
        """The JSON document. A 5xx also tells the request id, to be found again in the log."""
        message = f"{self.message} Request id: {request_id}." if self.rule.status >= 500 else self.message
        error = {"message": message, "type": self.rule.type, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})

    def response(self, request_id: str) -> Response:
        return Response(self.body(request_id), self.rule.status, self.rule.headers, "application/json")


class ClientGone(Exception):
    """The client closed its connection: there is nobody to answer."""


def to_api_error(error: Exception) -> ApiError:
    """The table's view of any exception that may end a request."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ParameterError):
        return ApiError("invalid_request", str(error), error.param, error.code)
    if isinstance(error, HTTPException) and error.status_code in (404, 405):
        return ApiError("not_found" if error.status_code == 404 else "method_not_allowed")
    return ApiError("internal_error")


def reject_reason(error: ApiError) -> str:
    """What the metrics call this refusal: one of REJECT_REASONS, the finest that fits."""
    return error.code if error.code in REJECT_REASONS else error.kind


async def respond(request: Request, error: Exception) -> Response:
    """Exception handler of the app for ApiError, ParameterError and the router's HTTPException."""
    seen = to_api_error(error)
    request.scope["state"]["rejected"] = reject_reason(seen)
    response = seen.response(request.state.request_id)
    if isinstance(error, HTTPException) and error.headers:
        response.headers.update(error.headers)  # Allow, with 405
    return response


HANDLERS: dict[Any, Any] = {ApiError: respond, ParameterError: respond, HTTPException: respond}
