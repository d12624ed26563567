"""`/metrics`: one page for the whole server, whichever API process answers.

Each API process sends what it counts to the parent as deltas (`Counters`, in `ApiReport`); the parent adds them up and
publishes the totals with the engine's statistics (`Status`). The page is made from the last Status alone. Label values
come from fixed lists (routes, loaded variants, status codes), so nothing a client sends can make the page grow.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.messages import Status, VariantStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SEPARATOR = "|"  # between a metric's name and its label values, in the keys of `ApiReport.deltas`
REQUESTS = "requests"

# field of VariantStats -> metric name, help
VARIANT_COUNTERS = {
    "prefill_tokens": ("octavo_prefill_tokens", "Prompt tokens computed (prefix cache hits are not)."),
    "prefill_seconds": ("octavo_prefill_seconds", "Device time spent on prompt tokens."),
    "decode_tokens": ("octavo_decode_tokens", "Tokens generated after the first of each sequence."),
    "decode_seconds": ("octavo_decode_seconds", "Device time spent on decoding."),
    "preemptions": ("octavo_preemptions", "Sequences that lost their blocks and were computed again."),
    "prefix_queries": ("octavo_prefix_cache_queries", "Prompt tokens looked up in the prefix cache."),
    "prefix_hits": ("octavo_prefix_cache_hits", "Prompt tokens found in the prefix cache."),
}
VARIANT_GAUGES = {
    "running": ("octavo_requests_running", "Sequences in the engine's batch."),
    "waiting": ("octavo_requests_waiting", "Sequences waiting for their first step."),
}


class Counters:
    """What this process counted since its last report."""

    def __init__(self) -> None:
        self._deltas: dict[str, float] = {}

    def add(self, *labels: str, value: float = 1.0) -> None:
        """Count `value` for a metric and its label values, all from fixed lists."""
        key = SEPARATOR.join(labels)
        self._deltas[key] = self._deltas.get(key, 0.0) + value

    def take(self) -> dict[str, float]:
        taken, self._deltas = self._deltas, {}
        return taken

    def put_back(self, deltas: dict[str, float]) -> None:
        for key, value in deltas.items():
            self._deltas[key] = self._deltas.get(key, 0.0) + value


class StatusCollector(Collector):
    """Turns the last `Status` into metrics. `status` is replaced before each page."""

    def __init__(self, version: str) -> None:
        self.version = version
        self.status: Status | None = None

    def collect(self) -> Iterator[Metric]:
        status = self.status
        info = status.info if status is not None else None
        build = GaugeMetricFamily(
            "octavo_build_info", "The server and what it runs on.", labels=["version", "device", "dtype"]
        )
        build.add_metric([self.version, info.device if info else "", info.dtype if info else ""], 1)
        yield build
        up = GaugeMetricFamily("octavo_engine_up", "1 while the engine is ready, else 0.")
        up.add_metric([], float(status is not None and status.state == "ready"))
        yield up
        if status is None:
            return
        yield from self._requests(status)
        if status.stats is None:
            return
        yield from _variants(status.stats.variants)
        stats = status.stats
        blocks = GaugeMetricFamily("octavo_kv_blocks", "Blocks of the KV pool.", labels=["state"])
        blocks.add_metric(["used"], stats.blocks_used)
        blocks.add_metric(["cached"], stats.blocks_cached)
        blocks.add_metric(["free"], stats.blocks_total - stats.blocks_used - stats.blocks_cached)
        yield blocks
        steps = CounterMetricFamily("octavo_steps", "Steps since the engine started.")
        steps.add_metric([], stats.steps)
        yield steps

    def _requests(self, status: Status) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "octavo_requests", "HTTP requests answered.", labels=["endpoint", "variant", "status"]
        )
        for key, value in sorted(status.totals.items()):
            name, *labels = key.split(SEPARATOR)
            if name == REQUESTS:
                requests.add_metric(labels, value)
        yield requests


def _variants(variants: dict[str, VariantStats]) -> Iterator[Metric]:
    for field, (name, text) in VARIANT_COUNTERS.items():
        counter = CounterMetricFamily(name, text, labels=["variant"])
        for variant, stats in variants.items():
            counter.add_metric([variant], getattr(stats, field))
        yield counter
    for field, (name, text) in VARIANT_GAUGES.items():
        gauge = GaugeMetricFamily(name, text, labels=["variant"])
        for variant, stats in variants.items():
            gauge.add_metric([variant], getattr(stats, field))
        yield gauge


class Page:
    """The metrics page of one API process."""

    def __init__(self, version: str) -> None:
        self._collector = StatusCollector(version)
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self._collector)

    def render(self, status: Status | None) -> bytes:
        self._collector.status = status
        return generate_latest(self._registry)
