"""What the metrics cost: CPU time of the counting as a share of the processes that count, under load.

    python tools/metrics_cost.py [--concurrency 32] [--seconds 20] [-- octavo-serve's options]

Throughput with and without metrics cannot be told apart to one in a hundred on a machine that does anything else; CPU
time can. So a server is started and put under load, and the kernel tells what its API and engine processes used. Then
the same counting code runs alone, as often as it did under that load: tokens, ends of sequences, reports, statuses,
steps, and one page for each of Prometheus' scrapes every 5 s.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import urllib.request
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path

import msgspec

from engine.messages import STEP_BOUNDS, ApiReport, EngineInfo, EngineStats, Started, Status, VariantInfo, VariantStats
from server.errors import REJECT_REASONS
from server.meter import SequenceMeter
from server.metrics import Counters, Page

SCRAPE_SECONDS, REPORT_SECONDS, STATUS_SECONDS = 5.0, 1.0, 0.5
VARIANTS = ("bf16", "int8-row", "fp8-row")


def children(pid: int, module: str) -> list[int]:
    """Process ids of `python -m module` that `pid` started."""
    pids = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(p) for p in pids if module.encode() in Path(f"/proc/{p}/cmdline").read_bytes().split(b"\0")]


def cpu_seconds(pids: list[int]) -> float:
    """User and system time of all threads of these processes."""
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(f[11]) + int(f[12]) for f in fields) / os.sysconf("SC_CLK_TCK")


def steps(url: str) -> float:
    with urllib.request.urlopen(f"{url}/metrics") as response:
        lines = response.read().decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("octavo_step_seconds_count"))


def each(work: Callable[[], object], seconds: float = 0.5) -> float:
    """CPU seconds of one call, the best of five rounds."""
    work()
    count, best = 1, float("inf")
    while True:
        start = time.process_time()
        for _ in range(count):
            work()
        took = time.process_time() - start
        if took > seconds / 10:
            break
        count *= 4
    for _ in range(5):
        start = time.process_time()
        for _ in range(count):
            work()
        best = min(best, (time.process_time() - start) / count)
    return best


def api_costs(tokens_a_second: float) -> dict[str, float]:
    """CPU seconds: of a token, a sequence's begin and end, a second's report, a Status, a page."""
    counters = Counters()
    meter = SequenceMeter(counters, "bf16", 128, 0.0, 0.0)
    batch = range(1000)

    def count_tokens() -> None:
        for _ in batch:
            meter.token(1.0)
        counters.series("inter_token_latency", "bf16").clear()

    def live() -> None:
        one = SequenceMeter(counters, "bf16", 128, 0.0, 0.0)
        one.token(1.0)
        one.started(Started(1, 0, 0.1), 1.0)
        one.ended("length", 2.0)

    gaps = [0.001 * (1 + i % 97) for i in range(int(tokens_a_second * REPORT_SECONDS))]
    encoder = msgspec.msgpack.Encoder()

    def report() -> None:
        counters.series("inter_token_latency", "bf16").extend(gaps)
        encoder.encode(ApiReport(1, True, counters.take()))

    token, sequence = each(count_tokens) / len(batch), each(live)
    second = each(report)
    status = status_of(counters)
    frame, decoder, page = encoder.encode(status), msgspec.msgpack.Decoder(Status), Page("1", "m", REJECT_REASONS)
    return {
        "token": token,
        "sequence": sequence,
        "report": second,
        "status": each(lambda: decoder.decode(frame)),
        "page": each(lambda: page.render(status)),
    }


def status_of(counters: Counters) -> Status:
    """A Status as full as it gets: every series of three variants."""
    totals: dict[str, float] = {}
    for name in VARIANTS:
        for key in ("time_to_first_token", "inter_token_latency", "e2e_request_latency", "request_decode_time"):
            totals |= {f"{key}|{name}|{i}": 100.0 + i for i in range(23)}
    info = EngineInfo(
        2048, 1024, [0], "bf16", [VariantInfo(n, b"", 16, 1, 1) for n in VARIANTS], 4096, 256, True, "cpu", "float32"
    )
    stats = {n: VariantStats(10**6, 10.0, 10**6, 10.0, 5, 10**6, 10**5, 10, {"budget": 1}) for n in VARIANTS}
    return Status(0, "ready", info, EngineStats(0.0, 4096, 100, 100, stats, [10] * (len(STEP_BOUNDS) + 1)), totals)


def engine_costs() -> dict[str, float]:
    """CPU seconds of one step's counting and of one report."""
    buckets, state = [0] * (len(STEP_BOUNDS) + 1), [0.0, 0.0]

    def step() -> None:  # as Engine._count_step and the idle time of one batch
        now = time.monotonic()
        seconds = now - max(state[0], now - 0.01)
        state[0] = now
        state[1] += max(0.0, seconds)
        buckets[bisect_left(STEP_BOUNDS, seconds)] += 1

    encoder, stats = msgspec.msgpack.Encoder(), status_of(Counters()).stats
    return {"step": each(step), "report": each(lambda: encoder.encode(stats))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--concurrency", default="32")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("options", nargs="*", default=["models/pocket", "--variants", ",".join(VARIANTS)])
    args = parser.parse_args()
    command = [sys.executable, "-m", "server.supervisor", *args.options, "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        measure(server.stdout.readline().split()[1], server.pid, args.concurrency, args.seconds)
    finally:
        server.terminate()
        server.wait()


def measure(url: str, pid: int, concurrency: str, duration: float) -> None:
    api, engine = children(pid, "server.app"), children(pid, "engine.process")
    before = cpu_seconds(api), cpu_seconds(engine), steps(url)
    words = ["--concurrency", concurrency, "--duration", str(duration), "--output-tokens", "64", "--json"]
    load = [sys.executable, "-m", "loadtest.measure", url, *words]
    result = json.loads(subprocess.run(load, check=True, capture_output=True, text=True).stdout)
    time.sleep(2)  # for the last report
    after = cpu_seconds(api), cpu_seconds(engine), steps(url)
    spent, engine_spent, num_steps = (b - a for a, b in zip(before, after, strict=True))
    seconds, tokens, done = result["seconds"], result["output_tokens"], result["done"]
    a, e = api_costs(tokens / seconds), engine_costs()
    counting = tokens * a["token"] + done * a["sequence"] + seconds * a["page"] / SCRAPE_SECONDS
    counting += len(api) * seconds * (a["report"] / REPORT_SECONDS + a["status"] / STATUS_SECONDS)
    engine_counting = num_steps * e["step"] + seconds * e["report"] / STATUS_SECONDS
    print(f"{tokens} tokens, {done} sequences, {num_steps:.0f} steps in {seconds:.1f} s")
    for name, cost in (*a.items(), *((f"engine {k}", v) for k, v in e.items())):
        print(f"  {name:<14} {1e6 * cost:9.2f} us")
    print(f"API processes: {counting:.4f} of {spent:.2f} s CPU, {counting / spent:.3%}")
    print(f"engine:        {engine_counting:.4f} of {engine_spent:.2f} s CPU, {engine_counting / engine_spent:.3%}")


if __name__ == "__main__":
    main()
