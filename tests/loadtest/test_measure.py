"""The load generator against a stub that streams over a real socket: counts, times, errors, processes."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiohttp import web

from loadtest.measure import Load, Tally, main, measure, percentiles, summarize

ROOT = Path(__file__).resolve().parents[2]


class Stub:
    """Streams `max_tokens` events; fails as the model's name says. Remembers bodies, keys and how many ran at once."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, object]] = []
        self.keys: set[str | None] = set()
        self.at_once = self.most_at_once = 0

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.keys.add(request.headers.get("Authorization"))
        if body["model"] == "unknown":
            return web.json_response({"error": {"message": "no such model"}}, status=404)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await asyncio.sleep(0.05)
        for i in range(body["max_tokens"]):
            event = json.dumps({"choices": [{"index": 0, "text": "é "}]}).encode()
            await response.write(b"data: " + event[:9])  # an event may come in two pieces
            await response.write(event[9:] + b"\n\n")
            if body["model"] == "dies" and i == 1:
                await response.write(b'data: {"error": {"message": "engine died"}}\n\n')
                return response
            if body["model"] == "cut" and i == 1:
                return response
            await asyncio.sleep(0.01)
        usage = {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": body["max_tokens"]}}
        await response.write(b"data: " + json.dumps(usage).encode() + b"\n\ndata: [DONE]\n\n")
        self.at_once -= 1
        return response


@pytest.fixture
def stub() -> Iterator[tuple[Stub, str]]:
    """The stub in a thread with a loop of its own, and its URL."""
    stub = Stub()
    loop = asyncio.new_event_loop()

    async def start() -> tuple[web.AppRunner, int]:
        app = web.Application()
        app.router.add_post("/v1/completions", stub.completions)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner, runner.addresses[0][1]

    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    runner, port = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    yield stub, f"http://127.0.0.1:{port}"
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_a_run_counts_and_times(stub: tuple[Stub, str]) -> None:
    server, url = stub
    load = Load(url, ("m:a", "m:b"), concurrency=3, requests=7, input_tokens=5, output_tokens=4, api_key="secret")
    result = measure(load)
    assert (result["done"], result["errors"], result["output_tokens_total"]) == (7, 0, 28)
    assert server.most_at_once == 3 and server.keys == {"Bearer secret"}
    assert [body["model"] for body in server.bodies].count("m:a") == 4
    prompts = [body["prompt"] for body in server.bodies]
    assert all(len(p) == 5 and all(3 <= i <= 999 for i in p) for p in prompts) and prompts[0] != prompts[1]
    assert result["ttft_ms"]["p50"] >= 50 and result["gap_ms"]["p50"] >= 10
    assert result["output_tokens_per_second"] == pytest.approx(28 / result["seconds"], rel=0.01)
    assert "secret" not in json.dumps(result) + repr(load)


@pytest.mark.parametrize(
    ("model", "said"), [("unknown", "HTTP 404"), ("dies", "engine died"), ("cut", "without [DONE]")]
)
def test_failed_requests_are_counted_and_the_rest_goes_on(stub: tuple[Stub, str], model: str, said: str) -> None:
    result = measure(Load(stub[1], ("m", model), concurrency=2, requests=6, input_tokens=2, output_tokens=3))
    assert (result["done"], result["errors"]) == (3, 3)
    assert said in result["first_error"]


def test_no_server_is_an_error_not_a_traceback() -> None:
    result = measure(Load("http://127.0.0.1:9", ("m",), concurrency=1, requests=1))
    assert result["errors"] == 1 and result["ttft_ms"] is None


def test_the_command_spreads_over_processes(stub: tuple[Stub, str]) -> None:
    argv = [stub[1] + "/v1/", "--model", "m", "--variants", "a,b", "--concurrency", "1,3", "--requests", "5"]
    argv += ["--input-tokens", "4", "--output-tokens", "2", "--processes", "2", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "loadtest.measure", *argv], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    runs = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(r["concurrency"], r["done"], r["errors"]) for r in runs] == [(1, 5, 0), (3, 5, 0)]
    prompts = [tuple(body["prompt"]) for body in stub[0].bodies]  # type: ignore[arg-type]
    assert len(prompts) == 12 and len(set(prompts)) == 12


def test_the_table_and_the_exit_code(stub: tuple[Stub, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([stub[1], "--model", "m", "--concurrency", "2", "--output-tokens", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[0] == "2"
    assert main([stub[1], "--model", "unknown", "--concurrency", "1"]) == 1
    assert "first error: ValueError: HTTP 404" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([stub[1], "--model", "m", "--concurrency", "1,x"])


def test_figures() -> None:
    assert percentiles([0.001 * i for i in range(1, 101)]) == {"p50": 50.0, "p90": 90.0, "p99": 99.0}
    assert percentiles([0.002]) == {"p50": 2.0, "p90": 2.0, "p99": 2.0}
    tallies = [Tally(begin=1.0, end=3.0, cpu_seconds=1.0, output_tokens=10), Tally(begin=2.0, end=5.0, cpu_seconds=0.3)]
    result = summarize(Load("u", ("m",), 2, 2), tallies)
    assert (result["seconds"], result["output_tokens_per_second"], result["client_cpu"]) == (4.0, 2.5, 0.5)
