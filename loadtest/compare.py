"""Two saved results side by side, run by run, with 95 % intervals.

A percentile's interval is of order statistics: the ranks that a binomial count of smaller values stays within (Conover,
Practical Nonparametric Statistics, 3.2); it assumes nothing of the distribution, but that requests are independent.
A rate's interval comes from the spread between seconds. A difference counts when the intervals do not overlap, which
is stricter than a test at 5 %.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from loadtest.settings import LoadError
from loadtest.stream import Record

Z = 1.96
SAME = ("arrivals", "input_tokens", "output_tokens", "prefix_tokens", "prompts", "trace", "length_scale")


class Estimate(NamedTuple):
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def quantile(values: list[float], q: float) -> Estimate | None:
    """Nearest-rank `q`-quantile and its interval; None for fewer than two values."""
    ordered, n = sorted(values), len(values)
    if n < 2:
        return None
    spread = Z * math.sqrt(n * q * (1 - q))
    low, high = math.floor(n * q - spread), math.ceil(n * q + spread)
    at = ordered[math.ceil(q * n) - 1]
    return Estimate(at, ordered[max(0, low - 1)], ordered[min(n - 1, high)])


def mean(values: list[float]) -> Estimate | None:
    n = len(values)
    if n < 2:
        return None
    middle = math.fsum(values) / n
    spread = Z * math.sqrt(math.fsum((v - middle) ** 2 for v in values) / (n - 1) / n)
    return Estimate(middle, middle - spread, middle + spread)


def estimates(run: dict[str, Any]) -> dict[str, Estimate]:
    """What is compared of one run. The last, partial second of the rate is left out."""
    rows = [Record(*row) for row in run["rows"]]
    well = [r for r in rows if not r.error]
    spoke = [r for r in well if r.first]
    series = {
        "TTFT ms": [1e3 * (r.first - r.scheduled) for r in spoke],
        "time a token ms": [1e3 * (r.last - r.first) / (r.output_tokens - 1) for r in spoke if r.output_tokens > 1],
        "end to end ms": [1e3 * (r.end - r.scheduled) for r in well],
    }
    found = {"output tokens/s": mean(run["timeline"]["tokens"][:-1])}
    for name, values in series.items():
        found |= {f"{name} p50": quantile(values, 0.5), f"{name} p99": quantile(values, 0.99)}
    return {name: estimate for name, estimate in found.items() if estimate is not None}


def compare_files(a: str, b: str) -> str:
    """The comparison as a text table. Raises LoadError for files that are no results, or not comparable."""
    documents = [_read(a), _read(b)]
    lines = []
    for key in SAME:
        values = [d["settings"][key] for d in documents]
        if values[0] != values[1]:
            lines.append(f"note: {key} differs: {values[0]} and {values[1]}")
    by_load = [{(r["concurrency"], r["rate"]): r for r in d["runs"]} for d in documents]
    common = [load for load in by_load[0] if load in by_load[1]]
    if not common:
        raise LoadError(f"{a} and {b} have no run at the same load")
    for load in common:
        runs = [runs[load] for runs in by_load]
        name = f"{load[0]} streams" if load[0] else f"{load[1]:g} requests/s" if load[1] else "trace"
        lines += [
            f"{name}: errors {runs[0]['errors']} and {runs[1]['errors']}",
            *_lines(estimates(runs[0]), estimates(runs[1])),
        ]
    return "\n".join(lines)


def _lines(a: dict[str, Estimate], b: dict[str, Estimate]) -> list[str]:
    lines = [f"  {'':<22} {'A [95 %]':<32} {'B [95 %]':<32} {'B/A':>7}"]
    for name in a:
        if name in b:
            ratio = f"{b[name].value / a[name].value:.3f}" if a[name].value else "-"
            apart = a[name].high < b[name].low or b[name].high < a[name].low
            verdict = "differs" if apart else "no clear difference"
            lines.append(f"  {name:<22} {a[name]!s:<32} {b[name]!s:<32} {ratio:>7}  {verdict}")
    return lines


def _read(path: str) -> dict[str, Any]:
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise LoadError(f"cannot read {path}: {e}") from None
    if not isinstance(document, dict) or not {"settings", "runs"} <= document.keys():
        raise LoadError(f"{path} is not a result of octavo-load")
    return document
