"""A small typed client of an Octavo server, or of any that speaks OpenAI's completions and chat. Needs only httpx.

    async with OctavoClient("http://127.0.0.1:8000") as client:
        answer = await client.completions("bf16", "Once upon a time", max_tokens=16)
        async for chunk in client.stream_chat("int8-row", [{"role": "user", "content": "Hi"}]):
            ...

At most `concurrency` requests are under way at once; the others wait their turn. A request that the server did not
finish (408, 409, 429, 5xx, no connection) is sent again, after the server's `Retry-After` or a growing pause. Errors:

    OctavoError
      + ConnectionFailed      no answer: refused, reset, timed out
      + BadAnswer             an answer that is not what the API promises
      + APIError              an error answer: status, type, param, code
          + BadRequest        400, 413, 415, 422 and any other 4xx
              + Conflict      409
          + Unauthorized      401, 403
          + NotFound          404: also an unknown model or variant
          + RateLimited       429
          + ServerError       5xx, and an error inside a stream
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Self, TypeVar, cast
from urllib.parse import quote

import httpx

MAX_RETRY_AFTER = 120.0  # seconds; a server that asks for more is not waited for
FIRST_PAUSE = 0.5  # seconds before the first retry; doubles each time, up to MAX_PAUSE
MAX_PAUSE = 8.0
CONNECTIONS_PER_POOL = 16  # httpx looks through a whole pool for each request: one of 128 triples its CPU time

JSON = dict[str, Any]
Prompt = str | list[str] | list[int] | list[list[int]]

T = TypeVar("T")
R = TypeVar("R")


class OctavoError(Exception):
    """What can go wrong between this client and a server."""


class ConnectionFailed(OctavoError):
    """The server could not be reached, or the connection broke before the answer was whole."""


class BadAnswer(OctavoError):
    """The server answered with something that its API does not promise."""


class APIError(OctavoError):
    """The server answered with an error. `type`, `param` and `code` are those of OpenAI's error object, where given."""

    def __init__(self, status: int, message: str, type: str | None, param: str | None, code: str | None) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code


class BadRequest(APIError):
    """The request is at fault."""


class Conflict(BadRequest):
    """What the server is or holds does not allow it: no room for a variant."""


class Unauthorized(APIError):
    """The API key is missing or wrong."""


class NotFound(APIError):
    """No such path, model or variant."""


class RateLimited(APIError):
    """Too many requests."""


class ServerError(APIError):
    """The server is at fault, or busy."""


class OctavoClient:
    """An asynchronous client. Its connections are closed by `async with`; use one instance a worker.

    timeout: seconds of silence after which a request has failed. max_retries: further attempts after the first.
    admin_key: what the calls that change the server send in place of `api_key`. headers: sent with every request.
    Every method raises the errors of the module's docstring.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        api_key: str | None = None,
        *,
        admin_key: str | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 600.0,
        max_retries: int = 4,
        concurrency: int = 16,
    ) -> None:
        verify = httpx.create_ssl_context()
        self._pools = [
            httpx.AsyncClient(
                base_url=base_url.rstrip("/").removesuffix("/v1"),
                headers={**(headers or {}), **({"Authorization": f"Bearer {api_key}"} if api_key else {})},
                timeout=httpx.Timeout(timeout, connect=10.0),
                limits=httpx.Limits(max_connections=size, max_keepalive_connections=size),
                verify=verify,
            )
            for size in _shares(concurrency)
        ]
        self._opened = AsyncExitStack()
        self._admin = {"Authorization": f"Bearer {admin_key}"} if admin_key else {}
        self._max_retries = max_retries
        self._concurrency = concurrency
        self._turns: asyncio.LifoQueue[httpx.AsyncClient] = asyncio.LifoQueue()  # last in: the warmest connection
        for pool, size in zip(self._pools, _shares(concurrency), strict=True):
            for _ in range(size):
                self._turns.put_nowait(pool)

    async def __aenter__(self) -> Self:
        for pool in self._pools:
            await self._opened.enter_async_context(pool)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._opened.aclose()

    async def models(self) -> list[JSON]:
        """One entry per loaded variant; its `id` is the model name to ask for."""
        return _field(await self._call("GET", "/v1/models"), "data", list)

    async def completions(self, model: str, prompt: Prompt, **body: Any) -> JSON:
        """POST /v1/completions; `body` holds any other field, Octavo's own included."""
        return await self._call("POST", "/v1/completions", {"model": model, "prompt": prompt, **body})

    async def chat(self, model: str, messages: list[JSON], **body: Any) -> JSON:
        """POST /v1/chat/completions."""
        return await self._call("POST", "/v1/chat/completions", {"model": model, "messages": messages, **body})

    async def compare(self, prompt: str | list[int], **body: Any) -> JSON:
        """POST /v1/compare: one prompt through several variants; `body`: variants, continuation, max_tokens."""
        return await self._call("POST", "/v1/compare", {"prompt": prompt, **body})

    def stream_completions(self, model: str, prompt: Prompt, **body: Any) -> AsyncGenerator[JSON]:
        """The chunks of a streamed completion. To end it early, close the generator (`contextlib.aclosing`)."""
        return self._stream("/v1/completions", {"model": model, "prompt": prompt, **body})

    def stream_chat(self, model: str, messages: list[JSON], **body: Any) -> AsyncGenerator[JSON]:
        """The chunks of a streamed chat completion, likewise."""
        return self._stream("/v1/chat/completions", {"model": model, "messages": messages, **body})

    async def tokenize(self, prompt: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text."""
        body = {"prompt": prompt, "add_special_tokens": add_special_tokens}
        return _field(await self._call("POST", "/tokenize", body), "tokens", list)

    async def detokenize(self, tokens: list[int]) -> str:
        """The text of ids."""
        return _field(await self._call("POST", "/detokenize", {"tokens": tokens}), "prompt", str)

    async def tokenizer_info(self) -> JSON:
        """What is known of the tokenizer: its special tokens, chat template, number of ids."""
        return await self._call("GET", "/tokenizer_info")

    async def metrics(self) -> str:
        """The page for Prometheus."""
        async with self._answer("GET", "/metrics", None, read=True) as response:
            return response.text

    async def variants(self) -> JSON:
        """GET /v1/variants: what is held (`data`) and the bytes that others may yet take (`headroom_bytes`)."""
        return await self._call("GET", "/v1/variants")

    async def load_variant(self, name: str) -> JSON:
        """POST /v1/variants: hold one more variant. Sent once: it may take a minute, and a refusal stays one."""
        async with self._answer("POST", "/v1/variants", {"name": name}, read=True, admin=True) as response:
            return _object(response.content, "/v1/variants")

    async def drop_variant(self, name: str) -> None:
        """DELETE /v1/variants/{name}. Sent once."""
        async with self._answer("DELETE", f"/v1/variants/{quote(name, safe='')}", None, read=True, admin=True):
            return

    async def map(self, work: Callable[[T], Awaitable[R]], items: Sequence[T]) -> list[R]:
        """`work` of every item, in order, `concurrency` at a time. The first error ends the rest and is raised."""
        results: list[R | None] = [None] * len(items)
        queue = iter(enumerate(items))

        async def worker() -> None:
            for i, item in queue:
                results[i] = await work(item)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._concurrency, len(items))):
                    group.create_task(worker())
        except BaseExceptionGroup as e:
            raise e.exceptions[0] from None
        return cast(list[R], results)

    async def _call(self, method: str, path: str, body: JSON | None = None) -> JSON:
        async with self._answer(method, path, body, read=True) as response:
            return _object(response.content, path)

    async def _stream(self, path: str, body: JSON) -> AsyncGenerator[JSON]:
        async with self._answer("POST", path, body | {"stream": True}, read=False) as response:
            async for data in _events(response):
                if data == b"[DONE]":
                    return
                chunk = _object(data, path)
                if chunk.get("error"):
                    raise _api_error(500, chunk)
                yield chunk
        raise ConnectionFailed(f"{path}: the stream broke off before its end")

    @asynccontextmanager
    async def _answer(
        self, method: str, path: str, body: JSON | None, *, read: bool, admin: bool = False
    ) -> AsyncGenerator[httpx.Response]:
        """A response of status 2xx, its body read whole or not at all; retries until there is one.

        admin: with the admin key, and only once.
        """
        http = await self._turns.get()
        try:
            attempt = 0
            while True:
                request = http.build_request(method, path, json=body, headers=self._admin if admin else {})
                pause: float | None
                try:
                    response = await http.send(request, stream=True)
                    if response.is_success and not read:
                        break
                    content = await response.aread()
                    if response.is_success:
                        break
                    error: OctavoError = _api_error(response.status_code, _error_body(content))
                    pause = retry_pause(response.status_code, response.headers, attempt)
                except httpx.TransportError as e:
                    error = ConnectionFailed(f"{request.url}: {e or type(e).__name__}")
                    pause = backoff(attempt)
                if admin or pause is None or attempt == self._max_retries:
                    raise error
                attempt += 1
                await asyncio.sleep(pause)
            try:
                yield response
            except httpx.TransportError as e:
                raise ConnectionFailed(f"{request.url}: {e or type(e).__name__}") from e
            finally:
                await response.aclose()
        finally:
            self._turns.put_nowait(http)


def _shares(concurrency: int) -> list[int]:
    """Connections of each pool, CONNECTIONS_PER_POOL at most."""
    full, rest = divmod(concurrency, CONNECTIONS_PER_POOL)
    return [CONNECTIONS_PER_POOL] * full + [rest] * (rest > 0)


def backoff(attempt: int) -> float:
    """Seconds to wait before retry `attempt` (from 0): doubling, less up to a quarter so that clients spread out."""
    return min(FIRST_PAUSE * 2.0**attempt, MAX_PAUSE) * (1 - 0.25 * random.random())


def retry_pause(status: int, headers: httpx.Headers, attempt: int) -> float | None:
    """Seconds to wait before sending a failed request again; None: do not.

    Obeys `x-should-retry`, `retry-after-ms` and `retry-after` (seconds or a date) as the openai package does.
    """
    wanted = headers.get("x-should-retry")
    if wanted == "false" or (wanted != "true" and status not in (408, 409, 429) and status < 500):
        return None
    pause = _retry_after(headers)
    if pause is None:
        return backoff(attempt)
    return pause if pause <= MAX_RETRY_AFTER else None


def _retry_after(headers: httpx.Headers) -> float | None:
    for name, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        with suppress(ValueError):  # absent, or a date
            return max(0.0, float(headers.get(name, "")) * scale)
    with suppress(ValueError, TypeError):  # no date, or one without a zone
        return max(0.0, (parsedate_to_datetime(headers.get("retry-after", "")) - datetime.now(UTC)).total_seconds())
    return None


async def _events(response: httpx.Response) -> AsyncGenerator[bytes]:
    """The `data` of a stream's server-sent events. Lines end at a newline only: U+2028 inside JSON is no line end."""
    rest = b""
    async for part in response.aiter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


def _object(content: bytes, path: str) -> JSON:
    try:
        value = json.loads(content)
    except ValueError as e:
        raise BadAnswer(f"{path}: the answer is not JSON: {e}") from None
    if not isinstance(value, dict):
        raise BadAnswer(f"{path}: the answer is not a JSON object")
    return value


def _field(answer: JSON, name: str, kind: type[T]) -> T:
    value = answer.get(name)
    if not isinstance(value, kind):
        raise BadAnswer(f"the answer has no {kind.__name__} {name!r}")
    return value


def _error_body(content: bytes) -> JSON:
    """The body of an error answer; a proxy's page or a bare text becomes the message."""
    try:
        value = json.loads(content)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {"error": {"message": content.decode(errors="replace")[:300]}}


def _api_error(status: int, body: JSON) -> APIError:
    error = body.get("error")
    fields = error if isinstance(error, dict) else {"message": str(error or body)}
    kinds: dict[int, type[APIError]] = {
        401: Unauthorized,
        403: Unauthorized,
        404: NotFound,
        409: Conflict,
        429: RateLimited,
    }
    kind = kinds.get(status, ServerError if status >= 500 else BadRequest)
    return kind(status, str(fields.get("message")), fields.get("type"), fields.get("param"), fields.get("code"))
