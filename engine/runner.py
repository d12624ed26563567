"""Runs scheduled steps on the device: variants, the KV pool, the tables, and what comes back.

`launch` queues a whole step and returns at once; `Flight.wait` blocks until its results are on the host. Nothing
between reads a device value on the host, so that the next step can be scheduled and queued while this one runs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from engine import kernels
from engine.batch import Assembled, PromptPiece, Tables, assemble, decode_batch, prefill_batch
from engine.config import EngineConfig, ModelConfig, ModelError
from engine.graphs import DecodeGraphs
from engine.kv_pool import KVPool, tokens_per_block
from engine.memory import (
    MAX_GRAPH_SIZE,
    META,
    PROMPT_LOGPROB_ROWS,
    DeviceMemory,
    MemoryPlan,
    kept_bytes,
    plan_memory,
    planned_weights,
)
from engine.mixed_graphs import MixedGraphs, mixed_layouts
from engine.models.qwen import Qwen, Wanted
from engine.quant.formats import FORMATS, Format, kept_matrices, parse_format
from engine.quant.memory import WeightBytes, count_bytes
from engine.quant.smooth import smoothing_for
from engine.quant.variants import Smoothing, Variant, build_variants
from engine.sampling import SamplingPlan, gather_logprobs, plan_sampling, sample, unpack, warm_up
from engine.scheduler import Scheduled
from engine.sequence import Sequence
from engine.transfer import to_host
from engine.weights import Checkpoint, open_checkpoint

log = logging.getLogger("octavo.engine")

WARM_UP_ROWS = (2, 9, 17, 33, *range(65, 1026, 64))  # wherever `tiles.choose_tile` may change its mind


@dataclass
class VariantFlight:
    """One variant's share of a step under way. Host tensors are valid once the step has been waited for."""

    variant: str
    scheduled: list[Scheduled]
    sampled: list[Sequence]  # in the order of the rows below
    num_prefill_tokens: int
    num_decode_tokens: int  # of sequences past their prompt
    tokens: Tensor  # [N] int32
    ids: Tensor | None  # [N, 1 + K + P] int32
    values: Tensor | None
    num_top: int  # K
    clock: PhaseTimer
    prompt_pieces: list[PromptPiece] = field(default_factory=list)
    prompt_ids: Tensor | None = None  # [positions, 1 + K] int64
    prompt_values: Tensor | None = None


@dataclass
class Flight:
    """A step under way."""

    variants: list[VariantFlight]
    failed: list[Sequence]  # the device had no memory for them
    launched: float = field(default_factory=time.monotonic)

    def wait(self) -> None:
        for flight in self.variants:
            flight.clock.wait()


class PhaseTimer:
    """Device time from construction to `stop`, in seconds: CUDA events, or the clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._events: tuple[torch.Event, torch.Event] | None = None
        if device.type == "cuda":
            self._events = (torch.Event(device, enable_timing=True), torch.Event(device, enable_timing=True))
            self._events[0].record()
        self._start = time.perf_counter()

    def stop(self) -> None:
        self._end = time.perf_counter()
        if self._events:
            self._events[1].record()

    def wait(self) -> None:
        if self._events:
            self._events[1].synchronize()

    def seconds(self) -> float:
        if self._events:
            return float(self._events[0].elapsed_time(self._events[1])) / 1e3
        return self._end - self._start

    def seconds_since(self, earlier: PhaseTimer) -> float:
        """From an earlier timer's stop to this one's construction: the device had nothing to do."""
        if self._events and earlier._events:
            return float(earlier._events[1].elapsed_time(self._events[0])) / 1e3
        return self._start - earlier._end


class Runner:
    """Loads the variants and owns all device memory."""

    def __init__(self, config: EngineConfig, model_config: ModelConfig, num_ids: int) -> None:
        self.config = config
        self.model_config = model_config
        self.num_ids = num_ids
        self.device = pick_device(config.device)
        self.dtype = pick_dtype(config.dtype, model_config.dtype, self.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        formats = [parse_format(name) for name in config.variants]
        self.kept = kept_matrices(config.keep_bf16, model_config.num_layers)
        max_len = config.max_model_len or model_config.max_position_embeddings
        if self.device.type == "cuda":  # sooner than by running out of memory
            self._allocated_before = torch.cuda.memory_allocated(self.device)
            self._plan(formats, self.planned_weights(formats, {}, lambda: None))
        self.variants = self._load(formats, max_len)
        kvs = {f.kv for f in formats}
        self.block_sizes = {f.name: tokens_per_block(config.block_size, self.dtype, f.kv) for f in formats}
        self.plan = self._plan(formats, count_bytes({name: v.model for name, v in self.variants.items()}))
        self.num_blocks, self.max_model_len = self.plan.num_blocks, self.plan.max_model_len
        self.pool = KVPool(model_config, self.num_blocks, config.block_size, self.dtype, kvs, self.device)
        caches = {kv: self.pool.caches(kv) for kv in kvs}
        self.kv = {f.name: caches[f.kv] for f in formats}
        self.models = {name: v.model for name, v in self.variants.items()}
        # wide enough for the variant with the smallest blocks, which may yet come
        self.tables = Tables.allocate(config.max_num_seqs, self.max_model_len, config.block_size, self.device)
        self.graphs: DecodeGraphs | None = None
        self.mixed_graphs: MixedGraphs | None = None
        self.num_replays = 0  # batches that ran through a graph
        if config.cuda_graphs and self.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0]
            size = min(config.max_num_seqs, MAX_GRAPH_SIZE)
            kept = kept_bytes(config, model_config, self.dtype)
            self.graphs = DecodeGraphs(self.models, self.tables, self.kv, self.block_sizes, num_ids, size, kept)
            self.graphs.capture()
            layouts = mixed_layouts(config, self.max_model_len, self.plan.full_batch)
            self.mixed_graphs = MixedGraphs(self.models, self.tables, self.kv, self.block_sizes, layouts)
            self.mixed_graphs.capture(self.graphs.record)
            taken = free - torch.cuda.mem_get_info(self.device)[0]
            planned = sum(size for name, size in self.plan.reserves.items() if "CUDA graphs" in name)
            log.info("CUDA graphs took %.0f MiB; the plan has %.0f for them", taken / 2**20, planned / 2**20)
        if self.device.type == "cuda":
            kernels.warm_up(self.device, self.dtype)
            for name in self.variants:
                for size in WARM_UP_ROWS:
                    self.warm_up(name, size)
            t = self.tables
            logits = torch.zeros(1, model_config.vocab_size, dtype=self.dtype, device=self.device)
            with torch.inference_mode():
                warm_up(logits, t.floats, t.ints, t.tokens, num_ids)
            torch.cuda.synchronize()

    @torch.inference_mode()
    def warm_up(self, variant: str, num_rows: int) -> None:
        """Run a variant once for a range of rows that has kernels of its own, so that none compiles later."""
        spare = self.tables.tokens.shape[0] - 1
        batch = prefill_batch(spare, min(num_rows, self.max_model_len), self.tables)
        batches = [batch]
        if num_rows == WARM_UP_ROWS[-1]:
            contexts = (
                batch.plan.context_lens_host + kernels.WIDENED_CONTEXT * num_rows
            )  # so late in a prompt that it is not widened
            batches.append(replace(batch, plan=replace(batch.plan, context_lens_host=contexts)))
            for size in (1, self.config.max_num_seqs):
                rows = torch.full((size,), spare, dtype=torch.int32, device=self.device)
                decode = decode_batch(rows, torch.zeros_like(rows), self.tables, self.block_sizes[variant])
                # decode's attention is also the last layer's of a prefill, without the store
                batches += [decode, replace(batch, wanted=Wanted(torch.zeros_like(rows), decode.plan))]
        model, most = self.models[variant], max(PROMPT_LOGPROB_ROWS, self.config.max_num_seqs)
        for batch in batches:
            model.logits(model.forward(batch, self.kv[variant])[:most])
        torch.cuda.synchronize()

    def _load(self, formats: list[Format], max_len: int) -> dict[str, Variant]:
        c, device, dtype = self.model_config, self.device, self.dtype
        with self.checkpoint(device) as checkpoint:
            self.identity = checkpoint.identity()

            def unquantised() -> Qwen:
                bf16 = FORMATS["bf16"]
                return build_variants(c, checkpoint, [bf16], max_len, device, dtype)[bf16.name].model

            smoothing = self.smoothing(formats, unquantised)
            return build_variants(c, checkpoint, formats, max_len, device, dtype, self.kept, smoothing)

    def smoothing(self, formats: list[Format], unquantised: Callable[[], Qwen]) -> Smoothing | None:
        """SmoothQuant's factors, if any format needs them. unquantised: makes the model that they are found with."""
        if self.config.load_format == "dummy" or not any(f.smooth for f in formats):
            return None
        return smoothing_for(self.config, self.model_config, self.identity, unquantised, self.device, self.dtype)

    def checkpoint(self, device: torch.device) -> Checkpoint:
        c = self.config
        return open_checkpoint(c.model, c.load_format, self.model_config, self.dtype, device)

    def planned_weights(
        self, formats: list[Format], loaded: Mapping[str, Variant], between: Callable[[], None]
    ) -> WeightBytes:
        """What variants of these formats will hold, together with those loaded. between: see `build_variants`."""
        with self.checkpoint(META) as shapes:
            return planned_weights(self.model_config, shapes, formats, self.dtype, self.kept, loaded, between)

    def _plan(self, formats: list[Format], weights: WeightBytes) -> MemoryPlan:
        """Size the KV pool for these weights, loaded or yet to be loaded."""
        memory = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            free, total = torch.cuda.mem_get_info(self.device)
            own = torch.cuda.memory_allocated(self.device) - self._allocated_before  # the plan has these by name
            memory = DeviceMemory(total, used=total - free - own)
        return plan_memory(self.config, self.model_config, formats, self.dtype, weights, memory)

    @torch.inference_mode()
    def launch(
        self,
        step: dict[str, list[Scheduled]],
        admitted: list[Sequence],
        new_blocks: list[tuple[int, int, int]],
    ) -> Flight:
        """Queue a step on the device. What does not fit its memory fails alone, the rest of the step goes on."""
        self.tables.update(admitted, new_blocks)
        flight = Flight([], [])
        for variant, scheduled in step.items():
            while scheduled:
                try:
                    flight.variants.append(self._launch_variant(variant, scheduled))
                    break
                except torch.OutOfMemoryError:
                    torch.cuda.empty_cache()
                    failed = self._largest(scheduled)
                    flight.failed.extend(failed)
                    scheduled = [s for s in scheduled if s.sequence not in failed]
        return flight

    def _largest(self, scheduled: list[Scheduled]) -> list[Sequence]:
        """The sequence with most tokens in this batch, and those that share blocks it was to compute in it."""
        largest = max(scheduled, key=lambda s: s.num_tokens)
        computed = set(largest.sequence.blocks[largest.start // self.block_sizes[largest.sequence.variant] :])
        return [s.sequence for s in scheduled if s is largest or computed & set(s.sequence.blocks)]

    def _launch_variant(self, variant: str, scheduled: list[Scheduled]) -> VariantFlight:
        if kernels.longest_first(len(scheduled), self.model_config.num_kv_heads, self.device):
            scheduled = sorted(scheduled, key=lambda s: s.start, reverse=True)
        if self.graphs is not None and self.graphs.covers(variant, scheduled):
            self.num_replays += 1
            return self._replay(self.graphs, variant, scheduled)
        clock = PhaseTimer(self.device)
        model = self.models[variant]
        hidden, a = self._forward(variant, scheduled)
        num_sampled = len(a.sampled)
        prompt_ids, prompt_values = self._prompt_logprobs(model, hidden[num_sampled:], a)
        ids = values = None
        tokens, num_top = torch.empty(0, dtype=torch.int32), 0
        if a.sampled:
            plan = plan_sampling(a.sampled)
            num_top = max(0, plan.num_logprobs)
            logits = model.logits(hidden[:num_sampled])
            sampled = self._sample(logits, a.sample_rows, a.sample_positions, plan)
            tokens, ids, values = unpack(to_host(sampled), plan)
        for piece in a.pieces:
            piece.sequence.next_prompt_logprob = piece.start + piece.count
        clock.stop()
        return VariantFlight(
            variant=variant,
            scheduled=a.scheduled,
            sampled=a.sampled,
            num_prefill_tokens=a.num_prefill_tokens,
            num_decode_tokens=a.num_decode_tokens,
            tokens=tokens,
            ids=ids,
            values=values,
            num_top=num_top,
            clock=clock,
            prompt_pieces=a.pieces,
            prompt_ids=prompt_ids,
            prompt_values=prompt_values,
        )

    def _forward(self, variant: str, scheduled: list[Scheduled]) -> tuple[Tensor, Assembled]:
        """Hidden states [N + P, H] of what `Assembled.index` names, through a graph where one holds the batch."""
        layout = self.mixed_graphs.layout_for(variant, scheduled) if self.mixed_graphs is not None else None
        if self.mixed_graphs is not None and layout is not None:
            self.num_replays += 1
            return self.mixed_graphs.forward(variant, scheduled, layout)
        batch, a = assemble(scheduled, self.tables, self.block_sizes[variant])
        return self.models[variant].forward(batch, self.kv[variant]), a

    def _replay(self, graphs: DecodeGraphs, variant: str, scheduled: list[Scheduled]) -> VariantFlight:
        """A batch that only decodes, through the captured graphs."""
        clock = PhaseTimer(self.device)
        sequences = [s.sequence for s in scheduled]
        rows = np.array([s.row for s in sequences], dtype=np.int32)
        contexts = np.array([s.start + 1 for s in scheduled], dtype=np.int32)
        logits = graphs.forward(variant, rows, contexts)
        plan = plan_sampling(sequences)
        if plan.is_usual:
            sampled = graphs.draw(len(sequences), plan.is_plain)
        else:
            sampled = self._sample(logits, graphs.rows[: len(rows)], graphs.contexts[: len(rows)], plan)
        tokens, ids, values = unpack(to_host(sampled), plan)
        num_decoded = sum(s.start >= s.sequence.prompt_len for s in scheduled)
        clock.stop()
        return VariantFlight(
            variant=variant,
            scheduled=scheduled,
            sampled=sequences,
            num_prefill_tokens=len(scheduled) - num_decoded,
            num_decode_tokens=num_decoded,
            tokens=tokens,
            ids=ids,
            values=values,
            num_top=max(0, plan.num_logprobs),
            clock=clock,
        )

    def _sample(self, logits: Tensor, rows: Tensor, positions: Tensor, plan: SamplingPlan) -> Tensor:
        """Sample one token a row, without graphs. rows, positions [N] int32."""
        t = self.tables
        return sample(logits, rows, positions, t.floats, t.ints, t.tokens, self.num_ids, plan)

    def _prompt_logprobs(self, model: Qwen, hidden: Tensor, a: Assembled) -> tuple[Tensor | None, Tensor | None]:
        """Logprobs of the prompt tokens that these hidden states [P, H] predict, through the head a chunk at a time.

        Returns ids and values [P, 1 + K], on their way to the host.
        """
        if not a.pieces:
            return None, None
        top = max(p.sequence.params.prompt_logprobs or 0 for p in a.pieces)
        tokens = self.tables.tokens[a.owed_rows.long(), a.owed_positions.long()].long()
        chunks = [
            gather_logprobs(model.logits(h), t, top, self.num_ids, [])
            for h, t in zip(*(torch.split(x, PROMPT_LOGPROB_ROWS) for x in (hidden, tokens)), strict=True)
        ]
        return to_host(torch.cat([c[0] for c in chunks])), to_host(torch.cat([c[1] for c in chunks]))


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the first GPU, or the CPU where there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ModelError(f"device {name!r} is not known; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ModelError("no CUDA GPU is available; use --device cpu")
        return torch.device("cuda", device.index or 0)
    if device.type != "cpu":
        raise ModelError(f"device {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    return device


def pick_dtype(name: str, checkpoint: str, device: torch.device) -> torch.dtype:
    """The computing dtype: "auto" is the checkpoint's on a GPU and float32 on a CPU."""
    if name == "auto":
        name = checkpoint if device.type == "cuda" else "float32"
    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if name not in dtypes:
        raise ModelError(f"dtype {name!r} is not supported; use auto, {', '.join(dtypes)}")
    return dtypes[name]
