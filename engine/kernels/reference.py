"""Plain PyTorch twins of the kernels: the definition of every operation, and its CPU path. Letters as in `__init__`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from engine.kernels import AttentionPlan

_FEW_ROWS = 64  # rows of activations up to which a product is bound by reading the weight
_PREFILL_CHUNK = 512  # queries per call of SDPA: bounds the mask and skips most of what causality hides


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
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
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    num_tokens = qkv.shape[0]
    block_size, num_kv_heads, head_dim = k_cache.shape[1:]
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
    k_cache[blocks, offsets] = k
    v_cache[blocks, offsets] = v
    return rotated[:, :num_heads]


def attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, plan: AttentionPlan, scale: float
) -> Tensor:
    num_decodes = plan.num_decodes
    if num_decodes == len(plan.query_lens_host) == q.shape[0]:
        return _decode(q, k_cache, v_cache, block_tables, plan, scale)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    if num_decodes:
        out[:num_decodes] = _decode(q[:num_decodes], k_cache, v_cache, block_tables, plan, scale)
    start = num_decodes
    for i in range(num_decodes, len(plan.query_lens_host)):
        num_queries, context = int(plan.query_lens_host[i]), int(plan.context_lens_host[i])
        tokens = slice(start, start + num_queries)
        start += num_queries
        if context:
            table = block_tables[plan.rows[i]]
            out[tokens] = _prefill(q[tokens], k_cache, v_cache, table, context, scale)
    return out


def _decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, plan: AttentionPlan, scale: float
) -> Tensor:
    """q[B, Hq, D], one query of each of the first B sequences, a sequence at a time.

    One sequence's keys and values stay in cache between the copy and the product, and nothing past its context is read.
    """
    batch, num_kv_heads, head_dim = q.shape[0], k_cache.shape[2], q.shape[2]
    tables = block_tables[plan.rows[:batch]]
    grouped = q.reshape(batch, 1, num_kv_heads, -1, head_dim)  # the G queries of a KV head are rows of one product
    out = torch.zeros_like(grouped)
    for i, context in enumerate(plan.context_lens_host[:batch].tolist()):
        if context:
            k = _gather(k_cache, tables[i], context).transpose(0, 1)[None]  # [1, Hkv, C, D]
            v = _gather(v_cache, tables[i], context).transpose(0, 1)[None]
            out[i] = F.scaled_dot_product_attention(grouped[i], k, v, scale=scale)
    return out.view(q.shape)


def _prefill(q: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor, context: int, scale: float) -> Tensor:
    """q[N, Hq, D], the last N of one sequence's `context` tokens; table[max_blocks]."""
    k = _gather(k_cache, table, context).transpose(0, 1)[None]  # [1, Hkv, C, D]
    v = _gather(v_cache, table, context).transpose(0, 1)[None]
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


def _gather(cache: Tensor, table: Tensor, context: int) -> Tensor:
    """cache[num_blocks, block_size, Hkv, D], table[max_blocks] -> one sequence's [context, Hkv, D], block by block."""
    num_blocks = -(-context // cache.shape[1])
    return cache.index_select(0, table[:num_blocks]).flatten(0, 1)[:context]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.shape[0] > _FEW_ROWS or x.device.type != "cpu":
        return F.linear(x, weight, bias)
    # The library splits the larger dimension over threads only when the weight is on the left: 1.3 x on two threads.
    out = torch.mm(weight, x.t()).t().contiguous()
    return out if bias is None else out.add_(bias)


def weight_only_matmul(x: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, _dequantize(qdata, scale).to(x.dtype), bias)


def _dequantize(qdata: Tensor, scale: Tensor) -> Tensor:
    """qdata.float() * scale, bit for bit, for every finite value.

    torch converts e4m3fn on a CPU one element at a time: 2.0 ms for 512 x 1024 on an EPYC core with torch 2.13, this
    0.17. Shifted into the place of fp16's exponent and mantissa, the bits are the value divided by 2^(15 - 7), exactly.
    """
    if qdata.dtype != torch.float8_e4m3fn:
        return qdata.float().mul_(scale)
    bits = qdata.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~(1 << 14))
    return bits.view(torch.float16).float().mul_(scale * 256)
