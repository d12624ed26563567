"""Triton kernel of causal attention for several queries a sequence over the paged pool. Letters as in `__init__`.

The G query heads that share a KV head are packed into the rows of one tile (row m is query m // G, head m % G), so a
key is read once for all of them. A program takes the rows of one KV head that belong to a stretch of a tile's queries
and walks the context: first the positions that all its rows see, without masks, then the ragged end. The table entries
of a tile of positions are fetched a tile ahead, so that no read waits for another.

On sm_90 a cache in bfloat16 goes to `prefill_hopper`.

Softmax is online (Milakov and Gimelshein, 2018, arXiv:1805.02867), in base 2, with fp32 sums.

An 8-bit cache stays so until it is in registers, and is then multiplied in fp16, which holds every code. The scale of a
key goes to its scores, that of a value to its probabilities, see `kv_codes.exponents`.
"""

# Triton is untyped: a jitted function has no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine.kernels import PREFILL_TILE, AttentionPlan, KVCache, chip
from engine.kernels.kv_codes import LOG2_E, check_attention, exponents, fit_fp16, widen


@dataclass(frozen=True)
class Tile:
    """Rows and positions of one program's tile, and how it is run; chosen to fit sm_89's 99 KiB of shared memory.

    max_registers: of one thread, 0 for as many as the compiler wants.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int = 0


def choose_tile(dtype: torch.dtype, kind: str, capability: tuple[int, int]) -> Tile:
    """kind: of the cache, as `check_cache` gives it."""
    if dtype == torch.float32:
        return Tile(32, 32, 4, 2)
    if capability < (9, 0):
        return Tile(128, 64, 8, 2)
    # Two programs an SM: one multiplies while the other takes exponentials.
    return Tile(64, 64, 4, 2) if kind else Tile(128, 64, 8, 2, 128)


def is_asynchronous(q: Tensor, kind: str) -> bool:
    """Whether `prefill_hopper` takes these."""
    return not kind and q.dtype == torch.bfloat16 and chip.runs_gluon(q.device)


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
    scale_log2,  # 8-bit: [M, 1]
    BLOCK_SIZE: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KIND: tl.constexpr,
    FAST: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Online softmax over positions [start, end). Unmasked: every row sees all, and BLOCK_N divides their number."""
    n, d = tl.arange(0, BLOCK_N), tl.arange(0, D)
    block = tl.load(table + (start + n) // BLOCK_SIZE, mask=start + n < end, other=0)
    for first in range(start, end, BLOCK_N):
        position = first + n
        seen = position < end
        offset = block.to(tl.int64) * block_stride + (position % BLOCK_SIZE) * (HKV * D)
        k_tile, v_tile = k_head + offset[:, None] + d[None, :], v_head + offset[:, None] + d[None, :]
        k = tl.load(k_tile, mask=seen[:, None], other=0.0) if MASKED else tl.load(k_tile)  # [N, D]
        v = tl.load(v_tile, mask=seen[:, None], other=0.0) if MASKED else tl.load(v_tile)  # [N, D]
        if KIND != "":
            place = block.to(tl.int64) * (HKV * BLOCK_SIZE) + position % BLOCK_SIZE
            ks = tl.load(k_scale + place, mask=seen, other=0.0) if MASKED else tl.load(k_scale + place)
            vs = tl.load(v_scale + place, mask=seen, other=0.0) if MASKED else tl.load(v_scale + place)
            k = widen(k, KIND, FAST, False).to(q.dtype)
        following = position + BLOCK_N
        block = tl.load(table + following // BLOCK_SIZE, mask=following < end, other=0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee")  # [M, N]
        if KIND != "":
            score *= ks[None, :]
        if MASKED:
            score = tl.where(position[None, :] <= last[:, None], score, float("-inf"))
        if KIND != "":
            new_max = tl.maximum(m_max, tl.max(score * scale_log2 + exponents(vs)[None, :], axis=1))
        else:
            new_max = tl.maximum(m_max, tl.max(score, axis=1) * scale_log2)
        p = tl.exp2(score * scale_log2 - new_max[:, None])
        fade = tl.exp2(m_max - new_max)
        l_sum = l_sum * fade + tl.sum(p, axis=1)
        if KIND != "":
            v = widen(v, KIND, FAST, False).to(q.dtype)
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
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    QUERIES: tl.constexpr = BLOCK_M // G
    kv_head = tl.program_id(0)
    sequence = tl.load(tiles + tl.program_id(1) * 2)
    tile_first = tl.load(tiles + tl.program_id(1) * 2 + 1)
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
        q_tile, scale_log2 = fit_fp16(q_tile, scale_log2, 1)
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


def prefill(
    q: Tensor,
    cache: KVCache,
    block_tables: Tensor,
    plan: AttentionPlan,
    scale: float,
    out: Tensor,
    tile: Tile | None = None,
) -> None:
    """Attention of the sequences past num_decodes, written into their tokens of out[T, Hq, D].

    scale: positive. tile: the tests' and measurements' choice of it.
    """
    kind, k_cache, v_cache, k_scale, v_scale, group = check_attention(q, cache, block_tables, plan, out)
    _, block_size, num_kv_heads, head_dim = k_cache.shape
    assert plan.tiles.dtype == torch.int32 and plan.tiles.is_contiguous() and plan.tiles.shape[1] == 2
    assert scale > 0, scale
    if tile is None and is_asynchronous(q, kind):
        from engine.kernels.prefill_hopper import prefill_hopper

        prefill_hopper(q, k_cache, v_cache, block_tables, plan, scale, out)
        return
    tile = tile or choose_tile(q.dtype, kind, chip.capability(q.device))
    parts = triton.cdiv(PREFILL_TILE, tile.block_m // group)
    prefill_kernel[(num_kv_heads, len(plan.tiles), parts)](
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
        BLOCK_SIZE=block_size,
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
        maxnreg=tile.max_registers or None,
        **chip.dependent_launch(q.device),
    )
