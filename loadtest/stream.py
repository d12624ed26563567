"""One streamed request: send it, note when its events come, find out how it ended.

Events are searched, not parsed: parsing each would halve what one client process can take. Text in an event is JSON, in
which quotes and line ends are escaped, so nothing a model writes can look like an event's own keys.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from array import array
from typing import NamedTuple

import aiohttp

# an event's text that is not empty: completions, chat, reasoning
TEXT = re.compile(rb'"(?:text|content|reasoning_content|reasoning)": ?"(?!")')
ERROR = re.compile(rb'(?:^|\n)(?:event: ?error|data: ?\{"error":|error:)')
DONE = re.compile(rb"(?:^|\n)data: ?\[DONE\]")
USAGE = b'"completion_tokens"'


class Record(NamedTuple):
    """One request as the client saw it. Times are seconds after the run's start; `error` is its kind, "" for none.

    scheduled: when it was due; sent: when it was; first, last: its first and last event with text (0 without one).
    output_tokens: the server's count, or events with text if it gives none.
    """

    model: int
    scheduled: float
    sent: float
    first: float
    last: float
    end: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    events: int
    error: str
    message: str = ""


class StreamError(Exception):
    """The server's answer is not a whole stream. `kind` is a word for counting."""

    def __init__(self, kind: str, message: str) -> None:
        self.kind = kind
        super().__init__(message)


class Reading:
    """What has been read of one answer. `gaps` receives the seconds between two events with text."""

    def __init__(self, gaps: array[float]) -> None:
        self.first = self.last = 0.0
        self.events = 0
        self.usage: dict[str, int | dict[str, int] | None] = {}
        self.ended = False
        self._gaps = gaps
        self._buffer = b""

    def feed(self, chunk: bytes, now: float) -> None:
        """Raises StreamError when the stream says that it failed."""
        piece = self._buffer + chunk if self._buffer else chunk
        if b"\r" in piece:
            piece = piece.replace(b"\r", b"")
        end = piece.rfind(b"\n\n") + 2
        if end < 2:
            self._buffer = piece
            return
        self._buffer = piece[end:]
        piece = piece[:end]
        count = len(TEXT.findall(piece))
        if count:
            if self.events:
                self._gaps.append(now - self.last)
            else:
                self.first = now
            if count > 1:  # came together
                self._gaps.extend([0.0] * (count - 1))
            self.last = now
            self.events += count
        if USAGE in piece or b"[DONE]" in piece or b"error" in piece:
            self._close_look(piece)

    def _close_look(self, piece: bytes) -> None:
        if found := ERROR.search(piece):
            raise StreamError("stream error", piece[found.start() :][:300].decode(errors="replace").strip())
        for line in piece.split(b"\n"):
            if USAGE in line and line.startswith(b"data:"):
                usage = json.loads(line[5:]).get("usage")
                self.usage = usage or self.usage
        self.ended = self.ended or DONE.search(piece) is not None


def kind_of(error: Exception) -> str:
    """The word that an error is counted under."""
    if isinstance(error, StreamError):
        return error.kind
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, aiohttp.ClientConnectorError):
        return "connect"
    return "broken"


async def send(
    session: aiohttp.ClientSession, url: str, body: bytes, model: int, start: float, due: float, gaps: array[float]
) -> Record:
    """Send one request and read its answer to the end; errors are recorded, not raised. `start`, `due` as by
    `time.monotonic`.
    """
    reading, kind, message = Reading(gaps), "", ""
    sent = time.monotonic()
    try:
        async with session.post(url, data=body) as response:
            if response.status != 200:
                raise StreamError(f"http {response.status}", (await response.text(errors="replace"))[:300])
            async for chunk in response.content.iter_any():
                reading.feed(chunk, time.monotonic())
        if not reading.ended:
            raise StreamError("cut", "the stream ended without [DONE]")
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, StreamError) as e:
        kind, message = kind_of(e), str(e) or type(e).__name__
    except asyncio.CancelledError:
        kind, message = "interrupted", "the load test was interrupted"
    end = time.monotonic()
    details = reading.usage.get("prompt_tokens_details")
    scheduled, sent, first, last, ended = (
        t - start if t else 0.0 for t in (due, sent, reading.first, reading.last, end)
    )
    return Record(
        model=model,
        scheduled=scheduled,
        sent=sent,
        first=first,
        last=last,
        end=ended,
        prompt_tokens=_count(reading.usage.get("prompt_tokens")),
        cached_tokens=_count(details.get("cached_tokens")) if isinstance(details, dict) else 0,
        output_tokens=_count(reading.usage.get("completion_tokens")) or reading.events,
        events=reading.events,
        error=kind,
        message=message,
    )


def _count(value: object) -> int:
    return value if isinstance(value, int) else 0
