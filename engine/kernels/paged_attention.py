"""Triton kernels of causal attention over the paged pool; blocks are read in place. Letters as in `__init__`.

Both kernels pack the G query heads that share a KV head into the rows of one tile (row m is query m // G, head m % G),
so a key is read once for all of them. Softmax is online (Milakov and Gimelshein, 2018, arXiv:1805.02867), in base 2,
with fp32 sums.

- Prefill: a program takes the rows of one KV head that belong to a stretch of a tile's queries and walks the context:
  first the positions that all its rows see, without masks, then the ragged end.
- Decode: one query per sequence leaves too few programs at small batches, so the context is split among several
  (flash-decoding, Dao et al., 2023); each leaves its normalised sum and log-sum-exp, and a second kernel joins them.
  The split is chosen from host values only.

An 8-bit cache stays so until it is in registers, and is then multiplied in fp16, which holds every code. The scale of a
key goes to its scores. That of a value goes to its probabilities, whose common factor is chosen so that the products
fit fp16 too: the running maximum is that of score + log2 of the scale, rounded down.

Arguments that vary from step to step are exempt from Triton's specialisation: each new kind would compile anew.
"""

# Triton is untyped: a jitted function has no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels import PREFILL_TILE, AttentionPlan, KVCache, chip
from engine.kernels.kv_codes import check_cache, widen

LOG2_E = 1.4426950408889634
MAX_SPLITS = 32
_MIN_SPLIT = 256  # positions; below this joining costs more than the split gains
_DECODE_ROWS = 16  # the least rows of a tensor-core tile; G of them are used


@dataclass(frozen=True)
class Tile:
    """Rows and positions of one program's tile, and how it is run; chosen to fit sm_89's 99 KiB of shared memory."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def prefill_tile(dtype: torch.dtype) -> Tile:
    return Tile(32, 32, 4, 2) if dtype == torch.float32 else Tile(128, 64, 8, 2)


def decode_tile(dtype: torch.dtype, kind: str = "") -> Tile:
    """kind: of the cache, as `check_cache` gives it."""
    if dtype == torch.float32:
        return Tile(_DECODE_ROWS, 32, 8, 2)
    return Tile(_DECODE_ROWS, 64, 2 if kind else 4, 2)


@triton.jit
def _fit_fp16(q, scale_log2):
    """q[M, D] in fp16 (fp32 stays), divided by a power of two of each row, and the factor [M] of its scores.

    The largest of a row becomes 1 to 2; what fp16 cannot hold of the others is below 2^-25.
    """
    wide = q.to(tl.float32)
    exponent = tl.maximum(tl.max(tl.abs(wide), axis=1), 1e-30).to(tl.int32, bitcast=True) & 0x7F800000
    wide *= (0x7F000000 - exponent).to(tl.float32, bitcast=True)[:, None]
    factor = exponent.to(tl.float32, bitcast=True) * scale_log2
    return wide if q.dtype == tl.float32 else wide.to(tl.float16), factor


@triton.jit
def _walk(
    q,  # [M, D]
    m_max,  # [M] running maximum of the scores, base 2 (8-bit: with the values' scales)
    l_sum,  # [M] running sum of exponentials
    acc,  # [M, D]
    last,  # [M] last position each row sees
    start,
    end,
    k_head,
    v_head,
    k_scale,
    v_scale,
    table,
    block_stride,
    scale_log2,  # 8-bit: [M]
    BLOCK_SIZE: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KIND: tl.constexpr,
    FAST: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Online softmax over positions [start, end). Unmasked: every row sees all, and BLOCK_N divides their number."""
    d = tl.arange(0, D)
    for first in range(start, end, BLOCK_N):
        position = first + tl.arange(0, BLOCK_N)
        if MASKED:
            block = tl.load(table + position // BLOCK_SIZE, mask=position < end, other=0)
        else:
            block = tl.load(table + position // BLOCK_SIZE)
        offset = block.to(tl.int64) * block_stride + (position % BLOCK_SIZE) * (HKV * D)
        k_tile, v_tile = k_head + offset[None, :] + d[:, None], v_head + offset[:, None] + d[None, :]
        k = tl.load(k_tile, mask=(position < end)[None, :], other=0.0) if MASKED else tl.load(k_tile)  # [D, N]
        if KIND != "":
            place = block.to(tl.int64) * (HKV * BLOCK_SIZE) + position % BLOCK_SIZE
            seen = position < end
            ks = tl.load(k_scale + place, mask=seen, other=0.0) if MASKED else tl.load(k_scale + place)
            vs = tl.load(v_scale + place, mask=seen, other=0.0) if MASKED else tl.load(v_scale + place)
            k = widen(k, KIND, FAST).to(q.dtype)
            score = tl.dot(q, k, input_precision="ieee") * scale_log2[:, None] * ks[None, :]  # [M, N]
        else:
            score = tl.dot(q, k, input_precision="ieee") * scale_log2  # [M, N]
        if MASKED:
            score = tl.where(position[None, :] <= last[:, None], score, float("-inf"))
        if KIND != "":
            exponent = ((vs.to(tl.int32, bitcast=True) >> 23) - 127).to(tl.float32)
            new_max = tl.maximum(m_max, tl.max(score + exponent[None, :], axis=1))
        else:
            new_max = tl.maximum(m_max, tl.max(score, axis=1))
        fade = tl.exp2(m_max - new_max)
        p = tl.exp2(score - new_max[:, None])
        l_sum = l_sum * fade + tl.sum(p, axis=1)
        v = tl.load(v_tile, mask=(position < end)[:, None], other=0.0) if MASKED else tl.load(v_tile)  # [N, D]
        if KIND != "":
            v = widen(v, KIND, FAST).to(q.dtype)
            p *= vs[None, :]
        acc = tl.dot(p.to(q.dtype), v, acc * fade[:, None], input_precision="ieee")
        m_max = new_max
    return m_max, l_sum, acc


@triton.jit(do_not_specialize_on_alignment=["rows", "query_starts", "context_lens", "tiles"])
def prefill_kernel(
    q,
    k_cache,
    v_cache,
    k_scale,
    v_scale,
    block_tables,
    rows,
    query_starts,
    context_lens,
    tiles,
    out,
    scale_log2,
    table_stride,
    block_stride,
    BLOCK_SIZE: tl.constexpr,
    HKV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    KIND: tl.constexpr,
    FAST: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    QUERIES: tl.constexpr = BLOCK_M // G
    sequence = tl.load(tiles + tl.program_id(0) * 2)
    tile_first = tl.load(tiles + tl.program_id(0) * 2 + 1)
    kv_head = tl.program_id(1)
    start = tl.load(query_starts + sequence)
    num_queries = tl.load(query_starts + sequence + 1) - start
    context = tl.load(context_lens + sequence)
    first = tile_first + tl.program_id(2) * QUERIES
    beyond = min(min(first + QUERIES, tile_first + TILE), num_queries)  # the end of this program's queries
    if first >= beyond:
        return
    row = tl.arange(0, BLOCK_M)
    query = first + row // G
    valid = query < beyond
    head = kv_head * G + row % G
    token = (start + query).to(tl.int64)
    d = tl.arange(0, D)
    place = token[:, None] * (HKV * G * D) + head[:, None] * D + d[None, :]  # [M, D]
    q_tile = tl.load(q + place, mask=valid[:, None], other=0.0)
    if KIND != "":
        q_tile, scale_log2 = _fit_fp16(q_tile, scale_log2)
    table = block_tables + tl.load(rows + sequence).to(tl.int64) * table_stride
    k_head, v_head = k_cache + kv_head * D, v_cache + kv_head * D
    k_scale, v_scale = k_scale + kv_head * BLOCK_SIZE, v_scale + kv_head * BLOCK_SIZE
    before = context - num_queries  # position of query 0
    end = before + beyond
    seen_by_all = (before + first + 1) // BLOCK_N * BLOCK_N
    last = before + query
    m_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    m_max, l_sum, acc = _walk(
        q_tile, m_max, l_sum, acc, last, 0, seen_by_all, k_head, v_head, k_scale, v_scale, table, block_stride,
        scale_log2, BLOCK_SIZE, HKV, D, BLOCK_N, KIND, FAST, False,
    )  # fmt: skip
    m_max, l_sum, acc = _walk(
        q_tile, m_max, l_sum, acc, last, seen_by_all, end, k_head, v_head, k_scale, v_scale, table, block_stride,
        scale_log2, BLOCK_SIZE, HKV, D, BLOCK_N, KIND, FAST, True,
    )  # fmt: skip
    tl.store(out + place, (acc / l_sum[:, None]).to(out.dtype.element_ty), mask=valid[:, None])


@triton.jit(do_not_specialize=["num_splits"], do_not_specialize_on_alignment=["rows", "context_lens"])
def decode_kernel(
    q,
    k_cache,
    v_cache,
    k_scale,
    v_scale,
    block_tables,
    rows,
    context_lens,
    out,
    partial,  # [B, Hq, num_splits, D] fp32
    lse,  # [B, Hq, num_splits] fp32, base 2
    scale_log2,
    table_stride,
    block_stride,
    num_splits,
    BLOCK_SIZE: tl.constexpr,
    HKV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    KIND: tl.constexpr,
    FAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    sequence, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    context = tl.load(context_lens + sequence)
    per_split = tl.cdiv(tl.cdiv(context, BLOCK_N), num_splits) * BLOCK_N
    start = split * per_split
    end = min(start + per_split, context)
    row = tl.arange(0, BLOCK_M)
    valid = row < G
    d = tl.arange(0, D)
    head = sequence.to(tl.int64) * (HKV * G) + kv_head * G + row  # of all heads of all sequences
    q_tile = tl.load(q + head[:, None] * D + d[None, :], mask=valid[:, None], other=0.0)
    if KIND != "":
        q_tile, scale_log2 = _fit_fp16(q_tile, scale_log2)
    table = block_tables + tl.load(rows + sequence).to(tl.int64) * table_stride
    m_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    last = tl.zeros((BLOCK_M,), tl.int32) + (end - 1)
    k_scale, v_scale = k_scale + kv_head * BLOCK_SIZE, v_scale + kv_head * BLOCK_SIZE
    m_max, l_sum, acc = _walk(
        q_tile, m_max, l_sum, acc, last, start, end, k_cache + kv_head * D, v_cache + kv_head * D, k_scale, v_scale,
        table, block_stride, scale_log2, BLOCK_SIZE, HKV, D, BLOCK_N, KIND, FAST, True,
    )  # fmt: skip
    result = acc / tl.where(l_sum == 0.0, 1.0, l_sum)[:, None]  # an empty split, or a padding sequence: zeros
    if num_splits == 1:
        tl.store(out + head[:, None] * D + d[None, :], result.to(out.dtype.element_ty), mask=valid[:, None])
    else:
        part = head * num_splits + split
        tl.store(partial + part[:, None] * D + d[None, :], result, mask=valid[:, None])
        tl.store(lse + part, m_max + tl.log2(l_sum), mask=valid)


@triton.jit(do_not_specialize=["num_splits"])
def join_kernel(partial, lse, out, num_splits, D: tl.constexpr, MAX_SPLITS: tl.constexpr):
    head = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, MAX_SPLITS)
    d = tl.arange(0, D)
    exists = split < num_splits
    weight = tl.load(lse + head * num_splits + split, mask=exists, other=float("-inf"))
    largest = tl.max(weight, axis=0)
    weight = tl.exp2(weight - tl.where(largest == float("-inf"), 0.0, largest))
    total = tl.sum(weight, axis=0)
    parts = partial + (head * num_splits + split)[:, None] * D + d[None, :]
    joined = tl.sum(tl.load(parts, mask=exists[:, None], other=0.0) * weight[:, None], axis=0)
    joined /= tl.where(total == 0.0, 1.0, total)
    tl.store(out + head * D + d, joined.to(out.dtype.element_ty))


def attention(q: Tensor, cache: KVCache, block_tables: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    out = torch.empty_like(q)
    if plan.num_decodes:
        programs = plan.num_decodes * cache.k.shape[2]
        longest = int(np.max(plan.context_lens_host[: plan.num_decodes]))
        num_splits = choose_splits(programs, longest, chip.num_sms(q.device))
        decode(q, cache, block_tables, plan, scale, num_splits, out)
    if len(plan.tiles):
        prefill(q, cache, block_tables, plan, scale, out)
    return out


def choose_splits(programs: int, longest: int, num_sms: int) -> int:
    """Into how many parts to split contexts of up to `longest` positions, given `programs` without splitting."""
    return max(1, min(2 * num_sms // programs, longest // _MIN_SPLIT, MAX_SPLITS))


def prefill(q: Tensor, cache: KVCache, block_tables: Tensor, plan: AttentionPlan, scale: float, out: Tensor) -> None:
    """Attention of the sequences past num_decodes, written into their tokens of out[T, Hq, D]."""
    num_kv_heads, group, head_dim = _check(q, cache, block_tables, plan, out)
    assert plan.tiles.dtype == torch.int32 and plan.tiles.is_contiguous() and plan.tiles.shape[1] == 2
    tile = prefill_tile(q.dtype)
    kind, k_cache, v_cache, k_scale, v_scale = check_cache(cache, q.dtype)
    parts = triton.cdiv(PREFILL_TILE, tile.block_m // group)
    prefill_kernel[(len(plan.tiles), num_kv_heads, parts)](
        q,
        k_cache,
        v_cache,
        k_scale,
        v_scale,
        block_tables,
        plan.rows,
        plan.query_starts,
        plan.context_lens,
        plan.tiles,
        out,
        scale * LOG2_E,
        block_tables.stride(0),
        k_cache.stride(0),
        BLOCK_SIZE=k_cache.shape[1],
        HKV=num_kv_heads,
        G=group,
        D=head_dim,
        KIND=kind,
        FAST=not triton.knobs.runtime.interpret,
        TILE=PREFILL_TILE,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def decode(
    q: Tensor,
    cache: KVCache,
    block_tables: Tensor,
    plan: AttentionPlan,
    scale: float,
    num_splits: int,
    out: Tensor,
) -> None:
    """Attention of the first num_decodes tokens, one of each sequence, written into out[T, Hq, D]."""
    num_kv_heads, group, head_dim = _check(q, cache, block_tables, plan, out)
    assert 1 <= num_splits <= MAX_SPLITS
    heads = plan.num_decodes * num_kv_heads * group
    kind, k_cache, v_cache, k_scale, v_scale = check_cache(cache, q.dtype)
    tile = decode_tile(q.dtype, kind)
    stored_splits = num_splits if num_splits > 1 else 0
    partial = q.new_empty(heads * stored_splits * head_dim, dtype=torch.float32)
    lse = q.new_empty(heads * stored_splits, dtype=torch.float32)
    decode_kernel[(plan.num_decodes, num_kv_heads, num_splits)](
        q,
        k_cache,
        v_cache,
        k_scale,
        v_scale,
        block_tables,
        plan.rows,
        plan.context_lens,
        out,
        partial,
        lse,
        scale * LOG2_E,
        block_tables.stride(0),
        k_cache.stride(0),
        num_splits,
        BLOCK_SIZE=k_cache.shape[1],
        HKV=num_kv_heads,
        G=group,
        D=head_dim,
        KIND=kind,
        FAST=not triton.knobs.runtime.interpret,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if num_splits > 1:
        join_kernel[(heads,)](partial, lse, out, num_splits, D=head_dim, MAX_SPLITS=MAX_SPLITS)


def _check(q: Tensor, cache: KVCache, block_tables: Tensor, plan: AttentionPlan, out: Tensor) -> tuple[int, int, int]:
    """Shapes, strides and dtypes of what both kernels take. Returns Hkv, G, D."""
    num_heads, head_dim = q.shape[1:]
    num_kv_heads = cache.k.shape[2]
    assert q.is_contiguous() and out.is_contiguous() and out.shape == q.shape and out.dtype == q.dtype
    assert head_dim == cache.k.shape[3] and num_heads % num_kv_heads == 0
    assert num_heads // num_kv_heads <= 8, "at most 8 query heads of a KV head"
    assert block_tables.dtype == torch.int32 and block_tables.stride(1) == 1
    for index in (plan.rows, plan.query_starts, plan.context_lens):
        assert index.dtype == torch.int32 and index.is_contiguous()
    return num_kv_heads, num_heads // num_kv_heads, head_dim
