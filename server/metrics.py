"""`/metrics`: one page for the whole server, whichever API process answers.

Each API process counts into plain dicts and lists (`Counters`) and once a second sends the parent what was added since
(`ApiReport.deltas`); histograms travel the same way, a delta for each bucket. The parent adds them up, so that nothing
is lost with an API process but its last second, and publishes the totals with the engine's statistics (`Status`). The
page is made from the last Status alone. Label values come from fixed lists (routes, loaded variants, status codes,
error kinds), so nothing a client sends can make the page grow.

Metrics of a request count sequences: a request of two prompts with n=2 counts as four. The `vllm:` names are those of
vLLM's own page (`vllm/v1/metrics/loggers.py`), for boards made for it; `model_name` is the variant's model id. There is
one KV pool, so each variant reports the same `vllm:kv_cache_usage_perc`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.messages import (
    STEP_BOUNDS,
    WAIT_REASONS,
    CanaryReport,
    EngineInfo,
    EngineStats,
    Status,
    VariantStats,
)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SEPARATOR = "|"  # between a metric's name and its label values, in the keys of `ApiReport.deltas`
REQUESTS, REJECTED, FINISHED, PROMPT_TOKENS = "requests", "rejected", "finished", "prompt_tokens"
FINISH_REASONS = ("stop", "length", "abort", "error")
SUM = "sum"  # stands in a key where a bucket's index would

# vLLM's bounds, with finer ones below: its lowest between tokens is 10 ms, a whole step of a small model and more
WAIT_BOUNDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0),
    *(40.0, 80.0, 160.0, 640.0, 2560.0),
)
GAP_BOUNDS = (
    *(0.0005, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2),
    *(0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
LATENCY_BOUNDS = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0),
    *(50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
TOKEN_BOUNDS = (*(float(d * 10**e) for e in range(6) for d in (1, 2, 5)), 1e6)


class Histogram(NamedTuple):
    name: str
    help: str
    bounds: tuple[float, ...]


# by the name that `Counters.series` takes
HISTOGRAMS = {
    "time_to_first_token": Histogram(
        "vllm:time_to_first_token_seconds", "From the request's arrival to the first token.", WAIT_BOUNDS
    ),
    "inter_token_latency": Histogram(
        "vllm:inter_token_latency_seconds", "Between two tokens of one sequence.", GAP_BOUNDS
    ),
    "e2e_request_latency": Histogram(
        "vllm:e2e_request_latency_seconds",
        "From arrival to the last token, of sequences that ended well.",
        LATENCY_BOUNDS,
    ),
    "request_queue_time": Histogram(
        "vllm:request_queue_time_seconds", "In the engine's queue, before the first step.", LATENCY_BOUNDS
    ),
    "request_prefill_time": Histogram(
        "vllm:request_prefill_time_seconds", "From the first step to the first token.", LATENCY_BOUNDS
    ),
    "request_decode_time": Histogram(
        "vllm:request_decode_time_seconds", "From the first token to the last.", LATENCY_BOUNDS
    ),
    "request_prompt_tokens": Histogram("vllm:request_prompt_tokens", "Length of the prompt.", TOKEN_BOUNDS),
    "request_generation_tokens": Histogram("vllm:request_generation_tokens", "Tokens generated.", TOKEN_BOUNDS),
}

# field of VariantStats -> metric names (our own with the label `variant`, vLLM's with `model_name`), help
VARIANT_COUNTERS = {
    "prefill_tokens": (("octavo_prefill_tokens",), "Prompt tokens computed (prefix cache hits are not)."),
    "prefill_seconds": (("octavo_prefill_seconds",), "Device time spent on prompt tokens."),
    "decode_tokens": (("octavo_decode_tokens",), "Tokens generated after the first of each sequence."),
    "decode_seconds": (("octavo_decode_seconds",), "Device time spent on decoding."),
    "preemptions": (
        ("octavo_preemptions", "vllm:num_preemptions"),
        "Sequences that lost their blocks and were computed again.",
    ),
    "prefix_queries": (
        ("octavo_prefix_cache_queries", "vllm:prefix_cache_queries"),
        "Prompt tokens looked up in the prefix cache.",
    ),
    "prefix_hits": (
        ("octavo_prefix_cache_hits", "vllm:prefix_cache_hits"),
        "Prompt tokens found in the prefix cache.",
    ),
}

CANARY_GAUGES = {
    "accuracy": "Share of the canary's questions that the variant has right.",
    "perplexity": "Of the canary's text, a token.",
    "kl": "Mean divergence from bf16's distribution over the four letters, in nats.",
    "worse": "1 where the variant is worse than bf16 beyond chance and tolerance, else 0.",
    "failed": "Requests of the canary's last round without an answer.",
}

Totals = dict[str, dict[tuple[str, ...], float]]  # metric -> label values -> total


class Counters:
    """What this process counted since its last report."""

    def __init__(self) -> None:
        self._deltas: dict[str, float] = {}
        self._series: dict[tuple[str, str], list[float]] = {}

    def add(self, *labels: str, value: float = 1.0) -> None:
        """Count `value` for a metric and its label values, all from fixed lists."""
        key = SEPARATOR.join(labels)
        self._deltas[key] = self._deltas.get(key, 0.0) + value

    def series(self, name: str, variant: str) -> list[float]:
        """The list to append a histogram's observations to. `take` empties it in place: keep the list, not a copy."""
        return self._series.setdefault((name, variant), [])

    def take(self) -> dict[str, float]:
        for (name, variant), values in self._series.items():
            if values:
                self._sort_in(name, variant, values)
                values.clear()
        taken, self._deltas = self._deltas, {}
        return taken

    def put_back(self, deltas: dict[str, float]) -> None:
        for key, value in deltas.items():
            self._deltas[key] = self._deltas.get(key, 0.0) + value

    def _sort_in(self, name: str, variant: str, values: list[float]) -> None:
        """One second's observations become bucket counts: sorting all is cheaper than a search for each."""
        self.add(name, variant, SUM, value=sum(values))
        values.sort()
        bounds, start = HISTOGRAMS[name].bounds, 0
        for bucket, bound in enumerate(bounds):
            end = bisect_right(values, bound, start)
            if end > start:
                self.add(name, variant, str(bucket), value=end - start)
            start = end
        if start < len(values):
            self.add(name, variant, str(len(bounds)), value=len(values) - start)


class StatusCollector(Collector):
    """Turns the last `Status` into metrics. `status` is replaced before each page."""

    def __init__(self, version: str, served_name: str, reject_reasons: tuple[str, ...]) -> None:
        self.version = version
        self.served_name = served_name
        self.reject_reasons = reject_reasons
        self.status: Status | None = None

    def collect(self) -> Iterator[Metric]:
        status = self.status
        info = status.info if status is not None else None
        labels = {"version": self.version, "device": info.device if info else "", "dtype": info.dtype if info else ""}
        yield _gauge("octavo_build_info", "The server and what it runs on.", {tuple(labels.values()): 1}, *labels)
        up = float(status is not None and status.state == "ready")
        yield _gauge("octavo_engine_up", "1 while the engine is ready, else 0.", {(): up})
        if status is None:
            return
        totals = _by_metric(status.totals)
        restarts = CounterMetricFamily("octavo_engine_restarts", "Engines that died and were started anew.")
        restarts.add_metric([], status.epoch)
        yield restarts
        answered = totals.get(REQUESTS, {})
        yield _counter("octavo_requests", "HTTP requests answered.", answered, "endpoint", "variant", "status")
        rejected = {(reason,): 0.0 for reason in self.reject_reasons} | totals.get(REJECTED, {})
        yield _counter("octavo_rejected", "Requests refused, by the kind of error.", rejected, "reason")
        if info is not None:
            yield from self._settings(info)
            yield from self._histograms(info, totals)
        if info is not None and status.stats is not None:
            yield from self._engine(info, status.stats)
        if info is not None and status.canary is not None:
            yield from self._canary(info, status.canary)

    def _model_id(self, variant: str) -> str:
        return f"{self.served_name}:{variant}"

    def _settings(self, info: EngineInfo) -> Iterator[Metric]:
        """What does not change while the engine lives."""
        weights: dict[tuple[str, str], int] = {}
        for v in info.variants:
            weights |= {(v.name, "own"): v.own_bytes, (v.name, "shared"): v.shared_bytes}
        yield _gauge("octavo_weights_bytes", "Stored weights; shared ones exist once.", weights, "variant", "kind")
        yield _gauge("octavo_max_num_seqs", "Sequences that fit in one step.", {(): info.max_num_seqs})
        labels = ("model_name", "block_size", "num_gpu_blocks", "cache_dtype", "enable_prefix_caching")
        cache = {
            (
                self._model_id(v.name),
                str(v.block_size),
                str(info.num_blocks),
                info.dtype,
                str(info.enable_prefix_caching),
            ): 1
            for v in info.variants
        }
        yield _gauge("vllm:cache_config_info", "The KV pool.", cache, *labels)

    def _histograms(self, info: EngineInfo, totals: Totals) -> Iterator[Metric]:
        """What the API processes counted of each sequence. Every variant has every series from the start."""
        names = [v.name for v in info.variants]
        tokens = dict.fromkeys(names, 0.0)
        for key, histogram in HISTOGRAMS.items():
            family = HistogramMetricFamily(histogram.name, histogram.help, labels=["model_name"])
            known = totals.get(key, {})
            for name in names:
                counts = [known.get((name, str(i)), 0.0) for i in range(len(histogram.bounds) + 1)]
                buckets = _buckets(histogram.bounds, counts)
                family.add_metric([self._model_id(name)], buckets, known.get((name, SUM), 0.0))
                if key in ("time_to_first_token", "inter_token_latency"):
                    tokens[name] += sum(counts)
            yield family
        ids = {name: self._model_id(name) for name in names}
        generated = {(ids[name],): count for name, count in tokens.items()}  # each token is a first one or ends a gap
        yield _counter("vllm:generation_tokens", "Tokens generated.", generated, "model_name")
        prompt = {(ids[name],): totals.get(PROMPT_TOKENS, {}).get((name,), 0.0) for name in names}
        yield _counter("vllm:prompt_tokens", "Prompt tokens, computed or found in the cache.", prompt, "model_name")
        finished = totals.get(FINISHED, {})
        ends = {(ids[name], reason): finished.get((name, reason), 0.0) for name in names for reason in FINISH_REASONS}
        yield _counter("vllm:request_success", "Sequences, by how they ended.", ends, "model_name", "finished_reason")

    def _canary(self, info: EngineInfo, report: CanaryReport) -> Iterator[Metric]:
        known = {v.name: report.figures.get(v.name, {}) for v in info.variants}
        for key, text in CANARY_GAUGES.items():
            values = {(name,): figures[key] for name, figures in known.items() if key in figures}
            yield _gauge(f"octavo_canary_{key}", text, values, "variant")
        yield _gauge("octavo_canary_timestamp_seconds", "End of the last round, Unix time.", {(): report.at})

    def _engine(self, info: EngineInfo, stats: EngineStats) -> Iterator[Metric]:
        """The engine's own counts; they begin anew with a new engine."""
        loaded = {v.name for v in info.variants}  # stats may be a heartbeat older and name one that is gone
        variants = {n: s for n, s in stats.variants.items() if n in loaded}
        for field, (metrics, text) in VARIANT_COUNTERS.items():
            for metric in metrics:
                own = metric.startswith("octavo")
                values = {(n if own else self._model_id(n),): float(getattr(s, field)) for n, s in variants.items()}
                yield _counter(metric, text, values, "variant" if own else "model_name")
        yield from self._sequences(variants)
        free = stats.blocks_total - stats.blocks_used - stats.blocks_cached
        blocks = {("used",): stats.blocks_used, ("cached",): stats.blocks_cached, ("free",): free}
        yield _gauge("octavo_kv_blocks", "Blocks of the KV pool.", blocks, "state")
        usage = stats.blocks_used / stats.blocks_total if stats.blocks_total else 0.0
        per_model = {(self._model_id(v.name),): usage for v in info.variants}
        yield _gauge("vllm:kv_cache_usage_perc", "Share of the KV pool in use, 0 to 1.", per_model, "model_name")
        steps = HistogramMetricFamily("octavo_step_seconds", "Wall time of a step of the engine.")
        steps.add_metric([], _buckets(STEP_BOUNDS, stats.step_buckets), stats.step_seconds)
        yield steps
        waited = "Time that the device stood idle between two batches: it waited for the host."
        yield _counter("octavo_device_wait_seconds", waited, {(): stats.wait_seconds})
        yield _counter("octavo_graph_replays", "Batches that ran through a CUDA graph.", {(): stats.graph_replays})
        compiles = {("before_ready",): stats.compiles_before_ready, ("after_ready",): stats.compiles_after_ready}
        yield _counter("octavo_kernel_compiles", "Triton kernels compiled; none should be after.", compiles, "when")
        yield _gauge(
            "octavo_step_busy_seconds", "How long the present step has been running.", {(): stats.busy_seconds}
        )

    def _sequences(self, variants: Mapping[str, VariantStats]) -> Iterator[Metric]:
        """Who runs and who waits for what, now."""
        running = {n: s.running for n, s in variants.items()}
        waiting = {n: sum(s.waiting.values()) for n, s in variants.items()}
        by_reason = {(n, reason): s.waiting.get(reason, 0) for n, s in variants.items() for reason in WAIT_REASONS}
        runs, waits = "Sequences in the engine's batch.", "Sequences that wait to be taken into the batch"
        yield _gauge("octavo_requests_running", runs, {(n,): v for n, v in running.items()}, "variant")
        yield _gauge("octavo_requests_waiting", f"{waits}, by what they wait for.", by_reason, "variant", "reason")
        for name, text, values in (("running", runs, running), ("waiting", f"{waits}.", waiting)):
            by_model = {(self._model_id(n),): v for n, v in values.items()}
            yield _gauge(f"vllm:num_requests_{name}", text, by_model, "model_name")


def _buckets(bounds: Sequence[float], counts: Sequence[float]) -> list[tuple[str, float]]:
    """Prometheus' running totals by upper bound; `counts` has one more entry, for what is beyond the last."""
    return list(zip([*map(str, bounds), "+Inf"], accumulate(counts), strict=True))


def _gauge(name: str, text: str, values: Mapping[Any, float], *labels: str) -> Metric:
    """`values` by the labels' values, a tuple in the order of `labels`."""
    family = GaugeMetricFamily(name, text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def _counter(name: str, text: str, values: Mapping[Any, float], *labels: str) -> Metric:
    family = CounterMetricFamily(name, text, labels=labels)
    for key in sorted(values):
        family.add_metric(key, values[key])
    return family


def _by_metric(totals: dict[str, float]) -> Totals:
    found: Totals = {}
    for key, value in totals.items():
        name, *labels = key.split(SEPARATOR)
        found.setdefault(name, {})[tuple(labels)] = value
    return found


class Page:
    """The metrics page of one API process."""

    def __init__(self, version: str, served_name: str, reject_reasons: tuple[str, ...]) -> None:
        self._collector = StatusCollector(version, served_name, reject_reasons)
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self._collector)

    def render(self, status: Status | None) -> bytes:
        self._collector.status = status
        return generate_latest(self._registry)
