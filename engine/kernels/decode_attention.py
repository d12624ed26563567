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

Where a batch only decodes, the same kernel begins with what `rope.py` does (FUSED), which saves a launch: each program
rotates its own queries, and the one that reads a context's last position first stores it there. No other program reads
that position, so none but this program's own threads have to wait for it.

What does not depend on the kernel before is fetched before that has ended: weights, angles, and what the batch is,
that is contexts, rows, positions, slots and the tables. All of it was written before the forward's first kernel that
begins early, which waited for everything before it (`chip.dependent_launch`). Queries, keys and values are read after
the wait, as the kernel before wrote some of them. Fetching blocks of keys and values to L2 before it does not pay.

The programs of a large batch do not all run at once. They start in the batch's order, and a long context that starts
last is read by one program alone: so such a batch has the longest first, see `longest_first`.

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
from engine.kernels.reference import SMALLEST_KV
from engine.kernels.rope import check_heads, quantise_heads, rotate, store_heads

MAX_SPLITS = 32
MIN_SPLIT = 32  # positions; below this joining costs more than the split gains, at any number of programs
_PROGRAMS_PER_SM = {2: 16, 1: 24}  # that splitting makes of few, by bytes of a stored value; measured on an H200
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


@triton.jit(
    do_not_specialize=["num_splits", "least"],
    do_not_specialize_on_alignment=["rows", "context_lens", "positions", "slots"],
)
def decode_kernel(
    q,  # FUSED: q, k and v as they are before the norm, [B, (Hq + 2 Hkv) * D]
    q_norm,
    k_norm,
    cos_sin,
    positions,
    slots,
    v_codes,  # v_cache as it is stored; this and the five above are None unless FUSED
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
    eps,
    table_stride,
    k_stride,
    v_stride,
    num_splits,
    least,  # positions of a part, where its context has more parts than one
    BLOCK_SIZE: tl.constexpr,
    HKV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    KIND: tl.constexpr,
    FAST: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,  # G or the next power of two
    BLOCK_N: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    SMALLEST: tl.constexpr,
    FUSED: tl.constexpr,
    PDL: tl.constexpr,
):
    HALF: tl.constexpr = D // 2
    NORM: tl.constexpr = q_norm is not None
    # What all heads share is loaded once for each row of q, and twice for k and v, which are one tile: so it lies with
    # the threads that need it, and none have to exchange it.
    half = tl.arange(0, HALF)[None, :]
    q_gain_1, q_gain_2, k_gain_1, k_gain_2 = None, None, None, None
    if NORM:  # weights, which no kernel writes
        q_gain, k_gain = tl.broadcast_to(q_norm + half, (ROWS, HALF)), tl.broadcast_to(k_norm + half, (2, HALF))
        q_gain_1, q_gain_2 = tl.load(q_gain).to(tl.float32), tl.load(q_gain + HALF).to(tl.float32)
        k_gain_1, k_gain_2 = tl.load(k_gain).to(tl.float32), tl.load(k_gain + HALF).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
    # Heads are neighbours in memory, so programs of one sequence run side by side.
    kv_head, sequence, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    # None of these depends on another: their latencies overlap.
    context = tl.load(context_lens + sequence)
    row = tl.load(rows + sequence)
    if FUSED:
        position, slot = tl.load(positions + sequence), tl.load(slots + sequence)
    else:
        position = 0
    per_split = tl.cdiv(tl.cdiv(context, BLOCK_N), max(1, min(num_splits, tl.cdiv(context, least)))) * BLOCK_N
    used = tl.cdiv(context, max(per_split, 1))  # 0 for padding, whose output the first program writes
    # None is negative. But ptxas moves a load that nothing before a return needs behind it, where it waits its turn.
    if (split >= max(used, 1)) | (row < 0) | (position < 0):
        if PDL:
            gdc_wait()
        return
    start = split * per_split
    end = min(start + per_split, context)
    table = block_tables + row.to(tl.int64) * table_stride
    block = tl.load(table + start // BLOCK_SIZE, mask=start < end, other=0).to(tl.int64)
    if FUSED:
        angle = cos_sin + position.to(tl.int64) * D + half
        q_angle, k_angle = tl.broadcast_to(angle, (ROWS, HALF)), tl.broadcast_to(angle, (2, HALF))
        q_cos, q_sin = tl.load(q_angle), tl.load(q_angle + HALF)
        k_cos, k_sin = tl.load(k_angle), tl.load(k_angle + HALF)
    if PDL:
        gdc_wait()
    d = tl.arange(0, D)
    column = tl.arange(0, COLUMNS)
    valid = (column < G)[None, :]
    head = sequence.to(tl.int64) * (HKV * G) + kv_head * G + column  # of all heads of all sequences
    if FUSED:
        dtype: tl.constexpr = out.dtype.element_ty
        token = q + sequence.to(tl.int64) * ((HKV * G + 2 * HKV) * D) + half
        own, is_v = tl.arange(0, ROWS)[:, None], tl.arange(0, 2)[:, None] == 1  # k and v are one tile of two heads
        own_q = token + (kv_head * G + own) * D
        own_kv = token + (HKV * G + kv_head + tl.where(is_v, HKV, 0)) * D
        q_1, q_2 = tl.load(own_q, mask=own < G, other=0.0), tl.load(own_q + HALF, mask=own < G, other=0.0)
        kv_1, kv_2 = tl.load(own_kv), tl.load(own_kv + HALF)  # [2, D/2]
        wide_1, wide_2 = kv_1.to(tl.float32), kv_2.to(tl.float32)
        k_1, k_2 = rotate(wide_1, wide_2, k_gain_1, k_gain_2, k_cos, k_sin, eps, NORM, dtype)
        wide_1, wide_2 = q_1.to(tl.float32), q_2.to(tl.float32)
        q_1, q_2 = rotate(wide_1, wide_2, q_gain_1, q_gain_2, q_cos, q_sin, eps, NORM, dtype)  # [ROWS, D/2]
        if split == max(used, 1) - 1:  # its part ends with the context
            new_1, new_2, factor = quantise_heads(
                tl.where(is_v, kv_1, k_1), tl.where(is_v, kv_2, k_2), KIND, SMALLEST, FAST
            )
            own_head = tl.zeros((2, 1), tl.int32) + kv_head
            stored = tl.zeros((2, 1), tl.int32) + slot >= 0  # no scalar: see `gemv._load`
            stored_k, stored_v = (is_v == 0) & stored, is_v & stored
            store_heads(new_1, new_2, factor, own_head, stored_k, slot, k_cache, k_scale, k_stride, BLOCK_SIZE, HKV)
            store_heads(new_1, new_2, factor, own_head, stored_v, slot, v_codes, v_scale, k_stride, BLOCK_SIZE, HKV)
            tl.debug_barrier()  # every thread's part is stored before another one reads it
        # Columns past G repeat heads, which nothing reads.
        q_tile = tl.reshape(tl.permute(tl.join(q_1, q_2), (2, 1, 0)), (D, 1, ROWS))
        q_tile = tl.reshape(tl.broadcast_to(q_tile, (D, COLUMNS // ROWS, ROWS)), (D, COLUMNS))
    else:
        q_tile = tl.load(q + head[None, :] * D + d[:, None], mask=valid, other=0.0)  # [D, M]
    PAIRS: tl.constexpr = 1 if KIND == "" else 2
    WIDTH: tl.constexpr = D // PAIRS
    n, dv = tl.arange(0, BLOCK_N), tl.arange(0, WIDTH)
    if KIND != "":
        q_tile, scale_log2 = fit_fp16(q_tile, scale_log2, 0)  # [1, M]
    k_tile = k_cache + kv_head * D + (n * (HKV * D))[:, None] + d[None, :]  # [N, D] of block 0
    v_tile = v_cache + kv_head * WIDTH + (n * (HKV * WIDTH))[None, :] + dv[:, None]  # [D, N]
    ks_tile, vs_tile = k_scale + kv_head * BLOCK_SIZE + n, v_scale + kv_head * BLOCK_SIZE + n
    m_max = tl.full((COLUMNS,), float("-inf"), tl.float32)  # of the scores, base 2 (8-bit: with the values' scales)
    l_sum = tl.zeros((BLOCK_N, COLUMNS), tl.float32)  # added up at the end: no thread waits for another one's
    acc = tl.zeros((WIDTH, COLUMNS), tl.float32)  # 8-bit: even channels
    odd = tl.zeros((WIDTH, COLUMNS), tl.float32)
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
        l_sum = l_sum * fade[None, :] + p
        if KIND == "":
            acc = tl.dot(v, p.to(v.dtype), acc * fade[None, :], input_precision="ieee")
        else:
            p = (p * vs[:, None]).to(q_tile.dtype)
            even_v, odd_v = widen_pairs(v, KIND, FAST)
            acc = tl.dot(even_v.to(p.dtype), p, acc * fade[None, :], input_precision="ieee")
            odd = tl.dot(odd_v.to(p.dtype), p, odd * fade[None, :], input_precision="ieee")
        m_max = new_max
    l_sum = tl.sum(l_sum, axis=0)
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


def choose_splits(programs: int, longest: int, num_sms: int, itemsize: int) -> int:
    """Into how many parts to split contexts of up to `longest` positions, given `programs` without splitting.

    Also where they are enough to keep all SMs reading: contexts differ, and the last long one would be read by one
    program alone. With 16-bit caches that no longer pays from six programs an SM on.
    """
    if itemsize > 1 and programs > 6 * num_sms:
        return 1
    most = round(_PROGRAMS_PER_SM[min(itemsize, 2)] * num_sms / programs)
    few = 4 * programs <= num_sms
    return max(1, min(most, longest // MIN_SPLIT, MAX_SPLITS if few else MAX_SPLITS // 2))


def min_split(programs: int, num_sms: int) -> int:
    """Positions of a part at least, given `programs` without splitting: the more, the less a part may cost."""
    return MIN_SPLIT << next((i for i in range(3) if programs <= (i + 1) * num_sms), 4)


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
    _launch(q, (None,) * 5, 0.0, cache, block_tables, plan, scale, num_splits, out, tile)


def rope_and_decode(
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
    num_splits: int,
    out: Tensor,
) -> None:
    """`rope_and_store`, then `decode`, in one launch: every token is a decode's, and its slot its context's last."""
    num_tokens, num_heads = check_heads(qkv, q_norm, k_norm, cos_sin, positions, cache, slots)
    assert num_tokens == plan.num_decodes and out.shape == (num_tokens, num_heads, cache.k.shape[3])
    assert out.dtype == qkv.dtype
    new = (q_norm, k_norm, cos_sin, positions, slots)
    _launch(qkv, new, eps, cache, block_tables, plan, scale, num_splits, out, None)


def _launch(
    q: Tensor,
    new: tuple[Tensor | None, ...],
    eps: float,
    cache: KVCache,
    block_tables: Tensor,
    plan: AttentionPlan,
    scale: float,
    num_splits: int,
    out: Tensor,
    tile: Tile | None,
) -> None:
    """q: of `decode`, or qkv of `rope_and_decode`. new: what only the latter has, from q_norm on, or Nones."""
    fused = new[-1] is not None
    queries = out if fused else q  # of this shape
    kind, k_cache, v_cache, k_scale, v_scale, group = check_attention(queries, cache, block_tables, plan, out)
    _, block_size, num_kv_heads, head_dim = k_cache.shape
    assert 1 <= num_splits <= MAX_SPLITS
    assert plan.num_decodes * num_kv_heads <= _MAX_COUNTERS
    programs = plan.num_decodes * num_kv_heads * num_splits
    tile = tile or choose_tile(q.dtype, kind, block_size, programs / chip.num_sms(q.device))
    v_read = v_cache.view(torch.int16) if kind else v_cache
    stored = plan.num_decodes * num_kv_heads * group * num_splits if num_splits > 1 else 0
    decode_kernel[(num_kv_heads, plan.num_decodes, num_splits)](
        q,
        *new,
        v_cache if fused else None,
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
        eps,
        block_tables.stride(0),
        k_cache.stride(0),
        v_read.stride(0),
        num_splits,
        min_split(plan.num_decodes * num_kv_heads, chip.num_sms(q.device)),
        BLOCK_SIZE=block_size,
        HKV=num_kv_heads,
        G=group,
        D=head_dim,
        KIND=kind,
        FAST=not triton.knobs.runtime.interpret,
        COLUMNS=_COLUMNS,
        ROWS=triton.next_power_of_2(group),
        BLOCK_N=tile.block_n,
        MAX_SPLITS=MAX_SPLITS,
        SMALLEST=SMALLEST_KV,
        FUSED=fused,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **chip.dependent_launch(q.device),
    )


@once
def _counters(device: torch.device) -> Tensor:
    """Zeros, which every launch leaves as zeros. One stream at a time may use them."""
    assert device.type == "cpu" or not torch.cuda.is_current_stream_capturing(), "decode once before capturing it"
    return torch.zeros(_MAX_COUNTERS, dtype=torch.int32, device=device)
