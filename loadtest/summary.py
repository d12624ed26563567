"""From what the workers saw to figures: percentiles, histograms, rates, whether an SLO was kept.

Percentiles are nearest-rank; times are in milliseconds. `ttft` and `e2e` count from when a request was due, `queue` is
how long it waited in the client, `itl` lies between two events with text, `tpot` is a request's time from first to
last event for each token after the first, `speed` its inverse in tokens/s.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from loadtest.drive import Tally
from loadtest.settings import Settings, Slo
from loadtest.stream import Record
from loadtest.workload import Point, models_of

PERCENTILES = (50, 90, 95, 99)
BUCKETS_PER_DECADE = 20
CPU_LIMIT = 0.85  # of a core: beyond, the client adds to what it measures
LATE_LIMIT_MS = 20.0  # how late the client may send at its p99
MEASURES = ("ttft", "itl", "tpot", "e2e", "queue", "speed")


def stats(values: Sequence[float]) -> dict[str, float] | None:
    """Count, mean, percentiles and largest; None without values."""
    if not values:
        return None
    ordered = sorted(values)
    n = len(ordered)
    found = {f"p{q}": round(ordered[math.ceil(q / 100 * n) - 1], 4) for q in PERCENTILES}
    return {"n": n, "mean": round(math.fsum(ordered) / n, 4), **found, "max": round(ordered[-1], 4)}


def histogram(values: Sequence[float]) -> list[list[float]]:
    """[upper bound, count] of every bucket that is not empty; 20 buckets a decade, the lowest ends at 0.001."""
    counts = Counter(max(-3 * BUCKETS_PER_DECADE, math.ceil(BUCKETS_PER_DECADE * math.log10(v))) if v > 0 else
                     -3 * BUCKETS_PER_DECADE for v in values)  # fmt: skip
    return [[float(f"{10 ** (k / BUCKETS_PER_DECADE):.6g}"), counts[k]] for k in sorted(counts)]


def measures(records: Sequence[Record], gaps: Sequence[float]) -> dict[str, list[float]]:
    """Every value of every measure, over requests that ended well (`queue`: over all)."""
    well = [r for r in records if not r.error]
    spoke = [r for r in well if r.first]
    several = [r for r in spoke if r.output_tokens > 1 and r.last > r.first]
    return {
        "ttft": [1e3 * (r.first - r.scheduled) for r in spoke],
        "itl": [1e3 * gap for gap in gaps],
        "tpot": [1e3 * (r.last - r.first) / (r.output_tokens - 1) for r in several],
        "e2e": [1e3 * (r.end - r.scheduled) for r in well],
        "queue": [1e3 * (r.sent - r.scheduled) for r in records],
        "speed": [(r.output_tokens - 1) / (r.last - r.first) for r in several],
    }


def summarize(s: Settings, point: Point, tallies: list[Tally]) -> dict[str, Any]:
    """One run's figures, with one row for each request (`rows`, columns as in `Record`)."""
    records = sorted((r for t in tallies for r in t.records), key=lambda r: r.scheduled)
    seconds = max([r.end for r in records], default=0.0)
    names = models_of(s)
    gaps = [[g for t in tallies for g in t.gaps[i]] for i in range(len(names))]
    all_gaps = [g for some in gaps for g in some]
    values = measures(records, all_gaps)
    result: dict[str, Any] = {
        "concurrency": point.concurrency or None,
        "rate": point.rate or None,
        "seconds": round(seconds, 4),
        **_counts(records, seconds),
        "errors_by_kind": dict(Counter(r.error for r in records if r.error)),
        "first_errors": {r.error: r.message for r in reversed(records) if r.error},
        **{f"{name}": stats(values[name]) for name in MEASURES},
        "histograms": {name: histogram(values[name]) for name in MEASURES},
        "models": {},
        "timeline": timeline(records, seconds),
        "interrupted": any(t.stopped for t in tallies),
        "rows": [list(r[:-1]) for r in records],
    }
    for i, name in enumerate(names if len(names) > 1 else []):
        mine = [r for r in records if r.model == i]
        own = measures(mine, gaps[i])
        result["models"][name] = _counts(mine, seconds) | {m: stats(own[m]) for m in MEASURES}
    result["client"] = client_figures(tallies, result)
    result["slo"] = check_slo(s.slo, result)
    return result


def _counts(records: Sequence[Record], seconds: float) -> dict[str, Any]:
    well = [r for r in records if not r.error]
    output = sum(r.output_tokens for r in well)
    over = seconds or 1.0
    return {
        "requests": len(records),
        "done": len(well),
        "errors": sum(r.error not in ("", "interrupted") for r in records),
        "prompt_tokens": sum(r.prompt_tokens for r in well),
        "cached_tokens": sum(r.cached_tokens for r in well),
        "output_tokens": output,
        "requests_per_second": round(len(well) / over, 4),
        "output_tokens_per_second": round(output / over, 2),
        "prompt_tokens_per_second": round(sum(r.prompt_tokens for r in well) / over, 2),
    }


def timeline(records: Sequence[Record], seconds: float) -> dict[str, list[float]]:
    """By second: requests sent, ended and failed, tokens (spread evenly between a request's events), in flight."""
    n = max(1, math.ceil(seconds))
    sent, ended, failed, tokens, flight = ([0.0] * n for _ in range(5))

    def at(t: float) -> int:
        return min(n - 1, max(0, int(t)))

    for r in records:
        sent[at(r.sent)] += 1
        (failed if r.error else ended)[at(r.end)] += 1
        for second in range(at(r.sent), at(r.end) + 1):
            flight[second] += max(0.0, min(r.end, second + 1) - max(r.sent, second))
        if r.last > r.first:
            per_second = r.output_tokens / (r.last - r.first)
            for second in range(at(r.first), at(r.last) + 1):
                tokens[second] += per_second * max(0.0, min(r.last, second + 1) - max(r.first, second))
        elif r.first:
            tokens[at(r.first)] += r.output_tokens
    rounded = {"sent": sent, "ended": ended, "failed": failed, "tokens": tokens, "in_flight": flight}
    return {name: [round(v, 2) for v in values] for name, values in rounded.items()}


def client_figures(tallies: list[Tally], result: dict[str, Any]) -> dict[str, Any]:
    """What the client itself cost, and a warning when it was the bottleneck."""
    cpu = max((t.cpu_seconds / max(t.end - t.begin, 1e-9) for t in tallies), default=0.0)
    events = sum(r.events for t in tallies for r in t.records)
    spent = sum(t.cpu_seconds for t in tallies)
    late = result["queue"]["p99"] if result["queue"] else 0.0
    warnings = []
    if cpu > CPU_LIMIT:
        warnings.append(f"a client process used {cpu:.0%} of a core: use more --processes, or believe the figures less")
    if late > LATE_LIMIT_MS:
        warnings.append(f"requests were sent late (p99 {late:.0f} ms): the client could not keep the schedule")
    return {
        "processes": len(tallies),
        "cpu": round(cpu, 3),
        "events": events,
        "events_per_cpu_second": round(events / spent) if spent else None,
        "warnings": warnings,
    }


def check_slo(slo: Slo, result: dict[str, Any]) -> dict[str, Any] | None:
    """Whether the run kept its limits, and which it broke; None without limits."""
    if not slo.limits:
        return None
    broken = []
    for limit in slo.limits:
        found = result[limit.measure]
        if found is None or found[limit.name] > limit.value:
            broken.append(f"{limit} (was {found[limit.name]:.3g}ms)" if found else f"{limit} (nothing measured)")
    failed = result["errors"] / max(1, result["requests"])
    if failed > slo.errors:
        broken.append(f"errors={slo.errors:.2%} (was {failed:.2%})")
    return {"kept": not broken, "broken": broken}
