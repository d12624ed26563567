"""Triton kernel of attention for one query a sequence over the paged pool. Letters as in `__init__`.

Reading keys and values is all the time there is, so the plan is to keep many reads in flight and little between them:

- A program is one warp, several of which share an SM and wait independently: nothing in the loop is a barrier. It takes
  the G queries of one KV head of one sequence, as columns of a tensor-core tile of eight; positions are its rows. So a
  key is read once for all of them, and softmax wastes little on columns that hold no query.
- A tile of positions lies in one block: one table entry, fetched a tile ahead, then constant offsets.
- One program a KV head is too few at small batches, so the context is split among several (flash-decoding, Dao et al.,
  2023). The host bounds their number, for it may not know the contexts (a captured graph); a sequence uses as many as
  its context needs, and the others leave at once. Each leaves its normalised sum and log-sum-exp, and the last to
  arrive joins them; a sequence with one part writes its output directly.

Softmax is online (Milakov and Gimelshein, 2018, arXiv:1805.02867), in base 2, with fp32 sums.

Codes of an 8-bit cache go to shared memory as they are and are widened in the registers that feed the tensor cores, to
fp16, which holds every code. Tensor cores take two neighbours along what is summed in one register. For a key these are
channels, neighbours in memory. For a value they are positions, so pairs of channels are read as 16 bits, which shared
memory can transpose, and their halves make two products, of even channels and of odd ones. The scale of a key goes to
its scores; that of a value to its probabilities, see `kv_codes.exponents`.
"""

# Triton is untyped: a jitted function has no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass
from functools import cache as once

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine.kernels import AttentionPlan, KVCache, chip
from engine.kernels.kv_codes import LOG2_E, check_attention, exponents, fit_fp16, widen, widen_pairs

MAX_SPLITS = 32
MIN_SPLIT = 32  # positions; below this joining costs more than the split gains
_PROGRAMS_PER_SM = 6  # more than that read no faster, and each that leaves at once still costs 4 ns
_COLUMNS = 8  # the least columns of a tensor-core tile; G of them are used
_MAX_COUNTERS = 1 << 16


@dataclass(frozen=True)
class Tile:
    """Positions of one program's tile (never more than a block has), and how it is run."""

    block_n: int
    num_warps: int
    num_stages: int


def choose_tile(dtype: torch.dtype, kind: str, block_size: int, programs_per_sm: float) -> Tile:
    """dtype: the computing one. kind: of the cache, as `check_cache` gives it."""
    if dtype == torch.float32:
        return Tile(min(block_size, 32), 4, 2)
    # 8 bits: a stage holds half as much, so more of them where few programs share the memory.
    return Tile(min(block_size, 32), 1, 4 if kind and programs_per_sm <= 8 else 3)


@triton.jit(do_not_specialize=["num_splits"], do_not_specialize_on_alignment=["rows", "context_lens"])
def decode_kernel(
    q,
    k_cache,
    v_cache,  # 8-bit: pairs of codes as int16
    k_scale,
    v_scale,
    block_tables,
    rows,
    context_lens,
    out,
    partial,  # [B, Hq, num_splits, D] fp32
    lse,  # [B, Hq, num_splits] fp32, base 2
    counters,  # [B, Hkv] int32: programs that have arrived; zeros before and after
    scale_log2,
    table_stride,
    k_stride,
    v_stride,
    num_splits,
    BLOCK_SIZE: tl.constexpr,
    HKV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    KIND: tl.constexpr,
    FAST: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    # Heads are neighbours in memory, so programs of one sequence run side by side.
    kv_head, sequence, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    # These three do not depend on each other: their latencies overlap.
    context = tl.load(context_lens + sequence)
    table = block_tables + tl.load(rows + sequence).to(tl.int64) * table_stride
    d = tl.arange(0, D)
    column = tl.arange(0, COLUMNS)
    valid = (column < G)[None, :]
    head = sequence.to(tl.int64) * (HKV * G) + kv_head * G + column  # of all heads of all sequences
    q_tile = tl.load(q + head[None, :] * D + d[:, None], mask=valid, other=0.0)  # [D, M]
    per_split = tl.cdiv(tl.cdiv(context, BLOCK_N), max(1, min(num_splits, tl.cdiv(context, MIN_SPLIT)))) * BLOCK_N
    used = tl.cdiv(context, max(per_split, 1))  # 0 for padding, whose output the first program writes
    if split >= max(used, 1):
        return
    start = split * per_split
    end = min(start + per_split, context)
    PAIRS: tl.constexpr = 1 if KIND == "" else 2
    WIDTH: tl.constexpr = D // PAIRS
    n, dv = tl.arange(0, BLOCK_N), tl.arange(0, WIDTH)
    if KIND != "":
        q_tile, scale_log2 = fit_fp16(q_tile, scale_log2, 0)  # [1, M]
    k_tile = k_cache + kv_head * D + (n * (HKV * D))[:, None] + d[None, :]  # [N, D] of block 0
    v_tile = v_cache + kv_head * WIDTH + (n * (HKV * WIDTH))[None, :] + dv[:, None]  # [D, N]
    ks_tile, vs_tile = k_scale + kv_head * BLOCK_SIZE + n, v_scale + kv_head * BLOCK_SIZE + n
    m_max = tl.full((COLUMNS,), float("-inf"), tl.float32)  # of the scores, base 2 (8-bit: with the values' scales)
    l_sum = tl.zeros((COLUMNS,), tl.float32)
    acc = tl.zeros((WIDTH, COLUMNS), tl.float32)  # 8-bit: even channels
    odd = tl.zeros((WIDTH, COLUMNS), tl.float32)
    block = tl.load(table + start // BLOCK_SIZE, mask=start < end, other=0).to(tl.int64)
    for first in range(start, end, BLOCK_N):
        seen = first + n < end
        inside = first % BLOCK_SIZE
        k = tl.load(k_tile + (block * k_stride + inside * (HKV * D)), mask=seen[:, None], other=0)
        v = tl.load(v_tile + (block * v_stride + inside * (HKV * WIDTH)), mask=seen[None, :], other=0)
        if KIND != "":
            scales = block * (HKV * BLOCK_SIZE) + inside
            ks = tl.load(ks_tile + scales, mask=seen, other=0.0)
            vs = tl.load(vs_tile + scales, mask=seen, other=0.0)
            k = widen(k, KIND, FAST).to(q_tile.dtype)
        following = first + BLOCK_N
        block = tl.load(table + following // BLOCK_SIZE, mask=following < end, other=0).to(tl.int64)
        score = tl.dot(k, q_tile, input_precision="ieee") * scale_log2  # [N, M]
        if KIND != "":
            score *= ks[:, None]
        score = tl.where(seen[:, None], score, float("-inf"))
        if KIND == "":
            new_max = tl.maximum(m_max, tl.max(score, axis=0))
        else:
            new_max = tl.maximum(m_max, tl.max(score + exponents(vs)[:, None], axis=0))
        fade = tl.exp2(m_max - new_max)
        p = tl.exp2(score - new_max[None, :])
        l_sum = l_sum * fade + tl.sum(p, axis=0)
        if KIND == "":
            acc = tl.dot(v, p.to(v.dtype), acc * fade[None, :], input_precision="ieee")
        else:
            p = (p * vs[:, None]).to(q_tile.dtype)
            even_v, odd_v = widen_pairs(v, KIND, FAST)
            acc = tl.dot(even_v.to(p.dtype), p, acc * fade[None, :], input_precision="ieee")
            odd = tl.dot(odd_v.to(p.dtype), p, odd * fade[None, :], input_precision="ieee")
        m_max = new_max
    total = tl.where(l_sum == 0.0, 1.0, l_sum)[None, :]  # padding: zeros
    if used <= 1:
        place = head[None, :] * D + dv[:, None] * PAIRS
        tl.store(out + place, (acc / total).to(out.dtype.element_ty), mask=valid)
        if KIND != "":
            tl.store(out + place + 1, (odd / total).to(out.dtype.element_ty), mask=valid)
    else:
        part = head * num_splits + split
        place = part[None, :] * D + dv[:, None] * PAIRS
        tl.store(partial + place, acc / total, mask=valid)
        if KIND != "":
            tl.store(partial + place + 1, odd / total, mask=valid)
        tl.store(lse + part, m_max + tl.log2(l_sum), mask=column < G)
        tl.debug_barrier()  # every thread's part is stored before one of them says so
        counter = counters + sequence * HKV + kv_head
        if tl.atomic_add(counter, 1, sem="acq_rel") == used - 1:
            tl.store(counter, 0)  # as the next launch expects it
            first_head = sequence.to(tl.int64) * (HKV * G) + kv_head * G
            for g in tl.static_range(G):
                _join(partial, lse, out, first_head + g, num_splits, used, D, MAX_SPLITS)


@triton.jit
def _join(partial, lse, out, head, num_splits, used, D: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """The first `used` parts of one head, none of them empty, weighted by their sums of exponentials."""
    split, d = tl.arange(0, MAX_SPLITS), tl.arange(0, D)
    exists = split < used
    part = head * num_splits + split
    weight = tl.load(lse + part, mask=exists, other=float("-inf"), cache_modifier=".cg")
    weight = tl.exp2(weight - tl.max(weight, axis=0))
    parts = tl.load(partial + part[:, None] * D + d[None, :], mask=exists[:, None], other=0.0, cache_modifier=".cg")
    joined = tl.sum(parts * weight[:, None], axis=0) / tl.sum(weight, axis=0)
    tl.store(out + head * D + d, joined.to(out.dtype.element_ty))


def choose_splits(programs: int, longest: int, num_sms: int) -> int:
    """Into how many parts to split contexts of up to `longest` positions, given `programs` without splitting."""
    return max(1, min(_PROGRAMS_PER_SM * num_sms // programs, longest // MIN_SPLIT, MAX_SPLITS))


def decode(
    q: Tensor,
    cache: KVCache,
    block_tables: Tensor,
    plan: AttentionPlan,
    scale: float,
    num_splits: int,
    out: Tensor,
    tile: Tile | None = None,
) -> None:
    """Attention of the first num_decodes tokens, one of each sequence, written into out[T, Hq, D].

    num_splits: the most parts of one context. tile: the tests' and measurements' choice of it.
    """
    kind, k_cache, v_cache, k_scale, v_scale, group = check_attention(q, cache, block_tables, plan, out)
    _, block_size, num_kv_heads, head_dim = k_cache.shape
    assert 1 <= num_splits <= MAX_SPLITS
    assert plan.num_decodes * num_kv_heads <= _MAX_COUNTERS
    programs = plan.num_decodes * num_kv_heads * num_splits
    tile = tile or choose_tile(q.dtype, kind, block_size, programs / chip.num_sms(q.device))
    v_read = v_cache.view(torch.int16) if kind else v_cache
    stored = plan.num_decodes * num_kv_heads * group * num_splits if num_splits > 1 else 0
    decode_kernel[(num_kv_heads, plan.num_decodes, num_splits)](
        q,
        k_cache,
        v_read,
        k_scale,
        v_scale,
        block_tables,
        plan.rows,
        plan.context_lens,
        out,
        q.new_empty(stored * head_dim, dtype=torch.float32),
        q.new_empty(stored, dtype=torch.float32),
        _counters(q.device),
        scale * LOG2_E,
        block_tables.stride(0),
        k_cache.stride(0),
        v_read.stride(0),
        num_splits,
        BLOCK_SIZE=block_size,
        HKV=num_kv_heads,
        G=group,
        D=head_dim,
        KIND=kind,
        FAST=not triton.knobs.runtime.interpret,
        COLUMNS=_COLUMNS,
        BLOCK_N=tile.block_n,
        MIN_SPLIT=MIN_SPLIT,
        MAX_SPLITS=MAX_SPLITS,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **chip.dependent_launch(q.device),
    )


@once
def _counters(device: torch.device) -> Tensor:
    """Zeros, which every launch leaves as zeros. One stream at a time may use them."""
    assert device.type == "cpu" or not torch.cuda.is_current_stream_capturing(), "decode once before capturing it"
    return torch.zeros(_MAX_COUNTERS, dtype=torch.int32, device=device)
