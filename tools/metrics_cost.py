"""What the metrics cost: CPU time of the counting as a share of one core, at a given load.

    python tools/metrics_cost.py [--tokens 14800] [--step-ms 4]

Throughput with and without metrics cannot be told apart to one in a hundred on a machine that does anything else; CPU
time can. So the counting code runs alone, as often as the load would have it: for each token, end of a sequence, report
and status, and one page for each of Prometheus' scrapes every 5 s. The defaults are one API process at its best beside
an H200 (14,800 tokens/s, answers of 128 tokens), and steps of 4 ms. A process that has a core to itself loses
at most this share of its throughput.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from engine.config import EngineConfig
from engine.core import Engine
from engine.messages import ApiReport, EngineReport, Started, Status
from engine.runner import Flight, PhaseTimer
from server.errors import REJECT_REASONS
from server.meter import SequenceMeter
from server.metrics import HISTOGRAMS, Counters, Page

POCKET = Path(__file__).resolve().parents[1] / "models" / "pocket"
VARIANTS = ("bf16", "int8-row", "fp8-row")
OUTPUT_TOKENS = 128
SCRAPE_SECONDS, REPORT_SECONDS, STATUS_SECONDS = 5.0, 1.0, 0.5
ENCODER = msgspec.msgpack.Encoder()


def cost(work: Callable[[], object]) -> float:
    """CPU seconds of one call, the best of three rounds."""
    count, took = 1, 0.0
    while took < 0.02:
        count *= 4
        took = timed(work, count)
    return min(timed(work, count) for _ in range(3)) / count


def timed(work: Callable[[], object], count: int) -> float:
    start = time.process_time()
    for _ in range(count):
        work()
    return time.process_time() - start


def api_costs(tokens: float, engine: Engine) -> dict[str, tuple[float, float]]:
    """What is counted in an API process: times a second, CPU seconds of one."""
    counters = Counters()
    gaps = counters.series("inter_token_latency", "bf16")
    meter = SequenceMeter(counters, "bf16", 128, 0.0, 0.0)

    def thousand_tokens() -> None:
        for _ in range(1000):
            meter.token(1.0)
        gaps.clear()

    def sequence() -> None:
        one = SequenceMeter(counters, "bf16", 128, 0.0, 0.0)
        one.token(1.0)
        one.started(Started(1, 0, 0.1), 1.0)
        one.ended("length", 2.0)

    a_second = [0.001 * (1 + i % 97) for i in range(int(tokens * REPORT_SECONDS))]

    def report() -> None:
        gaps.extend(a_second)
        ENCODER.encode(ApiReport(1, True, counters.take()))

    totals = {f"{h}|{v}|{i}": 100.0 + i for h in HISTOGRAMS for v in VARIANTS for i in range(20)}
    status = Status(0, "ready", engine.info, engine.stats(), totals)
    frame, decoder, page = ENCODER.encode(status), msgspec.msgpack.Decoder(Status), Page("1", "m", REJECT_REASONS)
    return {
        "token": (tokens, cost(thousand_tokens) / 1000),
        "sequence": (tokens / OUTPUT_TOKENS, cost(sequence)),
        "report": (1 / REPORT_SECONDS, cost(report)),
        "status": (1 / STATUS_SECONDS, cost(lambda: decoder.decode(frame))),
        "page": (1 / SCRAPE_SECONDS, cost(lambda: page.render(status))),
    }


def engine_costs(step_seconds: float, engine: Engine) -> dict[str, tuple[float, float]]:
    """The same of the engine process."""
    clocks = [PhaseTimer(engine.runner.device) for _ in range(2)]
    for clock in clocks:
        clock.stop()
    flight = Flight([], [])

    def step() -> None:
        for _ in VARIANTS:
            clocks[1].seconds_since(clocks[0])
        engine._count_step(flight)

    return {
        "step": (1 / step_seconds, cost(step)),
        "report": (1 / STATUS_SECONDS, cost(lambda: ENCODER.encode(EngineReport(0, engine.stats())))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=float, default=14_800, help="tokens/s of one API process (default: 14800)")
    parser.add_argument("--step-ms", type=float, default=4.0, help="time of one step of the engine (default: 4)")
    args = parser.parse_args()
    engine = Engine(EngineConfig(model=str(POCKET), variants=VARIANTS, kv_cache_tokens=4096))
    for name, costs in (
        ("API process", api_costs(args.tokens, engine)),
        ("engine", engine_costs(args.step_ms / 1e3, engine)),
    ):
        print(f"{name}: {sum(often * each for often, each in costs.values()):.3%} of a core")
        for what, (often, each) in costs.items():
            print(f"  {what:<9} {often:9.1f} a second x {1e6 * each:8.2f} us = {often * each:.4%}")


if __name__ == "__main__":
    main()
