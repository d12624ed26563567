"""Variants that come and go while the engine serves: room, loading between steps, graphs when there is time.

Room is what `variant_headroom` keeps free of the KV pool and what removed variants held: the bytes that the start's
variants and the headroom took together are never exceeded. Adding reads the checkpoint matrix by matrix, with a turn of
the engine between two, and shares every tensor that is there already. Removing drops what nobody else holds.
"""

from __future__ import annotations

import gc
import logging
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import NoReturn

import torch

from engine.config import ModelError, VariantRefused
from engine.kv_pool import tokens_per_block
from engine.memory import graph_bytes
from engine.models.qwen import Qwen
from engine.quant.formats import Format, parse_format
from engine.quant.memory import WeightBytes, count_bytes
from engine.quant.variants import Variant, build_variants, recounted
from engine.runner import WARM_UP_ROWS, Runner

log = logging.getLogger("octavo.engine")


class VariantChanges:
    """Adds variants to a runner and removes them. `budget`: bytes of all variants, with their graphs, at most."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.budget = self._cost(runner.plan.weights, len(runner.variants)) + runner.plan.headroom
        self._captures: deque[tuple[str, Callable[[], None]]] = deque()

    @property
    def free(self) -> int:
        """Bytes that variants may yet take."""
        models = {name: v.model for name, v in self.runner.variants.items()}
        return self.budget - self._cost(count_bytes(models), len(models))

    @property
    def has_captures(self) -> bool:
        """Whether an added variant still lacks CUDA graphs; until then it runs without."""
        return bool(self._captures)

    def add(self, name: str, between: Callable[[], None]) -> None:
        """Load a variant, calling `between` before each matrix. Raises VariantRefused, and then nothing has changed."""
        runner, fmt = self.runner, parse_format(name)
        try:
            self._check(fmt, between)
            variant = self._load(fmt, between)
            runner.models[name] = variant.model
            runner.kv[name] = runner.pool.caches(fmt.kv)
            runner.block_sizes[name] = tokens_per_block(runner.config.block_size, runner.dtype, fmt.kv)
            if runner.device.type == "cuda":
                for size in WARM_UP_ROWS:
                    between()
                    runner.warm_up(name, size)
        except torch.OutOfMemoryError:
            self._forget(name)
            raise VariantRefused(
                "not_enough_memory", f"{name}: the device ran out of memory while loading it"
            ) from None
        except ModelError as e:
            raise VariantRefused("variant_unavailable", str(e)) from None
        except VariantRefused:
            self._forget(name)
            raise
        runner.variants = recounted(runner.variants | {name: variant})
        self._queue_captures(name)

    def remove(self, name: str) -> None:
        """Free a variant that no sequence and no step uses any more."""
        self.runner.variants = recounted({n: v for n, v in self.runner.variants.items() if n != name})
        self._forget(name)

    def capture_next(self) -> None:
        """Capture one CUDA graph of an added variant. It waits for the device, and runs the forward three times."""
        name, capture = self._captures.popleft()
        try:
            capture()
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            self._captures = deque(c for c in self._captures if c[0] != name)
            log.warning("no memory for more CUDA graphs of %s: other batches run without", name)

    # ------------------------------------------------------------------------------------------------------------------

    def _cost(self, weights: WeightBytes, num_variants: int) -> int:
        runner = self.runner
        with_graphs = runner.config.cuda_graphs and runner.device.type == "cuda"
        if not with_graphs:
            return weights.total
        return weights.total + num_variants * graph_bytes(runner.config, runner.max_model_len, runner.plan.full_batch)

    def _check(self, fmt: Format, between: Callable[[], None]) -> None:
        """Raise VariantRefused for what has no room or no place."""
        runner = self.runner
        if fmt.kv is not None and runner.pool.scales is None:
            raise VariantRefused(
                "kv_format_unavailable",
                f"{fmt.name} keeps keys and values in 8 bits, and the KV pool was made without scales: start the "
                f"server with a variant that ends in +kv8 or +kvint8, such as {next(iter(runner.variants))}+kv8 (it "
                "shares its weights)",
            )
        tokens = runner.num_blocks * tokens_per_block(runner.config.block_size, runner.dtype, fmt.kv)
        if tokens < runner.max_model_len:
            raise VariantRefused(
                "not_enough_memory",
                f"{tokens} tokens of {fmt.name} fit the KV pool, and a sequence may have {runner.max_model_len}: start "
                "the server with a lower --max-model-len or a larger pool",
            )
        weights = runner.planned_weights([fmt], runner.variants, between)
        free = self.free
        need = self._cost(weights, len(runner.variants) + 1) - (self.budget - free)
        if need > free:
            raise VariantRefused(
                "not_enough_memory",
                f"{fmt.name} needs {need:,} bytes, and {free:,} are free: remove a variant, or start the server with "
                f"--variant-headroom {runner.plan.headroom + need - free}",
            )

    def _load(self, fmt: Format, between: Callable[[], None]) -> Variant:
        runner = self.runner

        def not_here() -> NoReturn:
            raise VariantRefused(
                "variant_unavailable",
                f"{fmt.name} needs SmoothQuant's factors, and finding them would stop the server for too long: start "
                "it once with this variant, which keeps them on disk",
            )

        unquantised: Callable[[], Qwen] = not_here
        with runner.checkpoint(runner.device) as checkpoint:
            if checkpoint.identity() != runner.identity:
                message = "the checkpoint's files are not those that the server started with: restart it"
                raise VariantRefused("checkpoint_changed", message)
            return build_variants(
                runner.model_config,
                checkpoint,
                [fmt],
                0,
                runner.device,
                runner.dtype,
                runner.kept,
                runner.smoothing([fmt], unquantised),
                runner.variants,
                between,
            )[fmt.name]

    def _queue_captures(self, name: str) -> None:
        graphs, mixed = self.runner.graphs, self.runner.mixed_graphs
        if graphs is None or mixed is None:
            return
        for size in reversed(graphs.sizes):
            self._captures.append((name, partial(graphs.capture_one, name, size)))
        for layout in reversed(mixed.layouts):
            self._captures.append((name, partial(mixed.capture_one, name, layout, graphs.record)))

    def _forget(self, name: str) -> None:
        runner = self.runner
        self._captures = deque(c for c in self._captures if c[0] != name)
        for table in (runner.models, runner.kv, runner.block_sizes):
            table.pop(name, None)
        for graphs in (runner.graphs, runner.mixed_graphs):
            if graphs is not None:
                graphs.forget(name)
        frozen = gc.get_freeze_count()  # by the engine process; this variant may be a part of it
        gc.unfreeze()
        gc.collect()
        if frozen:
            gc.freeze()
        if runner.device.type == "cuda":
            torch.cuda.empty_cache()
