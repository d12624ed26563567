"""What crosses the socket, without a client library in between: streams, disconnects, metrics, harness contracts."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest

USED = 'octavo_kv_blocks{state="used"}'
PAGE_SECONDS = 1.2  # /metrics is not older than that
LONG = {"model": "pocket", "prompt": "The sea", "max_tokens": 1800, "ignore_eos": True}


@pytest.fixture(scope="module")
def http(served) -> Iterator[httpx.Client]:
    with served.client() as client:
        yield client


def events(response: httpx.Response) -> list[str]:
    """The data of each event of a stream, checking the frame."""
    *frames, rest = response.text.split("\n\n")
    assert rest == ""
    assert all(frame.startswith("data: ") and "\n" not in frame for frame in frames)
    return [frame.removeprefix("data: ") for frame in frames]


def test_a_stream_is_what_clients_count(http):
    """vllm bench and GuideLLM: no role-only event, no finish event, usage alone, [DONE] last."""
    options = {"include_usage": True}
    body = {"model": "pocket", "max_tokens": 16, "temperature": 0, "stream": True, "stream_options": options}
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    response = http.post("/v1/chat/completions", json=body | {"messages": messages, "ignore_eos": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, done = events(response)
    assert done == "[DONE]"
    *chunks, usage = map(json.loads, chunks)
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 16
    assert set(usage["usage"]["prompt_tokens_details"]) == {"cached_tokens"}
    assert all(len(c["choices"]) == 1 for c in chunks)
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    for chunk in chunks[:-1]:
        assert chunk["choices"][0]["delta"]["content"]
        assert chunk["choices"][0]["finish_reason"] is None
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_names_that_evaluation_harnesses_use(http):
    assert http.get("/health").status_code == 200
    assert http.get("/ready").status_code == 200
    assert http.get("/version").json()["version"]
    info = http.get("/tokenizer_info").json()
    assert info["eos_token"]
    assert info["chat_template"]
    tokens = http.post("/tokenize", json={"prompt": "The sea", "add_special_tokens": False}).json()["tokens"]
    assert http.post("/detokenize", json={"tokens": tokens}).json()["prompt"] == "The sea"
    card = http.get("/v1/models").json()["data"][0]
    assert card["id"] == "pocket"
    assert card["root"]


def test_max_tokens_zero_computes_the_prompt_only(http):
    body = {"model": "pocket", "prompt": "The sea was", "max_tokens": 0, "prompt_logprobs": 1}
    answer = http.post("/v1/completions", json=body).json()
    assert answer["choices"][0]["text"] == ""
    assert answer["choices"][0]["finish_reason"] == "length"
    assert len(answer["choices"][0]["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
    assert answer["usage"]["completion_tokens"] == 0


def test_greedy_logprob_is_the_largest(http):
    """lm-evaluation-harness: greedy is an exact comparison with the largest of the top values."""
    body = {"model": "pocket", "prompt": "The sea", "max_tokens": 8, "temperature": 0, "logprobs": 5, "seed": 1234}
    shown = http.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    for value, top in zip(shown["token_logprobs"], shown["top_logprobs"], strict=True):
        assert value == max(top.values())


# Disconnects


def open_request(served, body: dict, path: str = "/v1/completions") -> socket.socket:
    """Send a request over a bare socket and leave the answer unread."""
    url = urlsplit(served.url)
    connection = socket.create_connection((url.hostname, url.port), timeout=30)
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    connection.sendall(head.encode() + content)
    return connection


@pytest.mark.parametrize("extra", [{"stream": True}, {}, {"n": 8}, {"stream": True, "n": 8}, {"prompt": [9] * 200}])
def test_a_client_that_goes_away_frees_its_blocks(served, extra):
    served.wait_for_metric(USED, 0)
    before = served.metric('octavo_decode_tokens_total{variant="bf16"}')
    connection = open_request(served, LONG | extra)
    if extra.get("stream"):
        assert b"data: " in connection.recv(65536) + connection.recv(65536)
    else:
        time.sleep(0.3)
    connection.close()
    time.sleep(PAGE_SECONDS)
    served.wait_for_metric(USED, 0, seconds=0.5)
    assert served.metric('octavo_decode_tokens_total{variant="bf16"}') - before < 1500 * extra.get("n", 1)


def test_a_client_that_leaves_while_waiting_for_its_turn(served):
    connections = [open_request(served, LONG | {"n": 64, "stream": i % 2 == 0}) for i in range(6)]
    time.sleep(0.2)
    for connection in connections:
        connection.close()
    time.sleep(PAGE_SECONDS)
    served.wait_for_metric(USED, 0, seconds=2)
    served.wait_for_metric('vllm:num_requests_waiting{model_name="pocket:bf16"}', 0)


def test_a_slow_reader_gets_everything(served):
    with open_request(served, LONG | {"max_tokens": 100, "stream": True, "temperature": 0}) as slow:
        time.sleep(1.5)
        received = b""
        while b"[DONE]" not in received:
            received += slow.recv(65536)
    with served.client() as client:
        plain = client.post("/v1/completions", json=LONG | {"max_tokens": 100, "temperature": 0}).json()
    chunks = [json.loads(line[6:]) for line in received.split(b"\n") if line.startswith(b"data: {")]
    assert "".join(c["choices"][0]["text"] for c in chunks) == plain["choices"][0]["text"]


# Many at once


def test_health_answers_while_a_large_text_is_tokenised(served):
    """Tokenising happens in a thread that lets go of the interpreter; probes of the same process go on."""
    body = {"prompt": "word " * 500_000}
    slowest, results = 0.0, []

    def post() -> None:
        with served.client() as client:
            results.append(client.post("/tokenize", json=body).json()["count"])

    posts = [threading.Thread(target=post) for _ in range(2)]
    for thread in posts:
        thread.start()
    with served.client() as client:
        while any(thread.is_alive() for thread in posts):
            start = time.perf_counter()
            assert client.get("/health").status_code == 200
            slowest = max(slowest, time.perf_counter() - start)
    assert min(results) >= 500_000
    assert slowest < 1.0  # generous: two cores run the engine and this test as well


def test_a_text_that_cannot_fit_is_refused_untokenised(served):
    start = time.perf_counter()
    with served.client() as client:
        response = client.post("/v1/completions", json={"model": "pocket", "prompt": "word " * 1_900_000})
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert time.perf_counter() - start < 3


def test_every_api_process_serves_the_same_metrics_page(served):
    """Connections spread over both processes; every page is the whole, once all reports are in."""
    with served.client() as client:
        client.post("/v1/completions", json=LONG | {"max_tokens": 3})
    time.sleep(2)
    pages = set()
    for _ in range(12):
        with served.client() as client:
            pages.add("\n".join(x for x in client.get("/metrics").text.splitlines() if 'endpoint="metrics"' not in x))
    assert len(pages) == 1
    page = pages.pop()
    for name in (
        "octavo_prefill_tokens_total",
        "octavo_prefill_seconds_total",
        "octavo_decode_tokens_total",
        "octavo_decode_seconds_total",
        "octavo_requests_running",
        "octavo_preemptions_total",
        "octavo_prefix_cache_queries_total",
        "octavo_prefix_cache_hits_total",
    ):
        assert all(f'{name}{{variant="{v}"}} ' in page for v in ("bf16", "int8-row", "fp8-row"))
    assert 'octavo_requests_waiting{reason="blocks",variant="int8-row"} ' in page
    assert 'octavo_requests_total{endpoint="completions",status="200",variant="bf16"} ' in page
    assert "octavo_build_info{" in page


def test_phase_totals_count_tokens(served):
    prefill, decode = 'octavo_prefill_tokens_total{variant="fp8-row"}', 'octavo_decode_tokens_total{variant="fp8-row"}'
    time.sleep(1)
    before = served.metric(prefill), served.metric(decode)
    ids = [11, 13, 17] * 20
    body = LONG | {"model": "pocket:fp8-row", "prompt": ids, "max_tokens": 9, "cache_salt": "phase"}
    with served.client() as client:
        assert client.post("/v1/completions", json=body).json()["usage"]["completion_tokens"] == 9
    served.wait_for_metric(prefill, before[0] + 60)
    served.wait_for_metric(decode, before[1] + 8)
