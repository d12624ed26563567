"""The pieces of work that every engine is timed on, through `LLM.generate`, and what their limits are.

    decode_bN   N sequences of 128 tokens in: (least time of 257 tokens out - least time of 1 out), greedy; tokens/s
    sampled_bN  the same with temperature 0.8, top-p 0.95, 5 logprobs and end ids that count
    prefill     32 prompts of 2,048 tokens, 1 out each; prompt tokens/s
    mixed256    256 requests of 100 to 1,024 tokens in and as many out, temperature 0.6; tokens/s out
    linears     the matrix products of all layers, without the head, by rows; on a GPU in one CUDA graph; seconds

mixed256 is nano-vLLM's own bench.py. A scale divides all lengths, for slow machines and short checkpoints. Prompts are
random ids, new in every round.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from engine.benchmarks.limits import Limits
from engine.benchmarks.machine import time_of
from engine.llm import LLM
from engine.models.qwen import Qwen
from engine.sequence import SamplingParams

DEFAULT_WORKS = (*(f"decode_b{n}" for n in (1, 8, 32, 128, 256)), "prefill", "mixed256", "linears")
LINEAR_ROWS = (1, 8, 32, 128, 256, 8192)
GREEDY = {"temperature": 0.0, "ignore_eos": True}
SAMPLED = {"temperature": 0.8, "top_p": 0.95, "logprobs": 5}
_DECODE = re.compile(r"(decode|sampled)_b([1-9]\d{0,3})")


@dataclass(frozen=True)
class Figure:
    """One line of the table. limit: what arithmetic allows; fraction: how near the measured value comes to it."""

    work: str
    unit: str  # "tok/s" or "ms"
    measured: float
    limit: float
    rounds: list[float]  # measured, one a round

    @property
    def fraction(self) -> float:
        return self.limit / self.measured if self.unit == "ms" else self.measured / self.limit


def parse_works(text: str) -> list[str]:
    """Raises ValueError naming what is known."""
    works = [w.strip() for w in text.split(",") if w.strip()]
    for work in works:
        if work not in ("prefill", "mixed256", "linears") and not _DECODE.fullmatch(work):
            known = "decode_bN and sampled_bN (N from 1 to 9999), prefill, mixed256, linears"
            raise ValueError(f"unknown work {work!r}; known: {known}")
    if not works:
        raise ValueError("name at least one work")
    return works


def most_sequences(works: list[str]) -> int:
    """That run at once in any of them."""
    matches = [_DECODE.fullmatch(w) for w in works]
    return max([256, *(int(m[2]) for m in matches if m)])


def longest(works: list[str], scale: int) -> int:
    """Tokens of the longest sequence in any of them."""
    lengths = {"prefill": 2048 // scale + 1, "mixed256": 2 * max(1024 // scale, 1), "linears": 1}
    return max(lengths.get(w, 128 // scale + max(256 // scale, 1) + 1) for w in works)


class Bench:
    """Runs works on one variant of a loaded engine."""

    def __init__(self, llm: LLM, variant: str, limits: Limits, scale: int, rounds: int) -> None:
        self.llm, self.variant, self.limits, self.scale, self.rounds = llm, variant, limits, scale, rounds
        self._rng = random.Random(1)
        self._vocab = llm.engine.num_ids

    def run(self, work: str) -> Iterator[Figure]:
        match = _DECODE.fullmatch(work)
        if match:
            yield self.decode(work, int(match[2]), GREEDY if match[1] == "decode" else SAMPLED)
        elif work == "linears":
            yield from self.linears()
        else:
            yield self.prefill() if work == "prefill" else self.mixed()

    def decode(self, work: str, batch: int, sampling: dict[str, Any]) -> Figure:
        # Of the differences of each round the best would be that of the slowest call of one token.
        inputs, steps = max(128 // self.scale, 1), max(256 // self.scale, 1)
        self._time([inputs] * batch, [2] * batch, sampling)
        times = []
        for _ in range(self.rounds):
            seconds, tokens = self._time([inputs] * batch, [steps + 1] * batch, sampling)
            # where one ended early the others went on, so a step of all takes at most so long
            seconds *= batch * (steps + 1) / tokens
            times.append((seconds, self._time([inputs] * batch, [1] * batch, sampling)[0]))
        whole, first = map(min, zip(*times, strict=True))
        rounds = [batch * steps / (a - b) for a, b in times]
        least = self.limits.decode_step(batch, batch * (inputs + (steps + 1) / 2))
        return Figure(work, "tok/s", batch * steps / (whole - first), batch / least, rounds)

    def prefill(self) -> Figure:
        lengths = [max(2048 // self.scale, 1)] * 32
        self._time(lengths[:4], [1] * 4, GREEDY)
        return self._figure(
            "prefill",
            lambda: sum(lengths) / self._time(lengths, [1] * len(lengths), GREEDY)[0],
            sum(lengths) / self.limits.prefill(lengths),
        )

    def mixed(self) -> Figure:
        rng, sampling = random.Random(0), GREEDY | {"temperature": 0.6}

        def lengths() -> list[int]:
            return [max(rng.randint(100, 1024) // self.scale, 1) for _ in range(256)]

        inputs, outputs = lengths(), lengths()
        self._time([16] * 16, [16] * 16, sampling)
        return self._figure(
            "mixed256",
            lambda: sum(outputs) / self._time(inputs, outputs, sampling)[0],
            sum(outputs) / self.limits.generation(inputs, outputs),
        )

    @torch.inference_mode()
    def linears(self) -> Iterator[Figure]:
        runner = self.llm.engine.runner
        model, device = runner.variants[self.variant].model, runner.device
        for full in LINEAR_ROWS:
            rows = max(full // self.scale, 1) if full > 256 else full
            work = _linears(model, rows, runner.dtype)
            call = captured(work) if device.type == "cuda" else work
            ms = time_of(call, device) * 1e3
            self.llm.engine.note_compiles(before_ready=True)  # no request asked for these
            yield Figure(f"linears, {rows} rows", "ms", ms, self.limits.seconds(self.limits.linears, rows) * 1e3, [ms])

    def _figure(self, name: str, measure: Callable[[], float], limit: float) -> Figure:
        rounds = [measure() for _ in range(self.rounds)]
        return Figure(name, "tok/s", max(rounds), limit, rounds)

    def _time(self, inputs: list[int], outputs: list[int], sampling: dict[str, Any]) -> tuple[float, int]:
        """Seconds of one call of `generate`, and the tokens out."""
        prompts = [[self._rng.randrange(self._vocab) for _ in range(n)] for n in inputs]
        params = [SamplingParams(max_tokens=n, detokenize=False, **sampling) for n in outputs]
        start = time.perf_counter()
        answers = self.llm.generate(prompts, params, variant=self.variant, use_tqdm=False)
        return time.perf_counter() - start, sum(len(a["token_ids"]) for a in answers)


def _linears(model: Qwen, rows: int, dtype: torch.dtype) -> Callable[[], None]:
    """The four products of every layer, each on an input of its own width. The weights are used once a call, so that
    those of a model larger than the caches come from memory.
    """
    matrices = [m for layer in model.layers for m in (layer.qkv, layer.out, layer.gate_up, layer.down)]
    depths = {m.tensors[0].shape[1] for m in matrices}
    inputs = {k: torch.randn(rows, k, device=model.embedding.device).to(dtype) for k in depths}

    def run() -> None:
        for m in matrices:
            m(inputs[m.tensors[0].shape[1]])

    return run


def captured(work: Callable[[], None]) -> Callable[[], None]:
    """The same in a CUDA graph."""
    for _ in range(2):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay
