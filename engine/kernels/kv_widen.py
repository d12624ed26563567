"""Triton kernel that turns 8-bit contexts into 16 bits once, for a prefill that would otherwise do so in every tile.

A tile of prefill widens each code it reads, and a prompt of 2,048 tokens has 32 tiles that read the same codes; tensor
cores wait for that (1.7 times the time of 16 bits). Widened once, the contexts take 12 us a layer and 8,192 tokens more
than they would in 16 bits. They are laid out as a small pool with tables of its own, so that prefill does not differ.
"""

# Triton is untyped: a jitted function has no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine.kernels import WIDENED_CONTEXT, AttentionPlan, KVCache, chip
from engine.kernels.kv_codes import check_cache, widen

_ROWS = 64  # heads of tokens a program
_MAX_SEQUENCES = 1024


@triton.jit(do_not_specialize=["num_decodes", "num_sequences"], do_not_specialize_on_alignment=["rows", "context_lens"])
def widen_kernel(
    k_cache,
    v_cache,
    k_scale,
    v_scale,
    block_tables,
    rows,
    context_lens,
    k_out,  # [blocks, BLOCK_SIZE, Hkv, D]
    v_out,
    tables_out,  # [sequences past num_decodes, table_stride]
    rows_out,  # [B]
    table_stride,
    block_stride,
    num_decodes,
    num_sequences,  # past num_decodes
    BLOCK_SIZE: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    KIND: tl.constexpr,
    FAST: tl.constexpr,
    ROWS: tl.constexpr,
    MAX_SEQUENCES: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    part, number = tl.program_id(0), tl.program_id(1)  # number: of a block among those of all contexts
    others = tl.arange(0, MAX_SEQUENCES)
    contexts = tl.load(context_lens + num_decodes + others, mask=others < num_sequences, other=0)
    counts = tl.cdiv(contexts, BLOCK_SIZE)
    own = tl.sum((tl.cumsum(counts, axis=0) <= number).to(tl.int32), axis=0)
    if own >= num_sequences:
        return
    first = number - tl.sum(tl.where(others < own, counts, 0), axis=0)  # the block's place in its context
    context = tl.load(context_lens + num_decodes + own)
    sequence = num_decodes + own
    if part == 0:
        tl.store(tables_out + own * table_stride + first, number)
        tl.store(rows_out + sequence, own)
    block = tl.load(block_tables + tl.load(rows + sequence).to(tl.int64) * table_stride + first).to(tl.int64)
    row, d = part * ROWS + tl.arange(0, ROWS), tl.arange(0, D)  # a row: a head of a token
    token, head = row // HKV, row % HKV
    exists = (token < BLOCK_SIZE) & (first * BLOCK_SIZE + token < context)
    source = block * block_stride + row[:, None] * D + d[None, :]
    scale = (block * HKV + head) * BLOCK_SIZE + token
    place = number.to(tl.int64) * (BLOCK_SIZE * HKV * D) + row[:, None] * D + d[None, :]
    k = widen(tl.load(k_cache + source, mask=exists[:, None], other=0), KIND, FAST).to(tl.float32)
    v = widen(tl.load(v_cache + source, mask=exists[:, None], other=0), KIND, FAST).to(tl.float32)
    k *= tl.load(k_scale + scale, mask=exists, other=0.0)[:, None]
    v *= tl.load(v_scale + scale, mask=exists, other=0.0)[:, None]
    tl.store(k_out + place, k.to(k_out.dtype.element_ty), mask=exists[:, None])
    tl.store(v_out + place, v.to(v_out.dtype.element_ty), mask=exists[:, None])


def widening_pays(q: Tensor, plan: AttentionPlan) -> bool:
    """Whether the contexts past num_decodes are few enough to widen: for prompts that begin in this batch or the one
    before. What a batch of so many tokens needs at most is then known.
    """
    most = WIDENED_CONTEXT * (q.shape[0] - plan.num_decodes)
    return q.itemsize == 2 and len(plan.rows) <= _MAX_SEQUENCES and _context(plan) <= most


def _context(plan: AttentionPlan) -> int:
    """Positions past num_decodes, at most."""
    if plan.most_context is not None:
        return plan.most_context
    return int(plan.context_lens_host[plan.num_decodes :].sum())


def widened(
    cache: KVCache, block_tables: Tensor, plan: AttentionPlan, dtype: torch.dtype
) -> tuple[KVCache, Tensor, AttentionPlan]:
    """The contexts past num_decodes of an 8-bit cache in `dtype`: a pool, its tables, and the plan that goes with them.

    Each value is the twins': code.float() * scale, rounded.
    """
    kind, k_cache, v_cache, k_scale, v_scale = check_cache(cache, dtype)
    _, block_size, num_kv_heads, head_dim = k_cache.shape
    num_sequences = len(plan.rows) - plan.num_decodes
    num_blocks = _context(plan) // block_size + num_sequences
    pool = torch.empty((2, num_blocks, *k_cache.shape[1:]), dtype=dtype, device=k_cache.device)
    # Rows as far apart as in the tables that prefill is given otherwise, so that it is compiled once.
    tables = block_tables.new_empty(num_sequences, block_tables.stride(0))
    rows = torch.empty_like(plan.rows)
    widen_kernel[(triton.cdiv(block_size * num_kv_heads, _ROWS), num_blocks)](
        k_cache,
        v_cache,
        k_scale,
        v_scale,
        block_tables,
        plan.rows,
        plan.context_lens,
        pool[0],
        pool[1],
        tables,
        rows,
        block_tables.stride(0),
        k_cache.stride(0),
        plan.num_decodes,
        num_sequences,
        BLOCK_SIZE=block_size,
        HKV=num_kv_heads,
        D=head_dim,
        KIND=kind,
        FAST=not triton.knobs.runtime.interpret,
        ROWS=_ROWS,
        MAX_SEQUENCES=_MAX_SEQUENCES,
        num_warps=4,
        **chip.dependent_launch(k_cache.device),
    )
    return KVCache(pool[0], pool[1]), tables, replace(plan, rows=rows)
