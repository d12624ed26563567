"""The fast path against its plain twins in fp32, at the shapes of a loaded model: a check that needs no test folder.

Two numbers for each operation: `mean`, the mean magnitude of the error over that of the expected values, and `worst`,
the largest error over the largest expected value. A 16-bit result is rounded to 8 or 11 bits, some operations twice;
a wrong tile, mask or scale moves both numbers by orders of magnitude. Without a GPU the twins check only themselves, in
the computing type against fp32.

Letters as in `engine.kernels`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine import kernels
from engine.config import ModelConfig
from engine.kernels import AttentionPlan, KVCache, columns, plan_tiles, reference
from engine.kv_pool import kv_dtype
from engine.models.qwen import Qwen
from engine.quant.linear import Linear, PlainLinear, W8A8Linear
from engine.quant.variants import Variant

ROWS = (1, 7, 40, 300)  # each has kernels or tiles of its own
GATED_ROWS = (*ROWS, 2048)
BOUNDS = {torch.float32: (1e-4, 1e-3)}  # mean, worst
BOUNDS_16_BITS = (1 / 100, 1 / 20)
DIFFERING_DRAWS = 0.03  # of rows: a logarithm or a sum may round the other way where two scores nearly tie
BLOCK_SIZE = 32


@dataclass(frozen=True)
class Check:
    """One comparison. what: the operation and its shape."""

    what: str
    mean: float
    worst: float
    bounds: tuple[float, float]

    @property
    def passed(self) -> bool:
        return self.mean <= self.bounds[0] and self.worst <= self.bounds[1]  # False for NaN


def compare(what: str, got: Tensor, expected: Tensor, dtype: torch.dtype) -> Check:
    wanted = expected.float()
    error = (got.float() - wanted).abs()
    mean, worst = error.mean() / wanted.abs().mean(), error.max() / wanted.abs().max()
    return Check(what, float(mean), float(worst), BOUNDS.get(dtype, BOUNDS_16_BITS))


@torch.inference_mode()
def check_all(variants: dict[str, Variant], config: ModelConfig, num_ids: int, dtype: torch.dtype) -> Iterator[Check]:
    """Every operation of a step; products of the first layer in every format that is loaded."""
    model = next(iter(variants.values())).model
    torch.manual_seed(0)
    yield from check_elementwise(model, config, dtype)
    for kv in dict.fromkeys(v.format.kv for v in variants.values()):
        cache_dtype = dtype if kv is None else kv_dtype(kv)
        yield check_rope(model, config, dtype, cache_dtype)
        yield from check_attention(config, dtype, cache_dtype, model.embedding.device)
    checked: set[tuple[object, ...]] = set()
    for variant in variants.values():
        f = variant.format
        if (*f.stored, f.activation) not in checked:
            checked.add((*f.stored, f.activation))
            yield from check_products(variant, dtype)
    yield from check_sampling(config.vocab_size, num_ids, dtype, model.embedding.device)


def check_elementwise(model: Qwen, config: ModelConfig, dtype: torch.dtype) -> Iterator[Check]:
    layer, eps, device = model.layers[0], config.rms_norm_eps, model.embedding.device
    for rows in (1, 300):
        x, residual = torch.randn(2, rows, config.hidden_size, device=device).to(dtype)
        gate_up = torch.randn(rows, 2 * config.intermediate_size, device=device).to(dtype)
        weight = layer.post_norm
        normed, total = kernels.add_rms_norm(x, residual, weight, eps)
        shape = f"[{rows}, {config.hidden_size}]"
        yield compare(f"add_rms_norm {shape}", normed, reference.rms_norm(total.float(), weight.float(), eps), dtype)
        expected = reference.rms_norm(x.float(), weight.float(), eps)
        yield compare(f"rms_norm {shape}", kernels.rms_norm(x, weight, eps), expected, dtype)
        what = f"silu_mul [{rows}, {config.intermediate_size}]"
        yield compare(what, kernels.silu_mul(gate_up), reference.silu_mul(gate_up.float()), dtype)


def check_rope(model: Qwen, config: ModelConfig, dtype: torch.dtype, stored: torch.dtype) -> Check:
    """Rotated queries, and what the cache then stands for."""
    c, layer, device = config, model.layers[0], model.embedding.device
    num_tokens = 70
    qkv = torch.randn(num_tokens, (c.num_heads + 2 * c.num_kv_heads) * c.head_dim, device=device).to(dtype)
    positions = torch.arange(num_tokens, dtype=torch.int32, device=device) % len(model.rotary)
    slots = torch.randperm(num_tokens, device=device).int()
    norms = layer.q_norm, layer.k_norm
    wide_norms = [None if n is None else n.float() for n in norms]
    cache, wide = (_cache(3, c, d, device) for d in (stored, torch.float32))
    q = kernels.rope_and_store(qkv, *norms, c.rms_norm_eps, model.rotary, positions, cache, slots)
    expected = reference.rope_and_store(
        qkv.float(), wide_norms[0], wide_norms[1], c.rms_norm_eps, model.rotary, positions, wide, slots
    )
    got = torch.cat([q.float().flatten(), *_values(cache)])
    what = f"rope_and_store, {_name(stored)} cache"
    bound = dtype if stored == dtype else stored
    check = compare(what, got, torch.cat([expected.flatten(), *_values(wide)]), bound)
    return check if stored == dtype else Check(what, check.mean, check.worst, (1 / 25, 1 / 10))  # a code is 4 to 8 bits


def check_attention(
    config: ModelConfig, dtype: torch.dtype, stored: torch.dtype, device: torch.device
) -> Iterator[Check]:
    """Decodes of short and long contexts, a chunk of a prompt, a whole prompt: in one batch, and the decodes alone."""
    mixes = (("decode", [1, 1, 1, 1], [1, 17, 300, 1500]), ("mixed", [1, 1, 100, 65], [33, 700, 600, 65]))
    for name, queries, contexts in mixes:
        num_decodes = queries.count(1)
        counts = [-(-c // BLOCK_SIZE) for c in contexts]
        cache = _cache(sum(counts), config, stored, device, random=True)
        tables = torch.zeros(len(counts), max(counts), dtype=torch.int32, device=device)
        blocks = torch.randperm(sum(counts), device=device).int()
        for row, own in enumerate(torch.split(blocks, counts)):
            tables[row, : len(own)] = own
        lens, host = np.array(queries, dtype=np.int32), np.array(contexts, dtype=np.int32)
        starts = torch.tensor([0, *np.cumsum(lens)], dtype=torch.int32, device=device)
        plan = AttentionPlan(
            torch.arange(len(lens), dtype=torch.int32, device=device),
            starts,
            torch.from_numpy(host).to(device),
            lens,
            host,
            num_decodes,
            torch.from_numpy(plan_tiles(lens, num_decodes)).to(device),
        )
        scale = config.head_dim**-0.5
        q = torch.randn(int(lens.sum()), config.num_heads, config.head_dim, device=device).to(dtype)
        wide = KVCache(cache.k.float(), cache.v.float()) if cache.k_scale is None else cache
        expected = reference.attention(q.float(), wide, tables, plan, scale)
        got = kernels.attention(q, cache, tables, plan, scale)
        yield compare(f"attention, {name}, {_name(stored)} cache", got, expected, dtype)
        if num_decodes == len(lens):
            yield check_decode_that_stores(config, cache, wide, tables, plan, dtype)


def check_decode_that_stores(
    config: ModelConfig, cache: KVCache, wide: KVCache, tables: Tensor, plan: AttentionPlan, dtype: torch.dtype
) -> Check:
    """One more token at the end of each context, without norms (see `check_rope`), rotated by its position."""
    c, device, last = config, tables.device, plan.context_lens - 1
    slots = tables[plan.rows.long(), last.long() // BLOCK_SIZE] * BLOCK_SIZE + last % BLOCK_SIZE
    qkv = torch.randn(len(last), (c.num_heads + 2 * c.num_kv_heads) * c.head_dim, device=device).to(dtype)
    angle = torch.arange(int(plan.context_lens_host.max()), device=device)[:, None]
    cos_sin = torch.cat([angle.cos(), angle.sin()], dim=1).repeat_interleave(c.head_dim // 2, dim=1)
    rest = (slots, tables, plan, c.head_dim**-0.5)
    expected = reference.rope_and_attend(qkv.float(), None, None, 0.0, cos_sin, last, wide, *rest)
    got = kernels.rope_and_attend(qkv, None, None, 0.0, cos_sin, last, cache, *rest)
    return compare(f"rope_and_attend, {_name(cache.k.dtype)} cache", got, expected, dtype)


def check_products(variant: Variant, dtype: torch.dtype) -> Iterator[Check]:
    layer, fmt = variant.model.layers[0], variant.format.name.partition("+")[0]
    for name, linear in (("qkv", layer.qkv), ("out", layer.out), ("gate_up", layer.gate_up), ("down", layer.down)):
        width, depth = linear.tensors[0].shape
        for rows in ROWS:
            x = torch.randn(rows, depth, device=linear.tensors[0].device).to(dtype)
            what = f"{fmt}, {name} [{rows}, {depth}] x [{width}, {depth}]"
            yield compare(what, linear(x), _wide_product(linear, x), dtype)
    linear = layer.gate_up
    width, depth = linear.tensors[0].shape
    for rows in GATED_ROWS:
        x = torch.randn(rows, depth, device=linear.tensors[0].device).to(dtype)
        got = linear.gated(x, None)
        assert isinstance(got, Tensor)
        what = f"{fmt}, gate_up with silu [{rows}, {depth}] x [{width}, {depth}]"
        yield compare(what, got, reference.silu_mul(_wide_product(linear, x)), dtype)


def _wide_product(linear: Linear, x: Tensor) -> Tensor:
    if isinstance(linear, PlainLinear):
        bias = None if linear.bias is None else linear.bias.float()
        return reference.linear(x.float(), linear.weight.float(), bias)
    q, scale, group = linear.qdata, linear.scale, linear.group_size
    bias = None if linear.bias is None else linear.bias.float()
    if isinstance(linear, W8A8Linear):
        tokens = x if linear.pre_scale is None else x * linear.pre_scale
        codes, x_scale = reference.quantize_tokens(tokens, q.dtype, group)
        return reference.w8a8_matmul(codes, x_scale, q, scale, bias, torch.float32, group)
    return reference.weight_only_matmul(x.float(), q, scale, bias, group)


def check_sampling(vocab_size: int, num_ids: int, dtype: torch.dtype, device: torch.device) -> Iterator[Check]:
    rows = 64
    logits = (torch.randn(rows, vocab_size, device=device) * 3).to(dtype)
    log_sums, values, _ = kernels.survey(logits, min(20, num_ids), num_ids)
    expected_sums, expected, _ = reference.survey(logits.float(), min(20, num_ids), num_ids)
    both = torch.cat([values, log_sums[:, None]], dim=1), torch.cat([expected, expected_sums[:, None]], dim=1)
    yield compare(f"survey [{rows}, {vocab_size}]", *both, torch.float32)
    floats = torch.zeros(rows, columns.NUM_FLOATS, device=device)
    floats[:, columns.TEMPERATURE] = torch.linspace(0, 2, rows, device=device)
    ints = torch.randint(-(1 << 31), 1 << 31, (rows, columns.NUM_INTS), device=device).int()  # seeds
    ints[:, columns.TOP_K], ints[:, columns.NUM_LOGPROBS] = 0, -1
    places, tokens = torch.arange(rows, device=device).int(), torch.zeros(rows, rows, device=device).int()
    for top_p in (1.0, 0.9):
        floats[:, columns.TOP_P] = top_p
        args = (logits, places, places, floats, ints, tokens, num_ids, 0, top_p < 1, -1)
        share = float((kernels.draw(*args) != reference.draw(*args)).float().mean())
        what = f"draw [{rows}, {vocab_size}]{', top-p' if top_p < 1 else ''} (share of ids that differ)"
        yield Check(what, share, share, (DIFFERING_DRAWS, DIFFERING_DRAWS))


def _cache(
    num_blocks: int, config: ModelConfig, stored: torch.dtype, device: torch.device, random: bool = False
) -> KVCache:
    shape = (num_blocks, BLOCK_SIZE, config.num_kv_heads, config.head_dim)
    both = torch.randn(2, *shape, device=device) if random else torch.zeros(2, *shape, device=device)
    if stored.itemsize > 1:
        return KVCache(*both.to(stored))
    scales = torch.zeros(2, num_blocks, config.num_kv_heads, BLOCK_SIZE, device=device)
    if not random:
        return KVCache(*torch.zeros(2, *shape, device=device).to(stored), *scales)
    codes, scale = reference.quantize_kv(both.flatten(0, 2), stored)
    scales.copy_(scale.view(2, num_blocks, BLOCK_SIZE, -1).transpose(2, 3))
    return KVCache(*codes.view(both.shape), *scales)


def _values(cache: KVCache) -> list[Tensor]:
    """What keys and values stand for, flat, in fp32."""
    values = []
    for stored, scale in ((cache.k, cache.k_scale), (cache.v, cache.v_scale)):
        wide = stored.float() if scale is None else stored.float() * scale.transpose(1, 2)[..., None]
        values.append(wide.flatten())
    return values


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
