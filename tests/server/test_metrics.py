"""The metrics page: names, histograms as deltas, true values under a known load, a bounded page, workers that die."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.messages import (
    STEP_BOUNDS,
    WAIT_REASONS,
    EngineInfo,
    EngineStats,
    Started,
    Status,
    VariantInfo,
    VariantStats,
)
from server.envelope import ENDPOINTS
from server.errors import REJECT_REASONS, TABLE
from server.meter import SequenceMeter
from server.metrics import FINISH_REASONS, HISTOGRAMS, REQUESTS, Counters, Page

INFO = EngineInfo(
    2048, 100, [0], "bf16", [VariantInfo("bf16", b"p", 16, 70, 0), VariantInfo("int8-row", b"q", 16, 40, 30)],
    64, 8, True, "cpu", "float32",
)  # fmt: skip
EACH = VariantStats(100, 2.0, 50, 4.0, 1, 90, 30, 2, {"blocks": 3, "rows": 1})
STEPS = [0, 5, *[0] * (len(STEP_BOUNDS) - 2), 2]  # five of up to 1 ms, two of more than 30 s
STATS = EngineStats(0.0, 64, 16, 8, {"bf16": EACH, "int8-row": EACH}, STEPS, 9.5, 1.5, 4, 30)
PEERS_NAMES = {
    "gauge": ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "cache_config_info"),
    "counter": ("prompt_tokens", "generation_tokens", "request_success", "num_preemptions", "prefix_cache_queries",
                "prefix_cache_hits"),
    "histogram": ("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds",
                  "request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds",
                  "request_prompt_tokens", "request_generation_tokens"),
}  # fmt: skip

FREE = ("version", "device", "dtype", "block_size", "num_gpu_blocks", "cache_dtype", "enable_prefix_caching")
ALLOWED = {
    "when": {"before_ready", "after_ready"},
    "endpoint": {*ENDPOINTS.values(), "other"},
    "variant": {"", "bf16", "int8-row"},
    "model_name": {"pocket:bf16", "pocket:int8-row"},
    "status": {"200", "499", *(str(rule.status) for rule in TABLE.values())},
    "reason": {*REJECT_REASONS, *WAIT_REASONS},
    "finished_reason": {*FINISH_REASONS},
    "state": {"used", "cached", "free"},
    "kind": {"own", "shared"},
}

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def parse(text: str) -> Samples:
    """Every sample of a page by its name and sorted labels."""
    return {
        (s.name, tuple(sorted(s.labels.items()))): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[(name, tuple(sorted(labels.items())))]


def render(totals: dict[str, float], stats: EngineStats | None = STATS) -> str:
    return Page("1.0", "m", REJECT_REASONS).render(Status(0, "ready", INFO, stats, totals)).decode()


def test_histograms_travel_as_deltas_and_come_out_as_prometheus_buckets():
    counters, totals = Counters(), {}
    gaps = counters.series("inter_token_latency", "bf16")
    for values in ([0.003, 0.0031, 100.0], [0.0001], []):
        gaps.extend(values)
        for key, delta in counters.take().items():
            totals[key] = totals.get(key, 0) + delta
        assert gaps == []
    samples = parse(render(totals))
    name = "vllm:inter_token_latency_seconds"
    bounds = ("0.0005", "0.003", "0.004", "80.0", "+Inf")
    bucket = {le: value(samples, f"{name}_bucket", model_name="m:bf16", le=le) for le in bounds}
    assert bucket == {"0.0005": 1, "0.003": 2, "0.004": 3, "80.0": 3, "+Inf": 4}
    assert value(samples, f"{name}_count", model_name="m:bf16") == 4
    assert value(samples, f"{name}_sum", model_name="m:bf16") == pytest.approx(100.0062)
    assert value(samples, f"{name}_count", model_name="m:int8-row") == 0
    assert value(samples, "vllm:generation_tokens_total", model_name="m:bf16") == 4


def test_what_could_not_be_sent_is_sent_later():
    counters = Counters()
    counters.series("request_prompt_tokens", "bf16").append(5)
    counters.add(REQUESTS, "chat", "bf16", "200")
    lost = counters.take()
    counters.put_back(lost)
    counters.series("request_prompt_tokens", "bf16").append(5)
    again = counters.take()
    assert again == {
        "requests|chat|bf16|200": 1,
        "request_prompt_tokens|bf16|2": 2,
        "request_prompt_tokens|bf16|sum": 10,
    }
    assert counters.take() == {}


def test_a_sequences_times():
    counters = Counters()
    meter = SequenceMeter(counters, "bf16", prompt_tokens=9, arrival=10.0, sent=10.5)
    meter.token(13.0)
    meter.started(Started(1, 0, 1.5), 13.0)
    meter.token(13.25)
    meter.token(14.0)
    meter.ended("length", 14.0)
    seen = {name: list(counters.series(name, "bf16")) for name in HISTOGRAMS}
    assert seen == {
        "time_to_first_token": [3.0],
        "inter_token_latency": [0.25, 0.75],
        "e2e_request_latency": [4.0],
        "request_queue_time": [1.5],
        "request_prefill_time": [1.0],
        "request_decode_time": [1.0],
        "request_prompt_tokens": [9],
        "request_generation_tokens": [3],
    }
    gone = SequenceMeter(counters, "bf16", 9, 0.0, 0.0)
    gone.ended("abort", 99.0)
    assert len(counters.series("e2e_request_latency", "bf16")) == 1
    deltas = counters.take()
    assert deltas["finished|bf16|length"] == deltas["finished|bf16|abort"] == 1


def test_every_name_that_boards_for_vllm_ask_for_is_there_from_the_start():
    page = render({})
    types = {f.name: f.type for f in text_string_to_metric_families(page)}
    for kind, names in PEERS_NAMES.items():
        for name in names:
            assert types[f"vllm:{name}"] == kind
            for variant in ("bf16", "int8-row"):
                assert f'model_name="m:{variant}"' in page.partition(f"# TYPE vllm:{name}")[2].partition("# HELP")[0]
    samples = parse(page)
    for reason in ("stop", "length", "abort", "error"):
        assert value(samples, "vllm:request_success_total", model_name="m:bf16", finished_reason=reason) == 0
    assert value(samples, "vllm:kv_cache_usage_perc", model_name="m:int8-row") == 0.25
    assert value(samples, "vllm:num_preemptions_total", model_name="m:bf16") == 1
    assert value(samples, "octavo_weights_bytes", variant="int8-row", kind="shared") == 30
    assert value(samples, "octavo_rejected_total", reason="queue_full") == 0
    assert value(samples, "octavo_step_seconds_bucket", le="0.001") == 5
    assert value(samples, "octavo_step_seconds_bucket", le="30.0") == 5
    assert value(samples, "octavo_step_seconds_count") == 7
    assert value(samples, "octavo_step_seconds_sum") == 9.5
    assert value(samples, "octavo_device_wait_seconds_total") == 1.5
    assert value(samples, "vllm:num_requests_waiting", model_name="m:bf16") == 4
    waiting = {r: value(samples, "octavo_requests_waiting", variant="bf16", reason=r) for r in WAIT_REASONS}
    assert waiting == {"blocks": 3, "budget": 0, "rows": 1}
    assert value(samples, "octavo_graph_replays_total") == 4
    compiles = [value(samples, "octavo_kernel_compiles_total", when=w) for w in ("before_ready", "after_ready")]
    assert compiles == [30, 0]
    assert value(samples, "octavo_kv_blocks", state="free") == 40
    assert [f.name for f in text_string_to_metric_families(Page("1", "m", ()).render(None).decode())] == [
        "octavo_build_info",
        "octavo_engine_up",
    ]


# A live server, shared by the tests below in the order they stand here.


@pytest.fixture(scope="module")
def live(start_server):
    return start_server(api_processes=2, variants="bf16,int8-row")


def page_of(live) -> Samples:
    with live.client() as client:
        return parse(client.get("/metrics").text)


def settled(live) -> Samples:
    time.sleep(2.2)  # a report of the API process, then a Status of the parent
    return page_of(live)


def test_values_after_a_known_load(live):
    ids = [11, 13, 17, 19] * 5
    body = {"model": "pocket:int8-row", "prompt": ids, "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    before = settled(live)
    with live.client() as client:
        for _ in range(3):
            assert client.post("/v1/completions", json=body).status_code == 200
        twice = body | {"prompt": [ids, ids[:10]], "n": 2, "max_tokens": 2}  # four sequences
        assert client.post("/v1/completions", json=twice).status_code == 200
        with client.stream("POST", "/v1/completions", json=body | {"max_tokens": 1500, "stream": True}) as stream:
            next(stream.iter_lines())
        assert client.post("/v1/completions", json=body | {"max_tokens": 0}).status_code == 400
        assert client.post("/v1/completions", json=body | {"max_tokens": 10**5}).status_code == 400
        assert client.post("/v1/completions", json=body | {"model": "other"}).status_code == 404
    after = settled(live)

    def grown(name: str, **labels: str) -> float:
        return value(after, name, **labels) - before.get((name, tuple(sorted(labels.items()))), 0)

    model = {"model_name": "pocket:int8-row"}
    assert grown("vllm:request_success_total", finished_reason="length", **model) == 7
    assert grown("vllm:request_success_total", finished_reason="abort", **model) == 1
    assert grown("vllm:prompt_tokens_total", **model) == 3 * 20 + 2 * 20 + 2 * 10 + 20
    tokens = grown("vllm:generation_tokens_total", **model)
    assert 3 * 6 + 4 * 2 < tokens < 3 * 6 + 4 * 2 + 1500
    assert grown("vllm:request_generation_tokens_sum", **model) == 3 * 6 + 4 * 2
    assert grown("vllm:request_prompt_tokens_sum", **model) == 3 * 20 + 2 * 20 + 2 * 10
    assert grown("vllm:request_prompt_tokens_bucket", le="10.0", **model) == 2
    assert grown("vllm:time_to_first_token_seconds_count", **model) == 8
    assert grown("vllm:inter_token_latency_seconds_count", **model) == tokens - 8
    assert grown("vllm:request_queue_time_seconds_count", **model) == 8
    for name in ("e2e_request_latency", "request_decode_time"):
        assert grown(f"vllm:{name}_seconds_count", **model) == 7
    decode, whole = (grown(f"vllm:{n}_seconds_sum", **model) for n in ("request_decode_time", "e2e_request_latency"))
    assert 0 < decode < whole < 30
    assert grown("octavo_rejected_total", reason="invalid_request") == 1
    assert grown("octavo_rejected_total", reason="context_length_exceeded") == 1
    assert grown("octavo_rejected_total", reason="model_not_found") == 1
    labels = {"endpoint": "completions", "variant": "int8-row"}
    assert grown("octavo_requests_total", status="200", **labels) == 4
    assert grown("octavo_requests_total", status="499", **labels) == 1  # the one whose client left
    assert 0 < grown("octavo_device_wait_seconds_total") < grown("octavo_step_seconds_sum") < 60
    assert grown("octavo_step_seconds_count") >= 3 * 6 + 2
    assert value(after, "vllm:generation_tokens_total", model_name="pocket:bf16") == 0


REFUSALS = {
    "invalid_http": [b"NOT HTTP\r\n\r\n", b"FROB / HTTP/1.1\r\n\r\n", b"POST / HTTP/1.1\r\nno colon\r\n\r\n"],
    "headers_too_large": [b"GET / HTTP/1.1\r\nx: " + b"a" * 70_000 + b"\r\n\r\n"],
    "not_found": [b"GET /no-%d HTTP/1.1\r\nconnection: close\r\n\r\n" % i for i in range(2)],
    "method_not_allowed": [b"DELETE /v1/models HTTP/1.1\r\nconnection: close\r\n\r\n"],
    "unsupported_media_type": [b"POST /tokenize HTTP/1.1\r\nconnection: close\r\n\r\n"],
    "request_too_large": [
        b"POST /tokenize HTTP/1.1\r\ncontent-type: application/json\r\ncontent-length: 99999999\r\n\r\n"
    ],
    "invalid_json": [
        b"POST /tokenize HTTP/1.1\r\ncontent-type: application/json\r\ncontent-length: 1\r\nconnection: close\r\n\r\n{"
    ],
}


def test_every_refusal_is_counted_by_its_reason(live):
    """Of the protocol, before the application sees a request, as of the routes."""
    before = settled(live)
    host, port = live.url.removeprefix("http://").split(":")
    for request in (r for some in REFUSALS.values() for r in some):
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(request)
            assert connection.recv(65536).startswith(b"HTTP/1.1 4")
    after = settled(live)

    def grown(name: str, label: str) -> dict[str, float]:
        sums: dict[str, float] = {}
        for key in after:
            if key[0] == name and after[key] > before.get(key, 0):
                of = dict(key[1])[label]
                sums[of] = sums.get(of, 0) + after[key] - before.get(key, 0)
        return sums

    assert grown("octavo_rejected_total", "reason") == {reason: len(some) for reason, some in REFUSALS.items()}
    statuses = grown("octavo_requests_total", "status")
    assert statuses.pop("200") >= 1  # the page itself
    assert statuses == {"400": 4, "404": 2, "405": 1, "413": 1, "415": 1, "431": 1}


def test_ten_thousand_odd_requests_do_not_grow_the_page(live):
    odd_methods = ("PROPFIND", "MKCOL", "PUT", "DELETE", "PATCH", "OPTIONS", "REPORT", "LINK", "NOTIFY", "GET")

    def send(numbers: range) -> int:
        """Requests in one piece over one connection; how many answers came."""
        host, port = live.url.removeprefix("http://").split(":")
        parts = []
        for i in numbers:
            method, body = odd_methods[i % 10], b""
            path = ["/x{}/y?z={}", "/v1/models/m{}", "/v1/completions/{}", "/metrics{}"][i % 4].format(i, i)
            if i % 5 == 0:
                method, path = "POST", "/v1/completions"
                body = b'{"model":"model-%d","prompt":"p","max_tokens":1}' % i
            head = (
                f"{method} {path} HTTP/1.1\r\nhost: h\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
            )
            parts.append(f"{head}\r\nx-request-id: id-{i}\r\nuser-agent: agent-{i}\r\n\r\n".encode() + body)
        count = 0
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            for start in range(0, len(parts), 50):
                batch = parts[start : start + 50]
                connection.sendall(b"".join(batch))
                seen = b""
                while seen.count(b"HTTP/1.1 ") < len(batch):
                    piece = connection.recv(1 << 16)
                    assert piece, seen[-300:]
                    seen += piece
                count += len(batch)
        return count

    with live.client() as client:  # every kind of answer once, so that its series exist
        for method in odd_methods:
            client.request(method, "/nowhere")
            client.request(method, "/v1/completions")
    send(range(40))
    before = settled(live)
    assert sum(send(range(i, i + 2500)) for i in range(0, 10_000, 2500)) == 10_000
    after = settled(live)
    assert after.keys() == before.keys()
    answered = [sum(v for (name, _), v in page.items() if name == "octavo_requests_total") for page in (before, after)]
    assert answered[1] - answered[0] >= 10_000
    values: dict[str, set[str]] = {}
    for _, labels in after:
        for name, label in labels:
            values.setdefault(name, set()).add(label)
    assert values.keys() <= ALLOWED.keys() | {"le", *FREE}
    odd = {name: found - ALLOWED[name] for name, found in values.items() if name in ALLOWED}
    assert not any(odd.values()), odd


def api_pids(live) -> list[int]:
    pid = live.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(c) for c in children if b"server.app" in Path(f"/proc/{c}/cmdline").read_bytes()]


def test_counters_survive_the_death_of_api_processes(live):
    before = settled(live)
    for pid in api_pids(live):
        os.kill(pid, signal.SIGKILL)
    end = time.monotonic() + 60
    while True:
        try:
            with live.client() as client:
                if client.get("/ready").status_code == 200:
                    break
        except httpx.TransportError:
            pass  # nobody listens at this moment
        assert time.monotonic() < end
        time.sleep(0.1)
    body = {"model": "pocket:int8-row", "prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True}
    with live.client() as client:
        assert client.post("/v1/completions", json=body).status_code == 200
    after = settled(live)
    counted = [key for key in before if key[0].endswith(("_total", "_bucket", "_sum", "_count"))]
    assert len(counted) > 500
    assert all(after[key] >= before[key] for key in counted)
    name, labels = "vllm:generation_tokens_total", {"model_name": "pocket:int8-row"}
    assert value(after, name, **labels) - value(before, name, **labels) == 4
