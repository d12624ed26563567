"""Causal attention over the paged pool: which kernel takes which tokens. Letters as in `__init__`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engine.kernels import AttentionPlan, KVCache, chip
from engine.kernels.decode_attention import choose_splits, decode
from engine.kernels.kv_widen import widened, widening_pays
from engine.kernels.prefill_attention import prefill


def attention(q: Tensor, cache: KVCache, block_tables: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    out = torch.empty_like(q)
    if plan.num_decodes:
        programs = plan.num_decodes * cache.k.shape[2]
        longest = int(np.max(plan.context_lens_host[: plan.num_decodes]))
        num_splits = choose_splits(programs, longest, chip.num_sms(q.device))
        decode(q, cache, block_tables, plan, scale, num_splits, out)
    if len(plan.tiles):
        if cache.k_scale is not None and widening_pays(q, cache, plan):
            cache, block_tables, plan = widened(cache, block_tables, plan, q.dtype)
        prefill(q, cache, block_tables, plan, scale, out)
    return out
