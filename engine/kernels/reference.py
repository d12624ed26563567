"""Plain PyTorch twins of the kernels: the definition of every operation, and its CPU path. Letters as in `__init__`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.columns import MIN_P, SEED_HIGH, SEED_LOW, TEMPERATURE, TOP_K, TOP_P
from engine.quant.quantize import dequantize, quantize

if TYPE_CHECKING:
    from engine.kernels import AttentionPlan, KVCache

_FEW_ROWS = 64  # rows of activations up to which a product is bound by reading the weight
SMALLEST_KV = 1e-30  # of a head's largest magnitude: keeps the scale of zeros a normal number
_PREFILL_CHUNK = 512  # queries per call of SDPA: bounds the mask and skips most of what causality hides


def decode_inputs(
    rows: Tensor, contexts: Tensor, tokens: Tensor, blocks: Tensor, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    row, positions = rows.long(), (contexts - 1).clamp(min=0)
    where = positions.long()
    slots = blocks[row, where // block_size] * block_size + positions % block_size
    return tokens[row, where], positions, torch.where(contexts > 0, slots, -1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if x.dim() == 3:
        x = sum(x[1:], start=x[0]).to(residual.dtype)  # in order
    total = x + residual
    return rms_norm(total, weight, eps), total


def silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def rope_and_store(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    cos_sin: Tensor,
    positions: Tensor,
    cache: KVCache,
    slots: Tensor,
) -> Tensor:
    num_tokens = qkv.shape[0]
    block_size, num_kv_heads, head_dim = cache.k.shape[1:]
    heads = qkv.view(num_tokens, -1, head_dim)  # [T, Hq + 2 Hkv, D]
    num_heads = heads.shape[1] - 2 * num_kv_heads
    qk, v = heads[:, : num_heads + num_kv_heads], heads[:, num_heads + num_kv_heads :]
    if q_norm is not None:
        assert k_norm is not None
        weight = torch.cat([q_norm.expand(num_heads, -1), k_norm.expand(num_kv_heads, -1)])  # [Hq + Hkv, D]
        qk = rms_norm(qk, weight, eps)
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)  # [T, 1, D/2] each
    first, second = qk.float().chunk(2, dim=-1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(qkv.dtype)
    k = rotated[:, num_heads:]
    stored = slots >= 0
    if not bool(stored.all()):
        k, v, slots = k[stored], v[stored], slots[stored]
    blocks, offsets = slots // block_size, slots % block_size
    for stored, scales, value in ((cache.k, cache.k_scale, k), (cache.v, cache.v_scale, v)):
        if scales is None:
            stored[blocks, offsets] = value
        else:
            codes, scale = quantize_kv(value, stored.dtype)
            stored.view(torch.int8)[blocks, offsets] = codes.view(torch.int8)  # torch cannot index float8
            scales[blocks, :, offsets] = scale
    return rotated[:, :num_heads]


def quantize_kv(value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """value[T, Hkv, D] -> codes[T, Hkv, D] in `dtype` (int8, float8_e4m3fn) and scale[T, Hkv] fp32, as in `KVCache`."""
    largest = value.float().abs().amax(-1).clamp_(min=SMALLEST_KV)
    # Divided by a tensor: on a GPU, division by a number multiplies by its reciprocal.
    scale = largest / torch.full_like(largest, 127.0 if dtype == torch.int8 else 448.0)
    scaled = value.float() / scale.unsqueeze(-1)
    return (scaled.round_() if dtype == torch.int8 else scaled).to(dtype), scale


def attention(q: Tensor, cache: KVCache, block_tables: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    num_decodes = plan.num_decodes
    if num_decodes == len(plan.query_lens_host) == q.shape[0]:
        return _decode(q, cache, block_tables, plan, scale)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    if num_decodes:
        out[:num_decodes] = _decode(q[:num_decodes], cache, block_tables, plan, scale)
    start = num_decodes
    for i in range(num_decodes, len(plan.query_lens_host)):
        num_queries, context = int(plan.query_lens_host[i]), int(plan.context_lens_host[i])
        tokens = slice(start, start + num_queries)
        start += num_queries
        if context:
            table = block_tables[plan.rows[i]]
            out[tokens] = _prefill(q[tokens], cache, table, context, scale)
    return out


def rope_and_attend(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    cos_sin: Tensor,
    positions: Tensor,
    cache: KVCache,
    slots: Tensor,
    block_tables: Tensor,
    plan: AttentionPlan,
    scale: float,
) -> Tensor:
    q = rope_and_store(qkv, q_norm, k_norm, eps, cos_sin, positions, cache, slots)
    return attention(q, cache, block_tables, plan, scale)


def _decode(q: Tensor, cache: KVCache, block_tables: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    """q[B, Hq, D], one query of each of the first B sequences, a sequence at a time.

    One sequence's keys and values stay in cache between the copy and the product, and nothing past its context is read.
    """
    batch, num_kv_heads, head_dim = q.shape[0], cache.k.shape[2], q.shape[2]
    tables = block_tables[plan.rows[:batch]]
    grouped = q.reshape(batch, 1, num_kv_heads, -1, head_dim)  # the G queries of a KV head are rows of one product
    out = torch.zeros_like(grouped)
    for i, context in enumerate(plan.context_lens_host[:batch].tolist()):
        if context:
            k, v = _gather_both(cache, tables[i], context, q.dtype)
            out[i] = F.scaled_dot_product_attention(grouped[i], k, v, scale=scale)
    return out.view(q.shape)


def _prefill(q: Tensor, cache: KVCache, table: Tensor, context: int, scale: float) -> Tensor:
    """q[N, Hq, D], the last N of one sequence's `context` tokens; table[max_blocks]."""
    k, v = _gather_both(cache, table, context, q.dtype)
    num_queries = q.shape[0]
    chunks: list[Tensor] = []
    for start in range(0, num_queries, _PREFILL_CHUNK):
        chunk = q[start : start + _PREFILL_CHUNK]  # [n, Hq, D]
        first = context - num_queries + start  # position of the chunk's first query
        seen = first + len(chunk)
        mask = None
        if first:
            mask = torch.ones(len(chunk), seen, dtype=torch.bool, device=q.device).tril_(first)
        out = F.scaled_dot_product_attention(
            chunk.transpose(0, 1)[None],
            k[:, :, :seen],
            v[:, :, :seen],
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=True,
        )
        chunks.append(out[0].transpose(0, 1))
    return torch.cat(chunks)


def _gather_both(cache: KVCache, table: Tensor, context: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One sequence's keys and values, [1, Hkv, context, D] each, in `dtype`."""
    k = _gather(cache.k, cache.k_scale, table, context, dtype)
    return k, _gather(cache.v, cache.v_scale, table, context, dtype)


def _gather(stored: Tensor, scales: Tensor | None, table: Tensor, context: int, dtype: torch.dtype) -> Tensor:
    """stored[num_blocks, block_size, Hkv, D], table[max_blocks] -> [1, Hkv, context, D], block by block."""
    blocks = table[: -(-context // stored.shape[1])]
    if scales is None:
        values = stored.index_select(0, blocks).flatten(0, 1)[:context]
    else:
        codes = stored.view(torch.int8).index_select(0, blocks).flatten(0, 1)[:context].view(stored.dtype)
        scale = scales.index_select(0, blocks).transpose(1, 2).flatten(0, 1)[:context]  # [context, Hkv]
        values = dequantize(codes.flatten(0, 1), scale.reshape(-1, 1), 0, dtype).view(codes.shape)
    return values.transpose(0, 1)[None]


def mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers with good avalanche, on int32 (lowbias32 of github.com/skeeto/hash-prospector)."""
    x = _scramble(x)
    return x ^ ((x >> 16) & 0xFFFF)


def _scramble(x: Tensor) -> Tensor:
    """`mix` but for its last step, which small numbers pass unchanged."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    return x * (0x846CA68B - (1 << 32))  # as a signed 32-bit factor


def gumbel_noise(seed_low: Tensor, seed_high: Tensor, positions: Tensor, num_ids: int) -> Tensor:
    """[B, num_ids] fp32 standard Gumbel noise, a function of (seed, position, id) alone; all [B] int32."""
    key = mix(mix(mix(seed_low) ^ seed_high) + positions)[:, None]
    ids = torch.arange(num_ids, dtype=torch.int32, device=key.device)[None, :]
    spread = ids * (0x9E3779B1 - (1 << 32)) ^ key  # the golden ratio, for neighbouring ids
    bits = _scramble(spread).long() & 0xFFFFFFFF
    uniform = (bits.float() + 0.5) * 2.0**-32  # finest where noise is largest, as that is what is drawn
    return -torch.log(-torch.log1p(-uniform.clamp(max=1 - 2.0**-24)))


def nucleus_thresholds(logits: Tensor, temperature: Tensor, top_p: Tensor) -> Tensor:
    """[B] fp32, the smallest logit of each row's nucleus. logits[B, V] fp32; temperature, top_p [B]; 1 is off: -inf."""
    falling = logits.sort(dim=-1, descending=True).values
    probabilities = (falling / temperature.clamp(min=1e-5)[:, None]).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    num_kept = (before < top_p[:, None]).sum(-1).clamp(min=1)
    last = falling.gather(1, (num_kept - 1)[:, None])[:, 0]
    return torch.where(top_p < 1, last, float("-inf"))


def drawn_ids(
    logits: Tensor,
    temperature: Tensor,
    thresholds: Tensor | None,
    top_p: Tensor | None,
    seed_low: Tensor,
    seed_high: Tensor,
    positions: Tensor,
    num_ids: int,
) -> Tensor:
    """[B] int64, the arg max of logit / temperature + noise. thresholds: [B] fp32, ids whose logit is below are not
    drawn (temperature 0 ignores them). top_p: [B] fp32, of all ids whatever the thresholds; 1 is off.
    """
    logits = logits[:, :num_ids].float()
    drawn = temperature > 0
    if not bool(drawn.any()):
        return logits.argmax(-1)
    if top_p is not None:
        nucleus = nucleus_thresholds(logits, temperature, top_p)
        thresholds = nucleus if thresholds is None else torch.maximum(nucleus, thresholds)
    scaled = logits / temperature.clamp(min=1e-5)[:, None]
    if thresholds is not None:
        scaled = scaled.masked_fill(logits < thresholds[:, None], float("-inf"))
    noise = gumbel_noise(seed_low, seed_high, positions, num_ids)
    return torch.where(drawn[:, None], scaled + noise, logits).argmax(-1)


def filter_thresholds(ordered: Tensor, floats: Tensor, top_k: Tensor) -> Tensor:
    """[B] float32: an id may be drawn if its logit is at least this. Ids that tie with the last one kept are kept.

    Top-k, then the smallest set that holds top-p of what is left (an id stays while the mass before it is below top_p),
    then ids of at least min-p of the best one's probability. The top-p of rows without top-k is `nucleus_thresholds`'.

    ordered [B, W]: the largest logits before temperature, falling, as many as the largest top_k; floats [B, 6]; top_k
    [B] int32 (0: off).
    """
    temperature = floats[:, TEMPERATURE, None].clamp(min=1e-5)
    place = torch.arange(ordered.shape[1], device=ordered.device)[None, :]
    within = place < top_k[:, None]
    probabilities = (ordered / temperature).masked_fill_(~within, float("-inf")).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    num_kept = (within & (before < floats[:, TOP_P, None])).sum(-1).clamp(min=1)
    last = ordered.gather(1, (num_kept - 1)[:, None])[:, 0]
    by_rank = torch.where(top_k > 0, last, float("-inf"))
    # p >= min_p * best, in logits; log 0 is -inf: off
    return torch.maximum(by_rank, ordered[:, 0] + temperature[:, 0] * floats[:, MIN_P].log())


def draw(
    logits: Tensor,
    rows: Tensor,
    positions: Tensor,
    floats: Tensor,
    ints: Tensor,
    tokens: Tensor,
    num_ids: int,
    filter_width: int,
    nucleus: bool,
    top: int,
) -> Tensor:
    at = rows.long()
    f, i = floats[at], ints[at]
    thresholds = top_p = None
    if filter_width:
        ordered = logits[:, :num_ids].float().topk(min(filter_width, num_ids), dim=-1).values
        thresholds = filter_thresholds(ordered, f, i[:, TOP_K])
    if nucleus:
        top_p = torch.where(i[:, TOP_K] > 0, 1.0, f[:, TOP_P])
    seeds = i[:, SEED_LOW], i[:, SEED_HIGH]
    drawn = drawn_ids(logits, f[:, TEMPERATURE], thresholds, top_p, *seeds, positions, num_ids)
    tokens[at, positions.long()] = drawn.int()
    if top < 0:
        return drawn.int()[:, None]
    log_sums, _, best = survey(logits, top, num_ids)
    ids = torch.cat([drawn[:, None], best], dim=1)
    values = logits.gather(1, ids).float() - log_sums[:, None]
    return torch.cat([ids.int(), values.view(torch.int32)], dim=1)


def survey(logits: Tensor, k: int, num_ids: int) -> tuple[Tensor, Tensor, Tensor]:
    values, ids = logits[:, :num_ids].float().topk(k, dim=-1)
    return logits.float().logsumexp(-1), values, ids


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.shape[0] > _FEW_ROWS or x.device.type != "cpu":
        return F.linear(x, weight, bias)
    # The library splits the larger dimension over threads only when the weight is on the left: 1.3 x on two threads.
    out = torch.mm(weight, x.t()).t().contiguous()
    return out if bias is None else out.add_(bias)


def weight_only_matmul(
    x: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None = None, group_size: int = 0
) -> Tensor:
    weight = dequantize(qdata, scale, group_size, torch.float32)
    return F.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)


def quantize_tokens(
    x: Tensor, dtype: torch.dtype, group_size: int = 0, pre_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    smooth = x if pre_scale is None else x * pre_scale  # in fp32, as pre_scale is
    return quantize(smooth, dtype, f"g{group_size}" if group_size else "row")


def split_tokens(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    value = x.float()
    largest = value.abs().amax(-1, keepdim=True).clamp_(min=1e-30)
    if dtype == torch.int8:
        scale = largest / torch.full_like(largest, 127.0)  # by a tensor: a GPU multiplies by a number's reciprocal
        value *= 1.0 / scale
        high = value.round()
        low = ((value - high) * 254).round_()
    else:
        exponent = (largest.view(torch.int32) + 0x1FFFFF) >> 23  # of the first power of two from largest / 1.75 on
        scale = ((exponent - 8) << 23).view(torch.float32)
        value /= scale
        high = value.to(dtype).float()
        low = (value - high) * 16
    return torch.stack([high, low], dim=1).flatten(0, 1).to(dtype), scale


def digits_matmul(
    x: Tensor,
    x_scale: Tensor,
    qdata: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    group_size: int = 0,
) -> Tensor:
    high, low = x.float().view(-1, 2, x.shape[1]).unbind(1)
    tokens = (high + low / (254 if x.dtype == torch.int8 else 16)) * x_scale
    return weight_only_matmul(tokens, qdata, scale, bias, group_size).to(dtype)


def w8a8_matmul(
    x: Tensor,
    x_scale: Tensor,
    qdata: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    group_size: int = 0,
) -> Tensor:
    tokens = dequantize(x, x_scale, group_size, torch.float32)
    weight = dequantize(qdata, scale, group_size, torch.float32)
    return F.linear(tokens, weight, None if bias is None else bias.float()).to(dtype)
