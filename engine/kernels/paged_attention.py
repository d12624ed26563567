"""Causal attention over the paged pool: which kernel takes which tokens. Letters as in `__init__`."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from engine.kernels import AttentionPlan, KVCache, chip
from engine.kernels.decode_attention import choose_splits, decode, rope_and_decode
from engine.kernels.kv_widen import widened, widening_pays
from engine.kernels.prefill_attention import prefill
from engine.kernels.rope import rope_and_store
from engine.kernels.tiles import empty_rows


def attention(q: Tensor, cache: KVCache, block_tables: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    out = empty_rows(q, *q.shape)
    if plan.num_decodes:
        decode(q, cache, block_tables, plan, scale, _num_splits(cache, plan), out)
    if len(plan.tiles):
        if cache.k_scale is not None and widening_pays(q, plan):
            cache, block_tables, plan = widened(cache, block_tables, plan, q.dtype)
        prefill(q, cache, block_tables, plan, scale, out)
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
    new = (qkv, q_norm, k_norm, eps, cos_sin, positions, cache, slots)
    if not (chip.fuses() and plan.num_decodes == len(qkv) > 0 and not len(plan.tiles)):
        return attention(rope_and_store(*new), cache, block_tables, plan, scale)
    num_kv_heads, head_dim = cache.k.shape[2:]
    out = empty_rows(qkv, len(qkv), qkv.shape[1] // head_dim - 2 * num_kv_heads, head_dim)
    rope_and_decode(*new, block_tables, plan, scale, _num_splits(cache, plan), out)
    return out


def _num_splits(cache: KVCache, plan: AttentionPlan) -> int:
    longest = int(np.max(plan.context_lens_host[: plan.num_decodes]))
    programs, num_sms = plan.num_decodes * cache.k.shape[2], chip.num_sms(cache.k.device)
    return choose_splits(programs, longest, num_sms, cache.k.itemsize)
