"""Builders that the kernel tests share: paged batches whose pool is NaN where nothing may read, and what they mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.kernels import AttentionPlan, plan_tiles


@dataclass
class PagedBatch:
    """Arguments of `attention`, and each sequence's keys and values [context, Hkv, D] out of the pool."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_tables: Tensor
    plan: AttentionPlan
    keys: list[Tensor]
    values: list[Tensor]

    def args(self, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor, AttentionPlan, float]:
        return self.q, self.k_cache, self.v_cache, self.block_tables, self.plan, scale

    def widened(self, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor, AttentionPlan, float]:
        """The same arguments in fp32: what a 16-bit kernel is compared with."""
        return self.q.float(), self.k_cache.float(), self.v_cache.float(), self.block_tables, self.plan, scale


def make_batch(
    query_lens: list[int],
    context_lens: list[int],
    num_decodes: int,
    *,
    heads: tuple[int, int, int],
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    apart: bool = False,
) -> PagedBatch:
    """`heads` is (Hq, Hkv, D). apart: blocks do not lie next to each other in memory.

    Table rows are shuffled, entries past a context are out of range, and the pool is NaN past each context.
    """
    num_heads, num_kv_heads, head_dim = heads
    generator = torch.Generator().manual_seed(0)
    counts = [-(-c // block_size) for c in context_lens]
    num_blocks, num_rows = sum(counts) + 2, len(context_lens) + 2
    pool = torch.full((2, num_blocks, 1 + apart, block_size, num_kv_heads, head_dim), torch.nan)
    tables = torch.full((num_rows, max([*counts, 1]) + 1), 1 << 30, dtype=torch.int32)
    rows = torch.randperm(num_rows, generator=generator)[: len(context_lens)].int()
    blocks = torch.randperm(num_blocks, generator=generator).int()
    keys, values = [], []
    for row, count, context in zip(rows, counts, context_lens, strict=True):
        own, blocks = blocks[:count], blocks[count:]
        tables[row, :count] = own
        position = torch.arange(context)
        kv = torch.randn(2, context, num_kv_heads, head_dim, generator=generator).to(dtype)
        pool[:, own[position // block_size], 0, position % block_size] = kv.float()
        keys.append(kv[0])
        values.append(kv[1])
    pool = pool.to(device, dtype)
    lens, contexts = np.array(query_lens), np.array(context_lens)
    plan = AttentionPlan(
        rows=rows.to(device),
        query_starts=torch.tensor([0, *np.cumsum(lens)], dtype=torch.int32, device=device),
        context_lens=torch.tensor(context_lens, dtype=torch.int32, device=device),
        query_lens_host=lens,
        context_lens_host=contexts,
        num_decodes=num_decodes,
        tiles=torch.from_numpy(plan_tiles(lens, num_decodes)).to(device),
    )
    q = torch.randn(int(lens.sum()), num_heads, head_dim, generator=generator).to(device, dtype)
    return PagedBatch(q, pool[0, :, 0], pool[1, :, 0], tables.to(device), plan, keys, values)


def attend_naively(batch: PagedBatch, scale: float) -> Tensor:
    """Softmax attention in fp64, one sequence at a time, from its keys and values outside the pool."""
    out = []
    for n, q, k, v in zip(
        batch.plan.query_lens_host,
        batch.q.cpu().double().split(batch.plan.query_lens_host.tolist()),
        batch.keys,
        batch.values,
        strict=True,
    ):
        context, group = len(k), q.shape[1] // batch.k_cache.shape[2]
        if context == 0:
            out.append(torch.zeros_like(q))
            continue
        k, v = (t.double().repeat_interleave(group, dim=1) for t in (k, v))  # [context, Hq, D]
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        hidden = torch.arange(context) > torch.arange(context - n, context)[:, None]
        out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v))
    return torch.cat(out)


@pytest.fixture
def paged_batch() -> Callable[..., PagedBatch]:
    return make_batch


@pytest.fixture
def naive_attention() -> Callable[[PagedBatch, float], Tensor]:
    return attend_naively


@dataclass
class RopeCase:
    """Arguments of `rope_and_store`; the pool is NaN and every fourth token is padding."""

    qkv: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    cos_sin: Tensor
    positions: Tensor
    k_cache: Tensor
    v_cache: Tensor
    slots: Tensor

    def on_fresh_pool(self, function: Callable[..., Tensor], device: str) -> tuple[Tensor, Tensor, Tensor]:
        """(q, k_cache, v_cache) after running `function` on copies of the arguments."""
        k_cache, v_cache = self.k_cache.to(device, copy=True), self.v_cache.to(device, copy=True)
        args = [None if t is None else t.to(device) for t in (self.qkv, self.q_norm, self.k_norm)]
        rest = [t.to(device) for t in (self.cos_sin, self.positions)]
        return function(*args, 1e-6, *rest, k_cache, v_cache, self.slots.to(device)), k_cache, v_cache


@pytest.fixture
def rope_case() -> Callable[..., RopeCase]:
    def make(num_tokens: int, heads: tuple[int, int, int], *, norm: bool, dtype: torch.dtype) -> RopeCase:
        num_heads, num_kv_heads, head_dim = heads
        generator = torch.Generator().manual_seed(1)
        num_blocks = -(-num_tokens // 16) + 1
        slots = torch.randperm(num_blocks * 16, generator=generator)[:num_tokens].int()
        slots[3::4] = -1
        angle = torch.arange(512)[:, None] * torch.logspace(0, -4, head_dim // 2)
        pool = torch.full((num_blocks, 16, num_kv_heads, head_dim), torch.nan, dtype=dtype)
        gains = [torch.rand(head_dim, generator=generator).to(dtype) + 0.5 if norm else None for _ in range(2)]
        width = (num_heads + 2 * num_kv_heads) * head_dim
        return RopeCase(
            torch.randn(num_tokens, width, generator=generator).to(dtype) * 3,
            *gains,
            torch.cat([angle.cos(), angle.sin()], dim=1),
            torch.randint(512, (num_tokens,), generator=generator).int(),
            pool,
            pool.clone(),
            slots,
        )

    return make
