"""Perplexity over HTTP: which ids are scored, exactly once, and sums equal to the model's own."""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.api import OctavoClient
from client.eval import wikitext
from client.eval.data import BUNDLED, EvalError, Text, bundled_text, load_text, text_of_lines
from client.eval.wikitext import Wikitext, articles, by_document, detokenize, pages, rolling, spans
from tests.client.conftest import Reply, Stub
from tests.server.conftest import Served

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"


def test_spans() -> None:
    assert spans(10, 4, 4) == [(0, 1, 4), (4, 5, 8), (8, 9, 10)]
    assert spans(10, 4, 2) == [(0, 1, 4), (2, 4, 6), (4, 6, 8), (6, 8, 10)]
    assert spans(9, 4, 4) == [(0, 1, 4), (4, 5, 8)]  # the last id is alone: no context
    assert spans(3, 4, 1) == [(0, 1, 3)]
    assert spans(1, 4, 2) == spans(0, 4, 2) == []
    for window, stride in ((1, 1), (4, 5), (4, 0)):
        with pytest.raises(EvalError, match="stride"):
            spans(10, window, stride)
    with pytest.raises(EvalError, match="2 or more"):
        rolling(10, 1)


@given(st.integers(0, 60), st.integers(2, 20), st.data())
def test_every_id_is_scored_once_or_has_no_context(n: int, window: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, window))
    scored = [i for _, first, end in spans(n, window, stride) for i in range(first, end)]
    assert scored == sorted(set(scored))
    missed = set(range(n)) - set(scored)
    assert missed == (set(range(0, n, window)) if stride == window else set(range(min(n, 1))))
    for begin, first, end in spans(n, window, stride):
        assert begin < first < end <= begin + window


def rolling_of_the_harness(tokens: list[int], max_len: int) -> list[tuple[list[int], list[int]]]:
    """lm_eval.utils.get_rolling_token_windows with context_len 1, in words: (context, continuation) of each window."""
    pairs = [([-1], tokens[:max_len])] if tokens else []
    done = len(tokens[:max_len])
    while done < len(tokens):
        size = min(len(tokens) - done, max_len)
        end = done + size
        pairs.append((tokens[end - max_len - 1 : done], tokens[done:end]))
        done = end
    return pairs


@given(st.integers(0, 60), st.integers(2, 20))
def test_rolling_windows_are_the_harness_own(n: int, window: int) -> None:
    tokens = list(range(n))
    ours = [
        ([-1] * (begin < 0) + tokens[max(begin, 0) : first], tokens[first:end])
        for begin, first, end in rolling(n, window)
    ]
    assert ours == rolling_of_the_harness(tokens, window - 1)
    assert all(end - begin <= window for begin, _, end in rolling(n, window))


def test_articles() -> None:
    lines = [" \n", " = One = \n", " text \n", " = = Part = = \n", " = = = Deep = = = \n", " = Two ( 2 ) = \n", " \n"]
    assert articles(lines) == [lines[1:5], lines[5:]]
    assert articles(["no title\n", " = One = \n"]) == [["no title\n"], [" = One = \n"]]
    assert len(articles(bundled_text().rows)) == 10


def test_detokenize() -> None:
    page = " = = A = = \n The boys ' house ( 1 @,@ 000 @.@ 5 well @-@ known ) ; it \" was \" N % : he 's 5 ° C . \n "
    # it pairs the apostrophes of boys' and he's, and "N" becomes "1" even where it is no number: the harness's way
    assert detokenize(page) == " == A ==\nThe boys'house (1,000.5 well-known); it \"was\" 1 %: he's 5°C.\n"


@pytest.mark.skipif(not SHARED.is_dir(), reason="WikiText-2 (shared data) is not here")
def test_wikitext_itself() -> None:
    text = load_text(SHARED / "wikitext-2-raw" / "wiki.test.raw")
    found = pages(text.raw)
    assert len(found) == 62  # the harness's count
    assert sum(len(page.split()) for page in found) == 241_211
    # by the harness's own wikitext_detokenizer (commit 244246fa52964ad5ff6e1aaf0fc708bfbeea6208)
    digest = hashlib.sha256("\0".join(map(detokenize, found)).encode()).hexdigest()
    assert digest == "b0ae50e166add20959a5406d9b3c99fe1f23819ec0a10149047149434fb85d81"


async def score_all(client: OctavoClient, model: str, task: Wikitext) -> list[dict[str, Any]]:
    items = await task.items(client, model)
    ask = await task.asker(client, model)
    return [{"id": key} | await ask(window) for key, window in items]


def losses_of(windows: list[tuple[list[int], int]]) -> float:
    """Loss in nats of the ids from each window's `first` on, computed with transformers in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model, total = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32), 0.0
    with torch.inference_mode():
        for ids, first in windows:
            x = torch.tensor([ids])
            logprobs = torch.log_softmax(model(x).logits[0], dim=-1)
            total -= logprobs[first - 1 : -1].gather(1, x[0, first:, None]).double().sum().item()
    return total


def encode(text: str) -> list[int]:
    from transformers import AutoTokenizer

    ids: list[int] = AutoTokenizer.from_pretrained(BUNDLED)(text, add_special_tokens=False).input_ids
    return ids


@pytest.mark.parametrize(("stride", "join"), [(None, "blank-lines"), (300, "as-is")])
async def test_windows_equal_transformers(pocket: Served, stride: int | None, join: str) -> None:
    whole = bundled_text()
    text = text_of_lines(whole.raw[:6000], "a part")
    task = Wikitext(text, window=512, stride=stride, join=join)
    async with OctavoClient(pocket.url) as client:
        rows = await score_all(client, "pocket:bf16", task)
    ids = encode("\n\n".join(text.rows) if join == "blank-lines" else text.raw)
    windows = spans(len(ids), 512, stride or 512)
    expected = losses_of([(ids[begin:end], first - begin) for begin, first, end in windows])
    figures, count = task.figures(rows), sum(end - first for _, first, end in windows)
    assert figures["n"] == figures["tokens"] == count
    assert figures["perplexity"] == pytest.approx(math.exp(expected / count), rel=1e-3 / 50)
    assert figures["nll"] == pytest.approx(expected, abs=1e-3 * count)
    assert figures["documents"] == len(articles(text.rows)) >= 2
    assert sum(part[2] for row in rows for part in row["parts"]) == count


async def test_documents_equal_transformers(pocket: Served) -> None:
    whole = bundled_text()
    text = text_of_lines("\n".join(pages(whole.raw)[:2]), "two articles")
    task = Wikitext(text, "documents", window=256)
    async with OctavoClient(pocket.url) as client:
        rows = await score_all(client, "pocket:bf16", task)
        prefix = await client.tokenize("<|endoftext|>", add_special_tokens=False)
        with pytest.raises(EvalError, match="give the model's end-of-text as --prefix"):
            await Wikitext(text, "documents", prefix="<|nothing|>").items(client, "pocket")
    expected, words, size = 0.0, 0, 0
    for page in pages(text.raw):
        tokens = encode(detokenize(page))
        pairs = rolling_of_the_harness(tokens, 255)
        expected += losses_of([([*(c if c != [-1] else prefix), *t], len(c)) for c, t in pairs])
        words, size = words + len(re.split(r"\s+", page)), size + len(page.encode())
    figures = task.figures(rows)
    assert (figures["documents"], figures["words"], figures["bytes"]) == (2, words, size)
    assert figures["perplexity"] == pytest.approx(math.exp(expected / words), rel=1e-5)
    assert figures["byte_perplexity"] == pytest.approx(math.exp(expected / size), rel=1e-5)
    assert figures["bits_per_byte"] == pytest.approx(expected / size / math.log(2), rel=1e-5)


async def test_the_echoed_way_is_the_same(pocket: Served) -> None:
    ids = encode(bundled_text().raw)[:200]
    async with OctavoClient(pocket.url) as client:
        for first in (1, 50):
            own = await wikitext.prompt_logprobs(client, "pocket:fp8-row", ids, first)
            other = await wikitext.echoed_logprobs(client, "pocket:fp8-row", ids, first)
            assert own == pytest.approx(other, abs=1e-3) and len(own) == 200 - first


TEXT = Text("A river is a river.\n", ("A river is a river.\n",), "made up")


def scripted(*known: str) -> Any:
    """A server whose tokens are bytes, each of logprob -0.5, and which knows some of tokenize, own, echo."""

    def answer(method: str, path: str, body: Any) -> Reply:
        if path == "/tokenize":
            return Reply({"tokens": list(body["prompt"].encode())}) if "tokenize" in known else Reply({}, 404)
        assert (
            body["max_tokens"] == 0
            and body["echo"] is True
            and max(body.get("prompt_logprobs", 0), body.get("logprobs", 0)) == 0
        )
        choice: dict[str, Any] = {"index": 0, "text": ""}
        ids = body["prompt"]
        if "own" in known and "prompt_logprobs" in body:
            start = body["prompt_logprobs_start"]
            entries = [None if i < start else {"token_id": t, "logprob": -0.5} for i, t in enumerate(ids)]
            choice["prompt_logprobs"] = entries[:-1] if "short" in known else entries
        if "echo" in known and "logprobs" in body:
            choice["logprobs"] = {"token_logprobs": [None, *[-0.5] * (len(ids) - 1)]}
        return Reply({"choices": [choice]})

    return answer


async def test_what_a_server_knows(stub: Stub) -> None:
    task = Wikitext(TEXT, window=8)
    async with OctavoClient(stub.url) as client:
        for known in (("tokenize", "own"), ("tokenize", "echo"), ("tokenize", "own", "echo", "short")):
            stub.answer = scripted(*known)
            figures = task.figures(await score_all(client, "m", task))
            assert figures["perplexity"] == pytest.approx(math.exp(0.5)) and figures["n"] == 17
            assert figures["stderr"] is None  # one document
        for known, message in ((("own",), "no /tokenize"), (("tokenize",), "no logprobs of a prompt")):
            stub.answer = scripted(*known)
            with pytest.raises(EvalError, match=message):
                await score_all(client, "m", task)


def test_failed_windows() -> None:
    rows: list[dict[str, Any]] = [
        {"id": "0/0", "parts": [[0, 10.0, 5, 4, 20]]},
        {"id": "1/0", "parts": [[1, 99.0, 5, 4, 20]]},
        {"id": "1/1", "error": "500"},
        {"id": "2/0", "parts": [[2, 6.0, 3, 4, 12]]},
    ]
    assert by_document(rows, "documents") == {0: [10, 5, 4, 20], 2: [6, 3, 4, 12]}
    figures = Wikitext(TEXT, "documents").figures(rows)
    assert (figures["failed"], figures["documents"], figures["words"]) == (1, 2, 8)
    assert figures["perplexity"] == pytest.approx(math.exp(16 / 8))
    with pytest.raises(EvalError, match="no document was scored whole"):
        Wikitext(TEXT, "documents").figures(rows[1:3])
    assert by_document(rows, "windows").keys() == {0, 1, 2}
