"""Throughput from the server's counters: what is sent, what is waited for, what cannot be believed."""

from __future__ import annotations

from typing import Any

import pytest

from client.api import BadAnswer, OctavoClient
from client.eval import throughput
from client.eval.data import EvalError
from client.eval.throughput import Throughput, counts_phases, parse_load
from tests.client.conftest import Reply, Stub

PAGE = """# HELP octavo_prefill_tokens_total Prompt tokens computed.
octavo_prefill_tokens_total{{variant="int8-row"}} 9
octavo_prefill_tokens_total{{variant="bf16"}} {0}
octavo_prefill_seconds_total{{variant="bf16"}} {1}
octavo_decode_tokens_total{{variant="bf16"}} {2}
octavo_decode_seconds_total{{variant="bf16"}} {3}
"""
LOAD = Throughput(sequences=3, prompt_tokens=10, output_tokens=5)


class Counting:
    """A server whose page is a poll behind its work. Each load takes 0.5 s of prefill and 2 s of decode."""

    def __init__(self, stub: Stub, seconds: tuple[float, float] = (0.5, 2.0), page: str = PAGE) -> None:
        self.totals, self.shown, self.seconds, self.page = (
            [100.0, 1.0, 50.0, 3.0],
            [100.0, 1.0, 50.0, 3.0],
            seconds,
            page,
        )
        self.bodies: list[Any] = []
        stub.answer = self.answer

    def answer(self, method: str, path: str, body: Any) -> Reply:
        if path == "/metrics":
            shown, self.shown = self.shown, list(self.totals)
            return Reply(parts=[self.page.format(*shown).encode()])
        if path == "/tokenizer_info":
            return Reply({"vocab_size": 50})
        self.bodies.append(body)
        for i, more in enumerate((30, self.seconds[0], 12, self.seconds[1])):
            self.totals[i] += more
        return Reply({"choices": []})


async def rows(stub: Stub) -> list[dict[str, Any]]:
    async with OctavoClient(stub.url) as client:
        (item,) = await LOAD.items(client, "m:bf16")
        return [await (await LOAD.asker(client, "m:bf16"))(item[1])]


async def test_rates(stub: Stub) -> None:
    server = Counting(stub)
    figures = LOAD.figures(await rows(stub))
    assert figures == {
        "n": 2,
        "failed": 0,
        "prefill_tok_s": 60.0,
        "prefill_samples_s": 6.0,
        "decode_tok_s": 6.0,
        "low": 6.0,
        "high": 6.0,
    }
    assert len(server.bodies) == 3 and len({body["cache_salt"] for body in server.bodies}) == 3
    for body in server.bodies:
        assert [len(p) for p in body["prompt"]] == [10] * 3 and body["max_tokens"] == 5 and body["ignore_eos"] is True
        assert all(4 <= i < 50 for prompt in body["prompt"] for i in prompt)


async def test_what_cannot_be_believed(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "SETTLE_SECONDS", 0.2)
    Counting(stub, seconds=(0.0, 2.0))
    with pytest.raises(EvalError, match="too small to time"):
        await rows(stub)
    Counting(stub, page=PAGE.replace("{0}", "100"))
    with pytest.raises(BadAnswer, match="counts 0 prefill and 12 decode tokens for a load of 30 and 12"):
        await rows(stub)
    async with OctavoClient(stub.url) as client:
        assert await counts_phases(client, "m:bf16") and not await counts_phases(client, "m:fp8-row")


def test_loads() -> None:
    assert parse_load("32x512x128").settings == {
        "sequences": 32,
        "prompt_tokens": 512,
        "output_tokens": 128,
        "rounds": 2,
    }
    for text in ("", "1x2", "0x2x3", "1x2x1", "1x2x3x4", "axbxc"):
        with pytest.raises(ValueError):
            parse_load(text)
