"""The client for scripts without asyncio: the same calls, each of which waits for its answer.

with SyncOctavoClient("http://127.0.0.1:8000") as client:
    answer = client.completions("bf16", "Once upon a time", max_tokens=16)
    for chunk in client.stream_chat("int8-row", [{"role": "user", "content": "Hi"}]):
        ...
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator
from types import TracebackType
from typing import Any, Self

from client.api import JSON, OctavoClient, Prompt


class SyncOctavoClient:
    """Options and errors are those of `OctavoClient`. Not to be used inside a running event loop."""

    def __init__(self, base_url: str = "http://127.0.0.1:8000", api_key: str | None = None, **options: Any) -> None:
        self._client = OctavoClient(base_url, api_key, **options)
        self._runner = asyncio.Runner()

    def __enter__(self) -> Self:
        self._runner.run(self._client.__aenter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._runner.run(self._client.__aexit__(kind, error, trace))
        finally:
            self._runner.close()

    def models(self) -> list[JSON]:
        """One entry per loaded variant."""
        return self._runner.run(self._client.models())

    def completions(self, model: str, prompt: Prompt, **body: Any) -> JSON:
        """POST /v1/completions."""
        return self._runner.run(self._client.completions(model, prompt, **body))

    def chat(self, model: str, messages: list[JSON], **body: Any) -> JSON:
        """POST /v1/chat/completions."""
        return self._runner.run(self._client.chat(model, messages, **body))

    def compare(self, prompt: str | list[int], **body: Any) -> JSON:
        """POST /v1/compare."""
        return self._runner.run(self._client.compare(prompt, **body))

    def stream_completions(self, model: str, prompt: Prompt, **body: Any) -> Generator[JSON]:
        """The chunks of a streamed completion. Closing the generator ends the request."""
        return self._chunks(self._client.stream_completions(model, prompt, **body))

    def stream_chat(self, model: str, messages: list[JSON], **body: Any) -> Generator[JSON]:
        """The chunks of a streamed chat completion, likewise."""
        return self._chunks(self._client.stream_chat(model, messages, **body))

    def tokenize(self, prompt: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text."""
        return self._runner.run(self._client.tokenize(prompt, add_special_tokens))

    def detokenize(self, tokens: list[int]) -> str:
        """The text of ids."""
        return self._runner.run(self._client.detokenize(tokens))

    def metrics(self) -> str:
        """The page for Prometheus."""
        return self._runner.run(self._client.metrics())

    def variants(self) -> JSON:
        """GET /v1/variants."""
        return self._runner.run(self._client.variants())

    def load_variant(self, name: str) -> JSON:
        """POST /v1/variants."""
        return self._runner.run(self._client.load_variant(name))

    def drop_variant(self, name: str) -> None:
        """DELETE /v1/variants/{name}."""
        self._runner.run(self._client.drop_variant(name))

    def _chunks(self, stream: AsyncGenerator[JSON]) -> Generator[JSON]:
        async def following() -> JSON | None:
            return await anext(stream, None)

        try:
            while (chunk := self._runner.run(following())) is not None:
                yield chunk
        finally:
            self._runner.run(stream.aclose())
