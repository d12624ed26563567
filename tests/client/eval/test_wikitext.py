"""Perplexity over HTTP: which ids are scored, exactly once, and the sums."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.api import BadAnswer, OctavoClient
from client.eval.data import EvalError, load_text
from client.eval.run import main
from client.eval.wikitext import Window, evaluate, windows
from tests.client.conftest import Reply, Stub


def test_windows() -> None:
    assert windows(10, 4, 4) == [Window(0, 4, 1), Window(4, 8, 5), Window(8, 10, 9)]
    assert windows(10, 4, 2) == [Window(0, 4, 1), Window(2, 6, 4), Window(4, 8, 6), Window(6, 10, 8)]
    assert windows(9, 4, 4) == [Window(0, 4, 1), Window(4, 8, 5)]  # the last id is alone: no context
    assert windows(3, 4, 1) == [Window(0, 3, 1)]
    assert windows(1, 4, 2) == windows(0, 4, 2) == []
    for window, stride in ((1, 1), (4, 5), (4, 0)):
        with pytest.raises(EvalError, match="stride"):
            windows(10, window, stride)


@given(st.integers(0, 60), st.integers(2, 20), st.data())
def test_every_id_is_scored_once_or_has_no_context(n: int, window: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, window))
    scored = [i for w in windows(n, window, stride) for i in range(w.first, w.end)]
    assert scored == sorted(set(scored))
    missed = set(range(n)) - set(scored)
    assert missed == (set(range(0, n, window)) if stride == window else set(range(min(n, 1))))
    for w in windows(n, window, stride):
        assert w.begin < w.first < w.end <= w.begin + window


def loss(token_id: int) -> float:
    return 0.5 + (token_id % 3) / 7


def score(method: str, path: str, body: Any) -> Reply:
    """A server whose tokens are bytes and whose logprob of id t is -loss(t)."""
    if path == "/tokenize":
        assert body["add_special_tokens"] is False
        return Reply({"tokens": list(body["prompt"].encode())})
    if path == "/v1/models":
        return Reply({"data": [{"id": "m"}]})
    ids, start = body["prompt"], body["prompt_logprobs_start"]
    assert body["max_tokens"] == 0 and body["echo"] is True and body["prompt_logprobs"] == 0
    assert 1 <= start < len(ids)
    positions = [None if i < start else {"token_id": t, "logprob": -loss(t), "top": {}} for i, t in enumerate(ids)]
    return Reply({"choices": [{"index": 0, "text": "", "prompt_logprobs": positions}]})


TEXT = "A river is a river.\n It runs = = é"


@pytest.mark.parametrize("stride", [None, 3])
async def test_evaluate(stub: Stub, stride: int | None) -> None:
    stub.answer = score
    count = []
    async with OctavoClient(stub.url) as client:
        result = await evaluate(client, "m", TEXT, window=8, stride=stride, on_done=lambda: count.append(1))
    ids = list(TEXT.encode())
    missed = range(0, len(ids), 8) if stride is None else [0]
    scored = [t for i, t in enumerate(ids) if i not in missed]
    nll = sum(map(loss, scored))
    assert result.num_scored == len(scored) and result.num_tokens == len(ids) == result.num_bytes
    assert result.nll == pytest.approx(nll, rel=1e-12)
    assert result.token_perplexity == pytest.approx(math.exp(nll / len(scored)))
    assert result.byte_perplexity == pytest.approx(result.token_perplexity)  # a token is a byte here
    assert result.num_words == 10
    assert result.word_perplexity == pytest.approx(math.exp(nll / len(scored) * len(ids) / 10))
    assert len(count) == len(windows(len(ids), 8, stride or 8))


async def test_answers_that_are_not_of_the_prompt(stub: Stub) -> None:
    async with OctavoClient(stub.url) as client:
        for spoil in (
            lambda p: [None] * len(p),
            lambda p: p[:-1],
            lambda p: [{**x, "token_id": 0} if x else x for x in p],
        ):

            def answer(method: str, path: str, body: Any, spoil: Any = spoil) -> Reply:
                reply = score(method, path, body)
                if path == "/v1/completions":
                    choice = reply.body["choices"][0]
                    choice["prompt_logprobs"] = spoil(choice["prompt_logprobs"])
                return reply

            stub.answer = answer
            with pytest.raises(BadAnswer, match="prompt logprobs"):
                await evaluate(client, "m", TEXT, window=8)
        stub.answer = score
        with pytest.raises(EvalError, match="nothing to score"):
            await evaluate(client, "m", "x")


def test_command(stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stub.answer = score
    text, out = tmp_path / "text.raw", tmp_path / "out.json"
    text.write_bytes(TEXT.encode())
    args = ["wikitext", "--url", stub.url, "--data", str(text), "--window", "8", "--limit", "2", "--json", str(out)]
    assert main(args) == 0
    header, row = (line.split() for line in capsys.readouterr().out.splitlines())
    assert header == ["model", "n", "nll", "token_ppl", "word_ppl", "byte_ppl", "window", "stride"]
    assert row[:2] == ["m", "14"] and row[6:] == ["8", "8"]
    assert json.loads(out.read_text(encoding="utf-8"))["results"][0]["n"] == 14


def test_text_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "text.raw"
    path.write_bytes(b" \r\n = Title = \n\xe2\x80\xa8")
    assert load_text(path) == " \r\n = Title = \n\u2028"
    path.write_bytes(b"\xff")
    with pytest.raises(EvalError, match="cannot read"):
        load_text(path)
    path.write_bytes(b" \n")
    with pytest.raises(EvalError, match="no text"):
        load_text(path)
    with pytest.raises(EvalError, match="cannot read"):
        load_text(tmp_path / "none")
