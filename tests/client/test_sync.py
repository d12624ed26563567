"""The synchronous face against the real server."""

from __future__ import annotations

import pytest

from client.api import NotFound
from client.sync import SyncOctavoClient
from tests.server.conftest import Served


def test_calls(pocket: Served) -> None:
    with SyncOctavoClient(pocket.url, concurrency=2) as client:
        assert {entry["id"] for entry in client.models()} >= {"pocket:bf16", "pocket:int8-row"}
        ids = client.tokenize("The old house")
        assert client.detokenize(ids) == "The old house"
        whole = client.completions("pocket:bf16", ids, max_tokens=6, temperature=0)["choices"][0]["text"]
        chunks = list(client.stream_completions("pocket:bf16", ids, max_tokens=6, temperature=0))
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"]) == whole
        messages = [{"role": "user", "content": "Who are you?"}]
        assert "Pocket" in client.chat("pocket", messages, temperature=0)["choices"][0]["message"]["content"]
        stream = client.stream_chat("pocket", messages, temperature=0)
        assert next(stream)["object"] == "chat.completion.chunk"
        stream.close()
        with pytest.raises(NotFound):
            client.completions("nope", "x")
        assert len(client.tokenize("a")) == 1  # still of use


def test_an_unused_stream_is_closed(pocket: Served) -> None:
    with SyncOctavoClient(pocket.url) as client:
        client.stream_completions("pocket", "x").close()
        assert len(client.tokenize("a")) == 1  # still of use
