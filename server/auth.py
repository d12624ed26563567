"""Who may ask: API keys, admin keys and the Host allow-list, as plain ASGI.

Everything is closed unless listed in OPEN_PATHS. What is under ADMIN_PATH, but for reading it, needs an admin key, and
stays closed if the server has none; an admin key opens all else too.
"""

from __future__ import annotations

import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import ApiError, reject_reason

OPEN_PATHS = frozenset({"/health", "/ready"})  # probes carry no key and learn nothing but up or down
ADMIN_PATH = "/v1/variants"


class Gate:
    """Lets a request through if its Host is allowed and its bearer token is one of `keys` or `admin_keys`.

    The decision reads `scope["path"]`, which no header can change. Keys are compared as bytes in constant time, so a
    non-ASCII token is merely wrong.
    """

    def __init__(self, app: ASGIApp, keys: list[str], admin_keys: list[str], hosts: list[str]) -> None:
        self.app = app
        self.keys = [key.encode() for key in keys]
        self.admin_keys = [key.encode() for key in admin_keys]
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
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        token = token.strip() if scheme.lower() == b"bearer" else b""
        if _is_one_of(token, self.admin_keys):
            return None
        known = _is_one_of(token, self.keys)
        if _needs_admin(scope):
            if (self.keys or self.admin_keys) and not known:
                return ApiError("invalid_api_key")
            return ApiError("admin_key_required" if self.admin_keys else "admin_key_not_set")
        return None if known or not self.keys or scope["path"] in OPEN_PATHS else ApiError("invalid_api_key")


def _needs_admin(scope: Scope) -> bool:
    within = scope["path"] == ADMIN_PATH or scope["path"].startswith(ADMIN_PATH + "/")
    return within and scope["method"] not in ("GET", "HEAD")


def _is_one_of(token: bytes, keys: list[bytes]) -> bool:
    # every key is compared, so that timing tells nothing of which one was near
    return any([hmac.compare_digest(token, key) for key in keys])


def host_name(host: bytes) -> bytes:
    """A Host header without its port, in lower case; `[::1]:80` gives `[::1]`."""
    if host.startswith(b"["):
        return (host.partition(b"]")[0] + b"]").lower()
    return host.partition(b":")[0].lower()
