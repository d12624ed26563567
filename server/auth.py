"""Who may ask: API keys and the Host allow-list, as plain ASGI. Everything is closed unless listed in OPEN_PATHS."""

from __future__ import annotations

import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import ApiError, reject_reason

OPEN_PATHS = frozenset({"/health", "/ready"})  # probes carry no key and learn nothing but up or down


class Gate:
    """Lets a request through if its Host is allowed and its bearer token is one of `keys`.

    The decision reads `scope["path"]`, which no header can change. Keys are compared as bytes in constant time, so a
    non-ASCII token is merely wrong.
    """

    def __init__(self, app: ASGIApp, keys: list[str], hosts: list[str]) -> None:
        self.app = app
        self.keys = [key.encode() for key in keys]
        self.hosts = {host.lower().encode() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self.refusal(scope) if scope["type"] == "http" else None
        if error is not None:
            scope["state"]["rejected"] = reject_reason(error)
            await error.response(scope["state"]["request_id"])(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def refusal(self, scope: Scope) -> ApiError | None:
        headers = dict(scope["headers"])
        if self.hosts and host_name(headers.get(b"host", b"")) not in self.hosts:
            return ApiError("invalid_host")
        if not self.keys or scope["path"] in OPEN_PATHS:
            return None
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        # every key is compared, so that timing tells nothing of which one was near
        matches = [hmac.compare_digest(token.strip(), key) for key in self.keys]
        return None if scheme.lower() == b"bearer" and any(matches) else ApiError("invalid_api_key")


def host_name(host: bytes) -> bytes:
    """A Host header without its port, in lower case; `[::1]:80` gives `[::1]`."""
    if host.startswith(b"["):
        return (host.partition(b"]")[0] + b"]").lower()
    return host.partition(b":")[0].lower()
