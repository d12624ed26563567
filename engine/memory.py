"""Where the memory goes: weights, what steps need, CUDA graphs, headroom, and the KV pool that remains.

`plan_memory` is the only arithmetic there is: the start sizes the pool with it, after loading, and so does
`octavo-serve --dry-run`, which asks `planned_weights` what would be loaded. That one runs the loader itself on shapes,
so that a new format needs nothing here. All numbers are bytes unless they are called tokens or blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from engine.config import EngineConfig, ModelConfig, ModelError
from engine.graphs import decode_sizes
from engine.kernels.columns import NUM_FLOATS, NUM_INTS
from engine.kv_pool import bytes_per_block, tokens_per_block
from engine.mixed_graphs import MAX_FULL, mixed_layouts
from engine.quant.formats import Format
from engine.quant.memory import WeightBytes, count_bytes
from engine.quant.variants import Variant, build_variants
from engine.weights import Checkpoint

META = torch.device("meta")  # shapes without values
CPU_KV_BYTES = 1 << 30  # the pool's default size on a CPU
MAX_GRAPH_SIZE = 512  # sequences; larger decode batches run without a graph
PROMPT_LOGPROB_ROWS = 256  # prompt positions that go through the head at one time
CONTEXT_BYTES = 512 << 20  # allowance for the CUDA context and libraries, where there is no GPU to ask
GRAPH_BYTES = 1 << 20  # allowance for the nodes of one captured graph
GRAPHS_BYTES = 192 << 20  # and for what all have in common, beside twice the activations of the largest
FULL_SHARE = 0.02  # of a GPU's memory, at most, for a graph of full batches of prompts: small GPUs need it for the pool


@dataclass(frozen=True)
class DeviceMemory:
    """A GPU's memory. used: by others, the driver and libraries: all that is not in the plan."""

    total: int
    used: int


@dataclass(frozen=True)
class MemoryPlan:
    """Who gets what of `limit` bytes (None on a CPU, where only what is asked for is taken).

    reserves: by name, what the engine keeps beside weights and pool. kv_tokens: tokens that fit the pool, by the dtype
    of keys and values. full_batch: tokens of a full batch of prompts that has a graph, 0 where none has.
    """

    limit: int | None
    used: int
    weights: WeightBytes
    reserves: dict[str, int]
    headroom: int
    block_bytes: int
    num_blocks: int
    kv_tokens: dict[str, int]
    max_model_len: int
    full_batch: int

    @property
    def pool(self) -> int:
        return self.num_blocks * self.block_bytes

    @property
    def total(self) -> int:
        return self.used + self.weights.total + sum(self.reserves.values()) + self.headroom + self.pool


def planned_weights(
    config: ModelConfig,
    shapes: Checkpoint,
    formats: list[Format],
    dtype: torch.dtype,
    kept: frozenset[str],
    loaded: Mapping[str, Variant] = MappingProxyType({}),
    between: Callable[[], None] = lambda: None,
) -> WeightBytes:
    """What the variants of these formats will hold, together with those loaded: the loader's own work, on shapes.
    Raises ModelError as it does.

    shapes: a checkpoint opened for the meta device. kept, loaded, between: as `build_variants` takes them.
    """
    variants = build_variants(config, shapes, formats, 1, META, dtype, kept, None, loaded, between)
    return count_bytes({name: variant.model for name, variant in {**loaded, **variants}.items()})


def plan_memory(
    config: EngineConfig,
    model_config: ModelConfig,
    formats: list[Format],
    dtype: torch.dtype,
    weights: WeightBytes,
    device: DeviceMemory | None,
) -> MemoryPlan:
    """Size the KV pool. config: completed. device: None is a CPU. Raises ModelError, with the numbers and the fix, for
    what does not fit.
    """
    c = config
    max_len = c.max_model_len or model_config.max_position_embeddings
    kvs = list(dict.fromkeys(f.kv for f in formats))
    block_sizes = {kv: tokens_per_block(c.block_size, dtype, kv) for kv in kvs}
    block_size = min(block_sizes.values())  # tokens that any variant has in a block
    block_bytes = bytes_per_block(model_config, c.block_size, dtype, kvs)
    full = c.max_num_batched_tokens if c.max_num_batched_tokens <= MAX_FULL else 0
    if device is None or 2 * full * _widest(model_config) * dtype.itemsize > FULL_SHARE * device.total:
        full = 0
    reserves = _reserves(c, model_config, dtype, len(formats), max_len, full, device is not None)
    taken = weights.total + sum(reserves.values()) + c.variant_headroom
    limit = room = None
    if device is not None:
        limit = device.total if c.kv_cache_tokens else int(device.total * c.gpu_memory_utilization)
        room = limit - device.used - taken
    if c.kv_cache_tokens:
        num_blocks = -(-c.kv_cache_tokens // c.block_size)
    elif room is None:
        num_blocks = max(CPU_KV_BYTES // block_bytes, -(-max_len // block_size))
    else:
        num_blocks = max(room // block_bytes, -(-min(max_len, 1024) // block_size))
    if device is not None and limit is not None and room is not None and num_blocks * block_bytes > room:
        raise ModelError(_too_much(c, weights, reserves, limit, device, num_blocks * block_bytes))
    if c.max_model_len > num_blocks * block_size:
        raise ModelError(
            f"max_model_len {c.max_model_len} does not fit the KV pool of {num_blocks * block_size} tokens; lower it "
            "or enlarge the pool"
        )
    tokens = {str(dtype).removeprefix("torch.") if kv is None else kv: num_blocks * n for kv, n in block_sizes.items()}
    used = device.used if device is not None else 0
    return MemoryPlan(
        limit=limit,
        used=used,
        weights=weights,
        reserves=reserves,
        headroom=c.variant_headroom,
        block_bytes=block_bytes,
        num_blocks=num_blocks,
        kv_tokens=tokens,
        max_model_len=min(max_len, num_blocks * block_size),
        full_batch=full,
    )


def graph_bytes(config: EngineConfig, max_len: int, full_batch: int) -> int:
    """Allowance for the CUDA graphs of one variant; what those of all variants share comes once."""
    layouts = mixed_layouts(config, max_len, full_batch)
    return GRAPH_BYTES * (len(decode_sizes(min(config.max_num_seqs, MAX_GRAPH_SIZE))) + len(layouts))


def _widest(m: ModelConfig) -> int:
    """Values a token that a step keeps at most: activations of the widest layer."""
    return 2 * m.intermediate_size + 6 * m.hidden_size + 2 * (m.num_heads + 2 * m.num_kv_heads) * m.head_dim


def kept_bytes(config: EngineConfig, model_config: ModelConfig, dtype: torch.dtype) -> int:
    """Of a captured decode step, to be kept in L2: what is there at once, and some for gaps. Most is at the end of a
    layer: what down takes and leaves, that in two planes of fp32, the normed sum, and the residual before and after.
    """
    rows = min(config.max_num_seqs, MAX_GRAPH_SIZE) if config.keep_in_l2 else 0
    return rows * (model_config.intermediate_size + 7 * model_config.hidden_size) * dtype.itemsize * 5 // 4


def _reserves(
    config: EngineConfig,
    model_config: ModelConfig,
    dtype: torch.dtype,
    num_variants: int,
    max_len: int,
    full_batch: int,
    on_gpu: bool,
) -> dict[str, int]:
    """What the engine keeps beside weights and pool. A CPU gets the memory of a step when it needs it."""
    c, m, rows = config, model_config, config.max_num_seqs + 1
    tables = rows * (max_len + 1 + -(-max_len // c.block_size) + NUM_FLOATS + NUM_INTS) * 4
    reserves = {"rotary table": max_len * m.head_dim * 4, "tables of sequences": tables}
    if not on_gpu:
        return reserves
    # The largest tensors of a step: activations of the widest layer, and the logits with their float32 copies.
    widest = _widest(m)
    reserves["activations of a step"] = c.max_num_batched_tokens * widest * dtype.itemsize
    reserves["logits of a step"] = 6 * max(c.max_num_seqs, PROMPT_LOGPROB_ROWS) * m.vocab_size * 4
    if c.cuda_graphs:
        layouts = mixed_layouts(c, max_len, full_batch)
        hidden = max((x.num_outputs for x in layouts), default=0) * m.hidden_size
        logits = min(c.max_num_seqs, MAX_GRAPH_SIZE) * m.vocab_size
        reserves["outputs of CUDA graphs"] = (hidden + logits) * dtype.itemsize
        common = 2 * max((x.total_tokens for x in layouts), default=0) * widest * dtype.itemsize + GRAPHS_BYTES
        common += kept_bytes(c, m, dtype)
        reserves["CUDA graphs (allowance)"] = common + num_variants * graph_bytes(c, max_len, full_batch)
    return reserves


def _too_much(
    config: EngineConfig, weights: WeightBytes, reserves: dict[str, int], limit: int, device: DeviceMemory, pool: int
) -> str:
    gib = 1 << 30
    parts = {"weights": weights.total, "what steps need": sum(reserves.values()), "others and the driver": device.used}
    parts |= {"variant_headroom": config.variant_headroom} if config.variant_headroom else {}
    words = ", ".join(f"{name} {size / gib:.2f}" for name, size in parts.items())
    total = pool + sum(parts.values())
    share = "" if config.kv_cache_tokens else f" ({config.gpu_memory_utilization:g} of its memory)"
    fixes = "lower kv_cache_tokens" if config.kv_cache_tokens else "raise gpu_memory_utilization"
    return (
        f"{total / gib:.2f} GiB are needed and the GPU gives {limit / gib:.2f}{share}: {words}, the least KV pool "
        f"{pool / gib:.2f}. Serve fewer or smaller variants, {fixes}, or lower max_num_batched_tokens, max_num_seqs or "
        "variant_headroom"
    )
