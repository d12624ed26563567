"""Closed-loop streaming load on an OpenAI-style /v1/completions server: octavo-load.

`concurrency` slots each send a request, read its stream to the end and send the next, until `requests` are done.
Prompts are random token ids, so that no two share a prefix; generation is greedy and ignores EOS, so that every answer
has the same length. Variants are taken in turn. Slots are spread over `processes`: one Python process reads some
ten thousand events a second, and `client_cpu` near 1.0 says that the figure is the client's, not the server's.

Time to first token (TTFT) runs from sending to the first event with text; a gap lies between two such events of one
stream. Tokens are counted by the server's usage. Percentiles are nearest-rank.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any

import aiohttp

FIRST_TOKEN_ID = 3  # below are control tokens in many vocabularies


@dataclass(frozen=True)
class Load:
    """What is asked of one server. Lengths are in tokens; a prompt's ids lie in [3, `max_token_id`]."""

    url: str
    models: tuple[str, ...]
    concurrency: int
    requests: int
    input_tokens: int = 128
    output_tokens: int = 64
    processes: int = 1
    max_token_id: int = 999
    seed: int = 0
    timeout_seconds: float = 600.0
    api_key: str | None = field(default=None, repr=False)


@dataclass
class Tally:
    """What one client process saw. Times are in seconds; begin and end are of the machine's monotonic clock."""

    begin: float = 0.0
    end: float = 0.0
    cpu_seconds: float = 0.0
    done: int = 0
    output_tokens: int = 0
    ttft: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def percentiles(values: list[float]) -> dict[str, float] | None:
    """p50, p90 and p99 in milliseconds; None without values."""
    if not values:
        return None
    ordered = sorted(values)
    return {f"p{q}": round(1e3 * ordered[math.ceil(q / 100 * len(ordered)) - 1], 3) for q in (50, 90, 99)}


def summarize(load: Load, tallies: list[Tally]) -> dict[str, Any]:
    """One run's figures: the load's own settings (without the key) and what was measured."""
    seconds = max(t.end for t in tallies) - min(t.begin for t in tallies)
    errors = [message for t in tallies for message in t.errors]
    output_tokens = sum(t.output_tokens for t in tallies)
    settings = asdict(load)
    del settings["api_key"]
    return settings | {
        "seconds": round(seconds, 3),
        "done": sum(t.done for t in tallies),
        "errors": len(errors),
        "first_error": errors[0] if errors else None,
        "output_tokens_total": output_tokens,
        "output_tokens_per_second": round(output_tokens / seconds, 1),
        "requests_per_second": round(sum(t.done for t in tallies) / seconds, 2),
        "ttft_ms": percentiles([v for t in tallies for v in t.ttft]),
        "gap_ms": percentiles([v for t in tallies for v in t.gaps]),
        "client_cpu": round(max(t.cpu_seconds / (t.end - t.begin) for t in tallies), 2),
    }


def measure(load: Load) -> dict[str, Any]:
    """Run `load` and return `summarize`'s figures. Failed requests are counted, not raised."""
    count = min(load.processes, load.concurrency)
    if count == 1:
        return summarize(load, [run_slots(load, _bodies(load))])
    context = multiprocessing.get_context("spawn")
    pairs = [context.Pipe() for _ in range(count)]
    workers = []
    for i, (_, theirs) in enumerate(pairs):
        share = replace(
            load,
            concurrency=_share(load.concurrency, count, i),
            requests=_share(load.requests, count, i),
            seed=load.seed * 1000 + i,
        )
        workers.append(context.Process(target=_work, args=(share, theirs)))
    try:
        for worker, (_, theirs) in zip(workers, pairs, strict=True):
            worker.start()
            theirs.close()  # so that a worker's death is an EOF here
        for ours, _ in pairs:
            ours.recv()  # built its prompts
        for ours, _ in pairs:
            ours.send(True)
        return summarize(load, [ours.recv() for ours, _ in pairs])
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def _share(total: int, count: int, i: int) -> int:
    return total // count + (i < total % count)


def _work(load: Load, pipe: Connection) -> None:
    bodies = _bodies(load)
    pipe.send(True)
    pipe.recv()
    pipe.send(run_slots(load, bodies))


def _bodies(load: Load) -> list[bytes]:
    """The requests' JSON, built before the clock runs."""
    rng = random.Random(load.seed)
    return [
        json.dumps(
            {
                "model": load.models[i % len(load.models)],
                "prompt": [rng.randint(FIRST_TOKEN_ID, load.max_token_id) for _ in range(load.input_tokens)],
                "max_tokens": load.output_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()
        for i in range(load.requests)
    ]


def run_slots(load: Load, bodies: list[bytes]) -> Tally:
    """Send `bodies` from `load.concurrency` slots of this process."""
    tally = Tally()
    cpu = time.process_time()
    tally.begin = time.monotonic()
    asyncio.run(_slots(load, bodies, tally))
    tally.end = time.monotonic()
    tally.cpu_seconds = time.process_time() - cpu
    return tally


async def _slots(load: Load, bodies: list[bytes], tally: Tally) -> None:
    headers = {"Content-Type": "application/json"}
    if load.api_key:
        headers["Authorization"] = f"Bearer {load.api_key}"
    todo = iter(bodies)
    async with aiohttp.ClientSession(
        headers=headers,
        timeout=aiohttp.ClientTimeout(total=load.timeout_seconds),
        connector=aiohttp.TCPConnector(limit=0),
    ) as session:
        slots = [_slot(session, f"{load.url}/v1/completions", todo, tally) for _ in range(load.concurrency)]
        await asyncio.gather(*slots)


async def _slot(session: aiohttp.ClientSession, url: str, todo: Iterator[bytes], tally: Tally) -> None:
    for body in todo:
        try:
            await _stream(session, url, body, tally)
        except (aiohttp.ClientError, TimeoutError, ValueError) as e:
            tally.errors.append(f"{type(e).__name__}: {e}")


async def _stream(session: aiohttp.ClientSession, url: str, body: bytes, tally: Tally) -> None:
    """Send one request and read its events. Raises ValueError when the server's answer is not a whole stream."""
    last, first = time.monotonic(), True
    tokens, buffer, ended = 0, b"", False
    async with session.post(url, data=body) as response:
        if response.status != 200:
            raise ValueError(f"HTTP {response.status}: {(await response.text())[:300]}")
        async for chunk in response.content.iter_any():
            now = time.monotonic()
            *events, buffer = (buffer + chunk).split(b"\n\n")
            for event in events:
                # Searched, not parsed: parsing every event would halve what one client process can take.
                if event.startswith(b'data: {"error"'):
                    raise ValueError(event[:300].decode(errors="replace"))
                if b'"text":' in event:
                    (tally.ttft if first else tally.gaps).append(now - last)
                    last, first = now, False
                if b'"completion_tokens":' in event:
                    tokens = json.loads(event.removeprefix(b"data: "))["usage"]["completion_tokens"]
                ended = ended or event == b"data: [DONE]"
    if not ended:
        raise ValueError("the stream ended without [DONE]")
    tally.done += 1
    tally.output_tokens += tokens


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="octavo-load",
        description="Measure a server under streaming load: tokens/s, time to first token, gaps between events.",
        epilog="example: octavo-load http://127.0.0.1:8000 --model pocket --variants bf16,int8-row --concurrency 1,16",
    )
    parser.add_argument("url", metavar="URL", help="the server, without /v1")
    parser.add_argument("--model", required=True, help="model name")
    parser.add_argument("--variants", help="take these of the model in turn: a,b asks for MODEL:a and MODEL:b")
    parser.add_argument(
        "--concurrency", default="1,16", metavar="N,…", help="streams at once, one run for each number (default: 1,16)"
    )
    parser.add_argument(
        "--input-tokens", type=_positive, default=128, metavar="N", help="length of a prompt (default: 128)"
    )
    parser.add_argument(
        "--output-tokens", type=_positive, default=64, metavar="N", help="length of an answer (default: 64)"
    )
    parser.add_argument(
        "--requests", type=_positive, metavar="N", help="requests in each run (default: 4 for each stream)"
    )
    parser.add_argument("--processes", type=_positive, default=1, metavar="N", help="client processes (default: 1)")
    parser.add_argument(
        "--max-token-id", type=_positive, default=999, metavar="ID", help="largest id in a prompt (default: 999)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the prompts (default: 0)")
    parser.add_argument(
        "--timeout", type=float, default=600.0, metavar="SECONDS", help="for one request (default: 600)"
    )
    parser.add_argument("--api-key", help="key to send (default: OCTAVO_API_KEY of the environment)")
    parser.add_argument("--json", action="store_true", help="print one JSON object for each run, no table")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The console script octavo-load. Exit code 1 when a request failed, 2 for wrong options."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        concurrencies = [_positive(word) for word in args.concurrency.split(",")]
    except (ValueError, argparse.ArgumentTypeError) as e:
        parser.error(f"argument --concurrency: {e}")
    if args.max_token_id <= FIRST_TOKEN_ID:
        parser.error(f"argument --max-token-id: must be above {FIRST_TOKEN_ID}")
    load = Load(
        url=args.url.rstrip("/").removesuffix("/v1"),
        models=tuple(f"{args.model}:{v}" for v in args.variants.split(",")) if args.variants else (args.model,),
        concurrency=1,
        requests=2,
        input_tokens=args.input_tokens,
        output_tokens=args.output_tokens,
        processes=args.processes,
        max_token_id=args.max_token_id,
        timeout_seconds=args.timeout,
        seed=args.seed,
        api_key=args.api_key or os.environ.get("OCTAVO_API_KEY"),
    )
    measure(replace(load, requests=len(load.models), seed=load.seed + 10**6))  # warm-up, one of each variant
    failed = False
    if not args.json:
        print("streams   tok/s    req/s  TTFT p50/p90/p99 ms      gap p50/p90/p99 ms       errors  client CPU")
    for number, concurrency in enumerate(concurrencies):
        requests = args.requests or 4 * concurrency
        result = measure(replace(load, concurrency=concurrency, requests=requests, seed=load.seed + number))
        failed = failed or result["errors"] > 0
        print(json.dumps(result) if args.json else _row(result), flush=True)
        if result["errors"]:
            print(f"octavo-load: first error: {result['first_error']}", file=sys.stderr)
    return int(failed)


def _row(result: dict[str, Any]) -> str:
    def times(values: dict[str, float] | None) -> str:
        return " / ".join(f"{v:.1f}" for v in values.values()) if values else "-"

    rates = f"{result['output_tokens_per_second']:>7.0f} {result['requests_per_second']:>8.2f}"
    waits = f"{times(result['ttft_ms']):<24} {times(result['gap_ms']):<24}"
    return f"{result['concurrency']:>7} {rates}  {waits} {result['errors']:>6} {result['client_cpu']:>11.2f}"


if __name__ == "__main__":
    sys.exit(main())
