"""Answers: one JSON document, or server-sent events.

Streams follow what clients count on: every event with choices carries new text or the end of a choice (no role-only
event before the first token, none for the finish after the last), usage comes in an event of its own with empty
choices, then `[DONE]`. Events are joined from bytes made once per request; only the piece of text is encoded. A client
that reads slowly gets fewer, longer pieces.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from engine.text import TokenTable
from server.choices import Choice
from server.engine_client import EngineClient, RequestStream
from server.errors import ApiError, ClientGone
from server.prepared import Prepared

LARGE_POSITIONS = 2048  # log-probabilities of more positions are formatted in a thread
DONE = b"data: [DONE]\n\n"
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # no proxy may hold events back

_encode = msgspec.json.Encoder().encode


class Answer:
    """The choices of one request while they are made."""

    def __init__(self, prepared: Prepared, stream: RequestStream, client: EngineClient, table: TokenTable) -> None:
        self.prepared = prepared
        self.stream = stream
        self.client = client
        self.choices = [Choice(prepared, stream, i, table) for i in range(len(stream.sequences))]

    async def advance(self) -> AsyncIterator[list[tuple[Choice, str]]]:
        """Yields the choices that have moved and their new text, until all have ended. Raises what ended them early."""
        num_open = len(self.choices)
        while num_open:
            moved = []
            for sequence in await self.stream.next():
                choice = self.choices[sequence.index]
                if choice.reason is None:
                    moved.append((choice, choice.advance(self.client)))
                    num_open -= choice.reason is not None
            yield moved

    def usage(self) -> dict[str, Any]:
        """Tokens so far. A prompt counts once, however many choices continue it."""
        prompt = sum(map(len, self.prepared.prompts))
        completion = sum(choice.num_tokens for choice in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {
                "cached_tokens": sum(c.sequence.num_cached_tokens for c in self.choices[:: self.prepared.params.n])
            },
        }

    @asynccontextmanager
    async def watched(self, receive: Receive) -> AsyncIterator[None]:
        """While inside, a client that goes away ends the request; leaving frees whatever still runs."""
        watcher = asyncio.create_task(self._watch(receive))
        try:
            yield
        finally:
            watcher.cancel()
            self.client.abort(self.stream)

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.client.disconnected(self.stream)


async def whole(answer: Answer, receive: Receive) -> Response:
    """The response of a request that does not stream. Raises ApiError, or ClientGone."""
    texts: list[list[str]] = [[] for _ in answer.choices]
    async with answer.watched(receive):
        async for moved in answer.advance():
            for choice, text in moved:
                texts[choice.index].append(text)
    num_positions = sum(len(c.entries) for c in answer.choices)
    if num_positions > LARGE_POSITIONS or answer.prepared.prompt_logprobs is not None:
        content = await asyncio.to_thread(_document, answer, texts)
    else:
        content = _document(answer, texts)
    return Response(content, media_type="application/json")


def _document(answer: Answer, texts: list[list[str]]) -> bytes:
    prepared = answer.prepared
    choices = []
    for choice in answer.choices:
        text = "".join(texts[choice.index])
        item: dict[str, Any] = {"index": choice.index}
        if prepared.chat:
            item["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            item["text"] = text
        item |= {"logprobs": choice.take_logprobs(), "finish_reason": choice.reason}
        if prepared.prompt_logprobs is not None:
            item["prompt_logprobs"] = choice.prompt_logprobs()
        choices.append(item)
    return _encode(
        {
            "id": prepared.id,
            "object": "chat.completion" if prepared.chat else "text_completion",
            "created": prepared.created,
            "model": prepared.model,
            "choices": choices,
            "usage": answer.usage(),
        }
    )


class EventStream(Response):
    """Server-sent events of one answer. Nothing is sent before the first event, so an early error keeps its status."""

    media_type = "text/event-stream"

    def __init__(self, answer: Answer) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self.answer = answer
        prepared = answer.prepared
        kind = "chat.completion.chunk" if prepared.chat else "text_completion"
        head = _encode({"id": prepared.id, "object": kind, "created": prepared.created, "model": prepared.model})
        self._head = b"data: " + head[:-1] + b',"choices":['
        self._plain_end = b'],"usage":null}\n\n' if prepared.include_usage else b"]}\n\n"
        self._sent: set[int] = set()  # choices that have had an event

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        stream = self.answer.stream
        stream.writer = asyncio.current_task()
        started = False
        try:
            async with self.answer.watched(receive):
                async for moved in self.answer.advance():
                    body = b"".join([self._event(choice, text) for choice, text in moved if text or choice.reason])
                    if body and not started:
                        started = True
                        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    if body:
                        await send({"type": "http.response.body", "body": body, "more_body": True})
            await send({"type": "http.response.body", "body": self._last()})
        except ApiError as error:
            if not started:
                raise
            scope["state"]["failed_status"] = error.rule.status
            event = b"data: " + error.body(scope["state"]["request_id"]) + b"\n\n"
            await send({"type": "http.response.body", "body": event})
        except asyncio.CancelledError:
            if not isinstance(stream.error, ClientGone):  # not ours: the server ends
                raise

    def _event(self, choice: Choice, text: str) -> bytes:
        first = choice.index not in self._sent
        prepared = self.answer.prepared
        if prepared.chat:
            role = b'"role":"assistant",' if first else b""
            what = b',"delta":{' + role + b'"content":' + _encode(text) + b"}"
        else:
            what = b',"text":' + _encode(text)
        logprobs = b"null" if prepared.logprobs is None else _encode(choice.take_logprobs())
        reason = b"null" if choice.reason is None else b'"' + choice.reason.encode() + b'"'
        extra = b""
        if first:
            self._sent.add(choice.index)
            if prepared.prompt_logprobs is not None:
                extra = b',"prompt_logprobs":' + _encode(choice.prompt_logprobs())
        return b'%b{"index":%d%b,"logprobs":%b,"finish_reason":%b%b}%b' % (
            self._head,
            choice.index,
            what,
            logprobs,
            reason,
            extra,
            self._end(),
        )

    def _end(self) -> bytes:
        if not self.answer.prepared.continuous_usage:
            return self._plain_end
        return b'],"usage":' + _encode(self.answer.usage()) + b"}\n\n"

    def _last(self) -> bytes:
        if not self.answer.prepared.include_usage:
            return DONE
        return self._head + b'],"usage":' + _encode(self.answer.usage()) + b"}\n\n" + DONE
