"""The client against a scripted server over a real socket: retries, errors, streams, bounds."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import time
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx
import pytest

from client import api
from client.api import (
    APIError,
    BadAnswer,
    BadRequest,
    ConnectionFailed,
    NotFound,
    OctavoClient,
    RateLimited,
    ServerError,
    Unauthorized,
    retry_pause,
)
from tests.client.conftest import Reply, Stub


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "FIRST_PAUSE", 0.01)


def error(status: int, headers: dict[str, str] | None = None, **fields: str) -> Reply:
    return Reply({"error": {"message": "no", "type": "t", "param": None, "code": None} | fields}, status, headers or {})


async def test_requests(stub: Stub) -> None:
    stub.answer = lambda method, path, body: Reply({"data": [{"id": "m"}], "tokens": [1, 2], "prompt": "text"})
    async with OctavoClient(stub.url + "/v1/", api_key="key") as client:
        assert await client.models() == [{"id": "m"}]
        assert await client.tokenize("é", add_special_tokens=False) == [1, 2]
        assert await client.detokenize([1, 2]) == "text"
        await client.completions("m", [1, 2], max_tokens=1, logprob_token_ids=[7])
        await client.chat("m", [{"role": "user", "content": "hi"}], temperature=0)
    assert stub.seen == [
        ("GET", "/v1/models", None),
        ("POST", "/tokenize", {"prompt": "é", "add_special_tokens": False}),
        ("POST", "/detokenize", {"tokens": [1, 2]}),
        ("POST", "/v1/completions", {"model": "m", "prompt": [1, 2], "max_tokens": 1, "logprob_token_ids": [7]}),
        (
            "POST",
            "/v1/chat/completions",
            {"model": "m", "messages": [{"role": "user", "content": "hi"}], "temperature": 0},
        ),
    ]
    assert {headers["authorization"] for headers in stub.headers} == {"Bearer key"}


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503])
async def test_unfinished_requests_are_sent_again(stub: Stub, status: int) -> None:
    stub.replies(error(status), error(status), Reply({"ok": 1}))
    async with OctavoClient(stub.url) as client:
        assert await client.completions("m", "x") == {"ok": 1}
    assert len(stub.seen) == 3


async def test_retry_after_is_obeyed(stub: Stub) -> None:
    stub.replies(error(429, {"Retry-After": "0.3"}), error(503, {"retry-after-ms": "200"}), Reply({"ok": 1}))
    async with OctavoClient(stub.url) as client:
        start = time.perf_counter()
        assert await client.completions("m", "x") == {"ok": 1}
        assert 0.5 <= time.perf_counter() - start < 5


async def test_retries_end(stub: Stub) -> None:
    stub.answer = lambda method, path, body: error(503, code="overloaded")
    async with OctavoClient(stub.url, max_retries=2) as client:
        with pytest.raises(ServerError) as caught:
            await client.completions("m", "x")
    assert len(stub.seen) == 3
    assert caught.value.code == "overloaded"


async def test_a_poison_request_is_not_sent_again(stub: Stub) -> None:
    stub.replies(error(500, {"x-should-retry": "false"}))
    async with OctavoClient(stub.url) as client:
        with pytest.raises(ServerError):
            await client.completions("m", "x")
    assert len(stub.seen) == 1


def test_pauses() -> None:
    def pause(status: int, **headers: str) -> float | None:
        return retry_pause(status, httpx.Headers({k.replace("_", "-"): v for k, v in headers.items()}), 0)

    assert pause(400) is None and pause(404) is None
    assert pause(400, x_should_retry="true") is not None
    assert pause(503, x_should_retry="false") is None
    assert pause(503, retry_after="7") == 7.0
    assert pause(503, retry_after="7", retry_after_ms="1500") == 1.5
    assert pause(503, retry_after="-1") == 0.0
    assert pause(503, retry_after="3600") is None  # not waited for
    assert pause(503, retry_after="soon") is not None
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert 28 < (pause(503, retry_after=date) or 0) <= 30


def test_backoff_grows_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "FIRST_PAUSE", 0.5)
    for attempt, top in enumerate([0.5, 1, 2, 4, 8, 8]):
        assert 0.75 * top <= api.backoff(attempt) <= top


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        *((400, BadRequest), (413, BadRequest), (401, Unauthorized), (403, Unauthorized)),
        *((404, NotFound), (429, RateLimited), (500, ServerError), (503, ServerError)),
    ],
)
async def test_errors_are_typed(stub: Stub, status: int, kind: type[APIError]) -> None:
    stub.replies(error(status, message="why", type="invalid_request_error", param="model", code="model_not_found"))
    async with OctavoClient(stub.url, max_retries=0) as client:
        with pytest.raises(kind, match=f"{status}: why") as caught:
            await client.completions("m", "x")
    e = caught.value
    assert (e.status, e.type, e.param, e.code) == (status, "invalid_request_error", "model", "model_not_found")


async def test_answers_that_are_not_the_api(stub: Stub) -> None:
    stub.replies(
        Reply([1]), Reply({"tokens": "x"}), Reply(status=502, parts=[b"<html>gateway"]), Reply(parts=[b"not json"])
    )
    async with OctavoClient(stub.url, max_retries=0) as client:
        with pytest.raises(BadAnswer, match="JSON object"):
            await client.completions("m", "x")
        with pytest.raises(BadAnswer, match="'tokens'"):
            await client.tokenize("x")
        with pytest.raises(ServerError, match="502: <html>gateway"):
            await client.completions("m", "x")
        with pytest.raises(BadAnswer, match="not JSON"):
            await client.completions("m", "x")


async def test_no_server() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    async with OctavoClient(f"http://127.0.0.1:{port}", max_retries=1) as client:
        with pytest.raises(ConnectionFailed, match=str(port)):
            await client.models()


async def test_an_answer_cut_short_is_asked_for_again(stub: Stub) -> None:
    stub.replies(Reply({"ok": 1}, missing=5), Reply({"ok": 2}))
    async with OctavoClient(stub.url) as client:
        assert await client.completions("m", "x") == {"ok": 2}


# streams


def event(value: object) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


async def test_stream(stub: Stub) -> None:
    chunks = [{"choices": [{"text": text}]} for text in ("a", "é\u2028\x85b", "")]
    whole = b": ping\n\n" + b"".join(event(c) for c in chunks) + b"data: [DONE]\n\n"
    cuts = [whole[i : i + 7] for i in range(0, len(whole), 7)]  # inside lines and characters
    stub.replies(error(503), Reply(parts=cuts, headers={"Content-Type": "text/event-stream"}))
    async with OctavoClient(stub.url) as client:
        assert [c async for c in client.stream_completions("m", "x", max_tokens=3)] == chunks
    assert stub.seen[1] == ("POST", "/v1/completions", {"model": "m", "prompt": "x", "max_tokens": 3, "stream": True})


async def test_stream_ends_with_an_error(stub: Stub) -> None:
    failed = {"error": {"message": "engine died", "type": "server_error", "code": "engine_dead"}}
    stub.replies(
        Reply(parts=[event({"n": 1}), event(failed)]),
        Reply(parts=[event({"n": 1})]),
        error(404),
        Reply(parts=[b"data: {"]),
    )
    async with OctavoClient(stub.url) as client:
        got = []
        with pytest.raises(ServerError, match="engine died") as caught:
            async for chunk in client.stream_chat("m", []):
                got.append(chunk)
        assert got == [{"n": 1}] and caught.value.code == "engine_dead"
        with pytest.raises(ConnectionFailed, match="broke off"):
            [c async for c in client.stream_chat("m", [])]
        with pytest.raises(NotFound):
            [c async for c in client.stream_chat("m", [])]
        with pytest.raises(ConnectionFailed, match="broke off"):
            [c async for c in client.stream_chat("m", [])]
    assert len(stub.seen) == 4  # a stream that has begun is not asked for again


async def test_a_stream_closed_early_gives_its_turn_back(stub: Stub) -> None:
    stub.answer = lambda method, path, body: Reply(parts=[event({"n": 1}), event({"n": 2}), b"data: [DONE]\n\n"])
    async with OctavoClient(stub.url, concurrency=1) as client:
        for _ in range(3):
            async with aclosing(client.stream_chat("m", [])) as chunks:
                assert await anext(chunks) == {"n": 1}


# bounds


@pytest.mark.parametrize("concurrency", [3, 20])  # of one pool, of two
async def test_concurrency_is_bounded(stub: Stub, concurrency: int) -> None:
    def slow(method: str, path: str, body: object) -> Reply:
        time.sleep(0.02)
        return Reply({})

    stub.answer = slow
    async with OctavoClient(stub.url, concurrency=concurrency) as client:
        await asyncio.gather(*[client.completions("m", "x") for _ in range(4 * concurrency)])
    assert len(stub.seen) == 4 * concurrency
    assert 2 <= stub.most_at_once <= concurrency


async def test_map(stub: Stub) -> None:
    stub.answer = lambda method, path, body: error(400) if body["prompt"] == "bad" else Reply({"n": body["prompt"]})
    async with OctavoClient(stub.url, concurrency=3) as client:

        async def work(prompt: str) -> str:
            return str((await client.completions("m", prompt))["n"])

        assert await client.map(work, [str(i) for i in range(20)]) == [str(i) for i in range(20)]
        assert await client.map(work, []) == []
        stub.seen.clear()
        with pytest.raises(BadRequest):
            await client.map(work, ["bad", *map(str, range(50))])
        assert len(stub.seen) < 50


def test_the_client_needs_only_httpx() -> None:
    code = (
        "import sys, client.api, client.eval.run\n"
        "heavy = {'torch', 'numpy', 'tokenizers', 'pydantic', 'msgspec', 'engine', 'server'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
