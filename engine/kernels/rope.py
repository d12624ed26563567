"""Triton kernel of norm, rotation and KV store: one pass over a few heads. Letters as in `__init__`.

A program has heads of q, or of k and v, so that neither does what only the other needs: for many tokens, instructions
take as long as bytes. There a program has two tokens, so that keys and values fill its threads, too.

Arithmetic is fp32; values are rounded to the tensor's dtype exactly where the twin rounds. `rotate`, `quantise_heads`
and `store_heads` are also the beginning of decode attention, where a batch only decodes.
"""

# Triton is untyped: a jitted function has no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine.kernels import KVCache, chip
from engine.kernels.convert import divide
from engine.kernels.fused import check_rows
from engine.kernels.kv_codes import check_cache, encode
from engine.kernels.reference import SMALLEST_KV

_FEW_TOKENS = 16  # up to here a step waits for the longest program, beyond for the start of all of them
# Of a program: tokens; heads of q, or of both k and v; warps. Few add up squares in the order of decode attention.
_FEW = (1, 2, 2, 1)
_MANY = (2, 16, 8, 4)


@triton.jit
def rotate(first, second, gain_1, gain_2, cos, sin, eps, NORM: tl.constexpr, DTYPE: tl.constexpr):
    """Halves [N, D/2] fp32 of heads of q or k, normalised and rotated, in DTYPE. The others: [N or 1, D/2] fp32.

    Where a compiler could choose which product to fuse with a sum, `fma` says which: two kernels get the same bits.
    """
    if NORM:
        square = tl.sum(tl.fma(first, first, 0.0), axis=1) + tl.sum(tl.fma(second, second, 0.0), axis=1)
        scale = tl.rsqrt(square / (2 * first.shape[1]) + eps)[:, None]
        first = (gain_1 * (first * scale).to(DTYPE).to(tl.float32)).to(DTYPE).to(tl.float32)
        second = (gain_2 * (second * scale).to(DTYPE).to(tl.float32)).to(DTYPE).to(tl.float32)
    return tl.fma(second, -sin, first * cos).to(DTYPE), tl.fma(second, cos, first * sin).to(DTYPE)


@triton.jit
def quantise_heads(first, second, KIND: tl.constexpr, SMALLEST: tl.constexpr, FAST: tl.constexpr):
    """Halves [N, D/2] of heads, in the computing dtype -> their codes, scale [N, 1]; as they are where KIND is ""."""
    if KIND == "":
        return first, second, tl.full((first.shape[0], 1), 1.0, tl.float32)
    else:
        LARGEST: tl.constexpr = 448.0 if KIND == "fp8" else 127.0
        wide_1, wide_2 = first.to(tl.float32), second.to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(wide_1), axis=1), tl.max(tl.abs(wide_2), axis=1))[:, None]  # [N, 1]
        scale = tl.div_rn(tl.maximum(largest, SMALLEST), tl.full(largest.shape, LARGEST, tl.float32))
        return encode(divide(wide_1, scale), KIND, FAST), encode(divide(wide_2, scale), KIND, FAST), scale


@triton.jit
def store_heads(
    first,
    second,
    scale,
    kv_head,
    exists,
    slot,
    cache,
    scales,
    block_stride,
    BLOCK_SIZE: tl.constexpr,
    HKV: tl.constexpr,
):
    """What `quantise_heads` returns, to slots of a cache. kv_head, exists: [N, 1]; slot: a scalar or [N, 1]."""
    HALF: tl.constexpr = first.shape[1]
    D: tl.constexpr = 2 * HALF
    block, offset = (slot // BLOCK_SIZE).to(tl.int64), slot % BLOCK_SIZE
    if cache.dtype.element_ty == tl.int8:
        tl.store(scales + (block * (HKV * BLOCK_SIZE) + offset + kv_head * BLOCK_SIZE), scale, mask=exists)
    place = block * block_stride + offset * (HKV * D) + kv_head * D + tl.arange(0, HALF)[None, :]
    tl.store(cache + place, first, mask=exists)
    tl.store(cache + place + HALF, second, mask=exists)


@triton.jit
def _load_gain(weight, d, NORM: tl.constexpr):
    """Halves [1, D/2] fp32 of a norm's weight[D]; without a norm, what `rotate` does not use."""
    if NORM:
        return tl.load(weight + d).to(tl.float32), tl.load(weight + d + d.shape[1]).to(tl.float32)
    else:
        return d, d


@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["positions", "slots"])
def rope_and_store_kernel(
    qkv,
    q_norm,
    k_norm,
    cos_sin,
    positions,
    slots,
    q,
    k_cache,
    v_cache,
    k_scale,
    v_scale,
    eps,
    block_stride,
    num_tokens,
    BLOCK_SIZE: tl.constexpr,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    NORM: tl.constexpr,
    KIND: tl.constexpr,
    SMALLEST: tl.constexpr,
    FAST: tl.constexpr,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    PDL: tl.constexpr,
):
    HALF: tl.constexpr = D // 2
    Q_PARTS: tl.constexpr = (HQ + Q_HEADS - 1) // Q_HEADS
    dtype = q.dtype.element_ty
    PARTS: tl.constexpr = Q_PARTS + (HKV + KV_HEADS - 1) // KV_HEADS
    number = tl.num_programs(0) - 1 - tl.program_id(0)  # the last token first, see `fused`
    part, first_token = number % PARTS, number // PARTS * TOKENS
    d = tl.arange(0, HALF)[None, :]  # [1, D/2]
    # Rows are heads of tokens. Positions and slots are read before the wait: no kernel of the step writes them.
    if part < Q_PARTS:
        q_row = tl.arange(0, TOKENS * Q_HEADS)[:, None]
        q_token, q_head = first_token + q_row // Q_HEADS, part * Q_HEADS + q_row % Q_HEADS
        q_exists = (q_token < num_tokens) & (q_head < HQ)
        q_position = tl.load(positions + q_token, mask=q_token < num_tokens, other=0)
        q_angle = cos_sin + q_position.to(tl.int64) * D + d
        q_cos, q_sin = tl.load(q_angle), tl.load(q_angle + HALF)
        q_gain_1, q_gain_2 = _load_gain(q_norm, d, NORM)
        if PDL:
            gdc_launch_dependents()
            gdc_wait()
        q_source = qkv + q_token.to(tl.int64) * ((HQ + 2 * HKV) * D) + q_head * D + d
        q_1 = tl.load(q_source, mask=q_exists, other=0.0).to(tl.float32)
        q_2 = tl.load(q_source + HALF, mask=q_exists, other=0.0).to(tl.float32)
        rotated_1, rotated_2 = rotate(q_1, q_2, q_gain_1, q_gain_2, q_cos, q_sin, eps, NORM, dtype)
        q_out = q + q_token.to(tl.int64) * (HQ * D) + q_head * D + d
        tl.store(q_out, rotated_1, mask=q_exists)
        tl.store(q_out + HALF, rotated_2, mask=q_exists)
    else:
        row = tl.arange(0, TOKENS * KV_HEADS)[:, None]
        token, head = first_token + row // KV_HEADS, (part - Q_PARTS) * KV_HEADS + row % KV_HEADS
        exists = (token < num_tokens) & (head < HKV)
        position = tl.load(positions + token, mask=token < num_tokens, other=0)
        slot = tl.load(slots + token, mask=token < num_tokens, other=-1)
        angle = cos_sin + position.to(tl.int64) * D + d
        cos, sin = tl.load(angle), tl.load(angle + HALF)
        gain_1, gain_2 = _load_gain(k_norm, d, NORM)
        if PDL:
            gdc_launch_dependents()
            gdc_wait()
        source = qkv + token.to(tl.int64) * ((HQ + 2 * HKV) * D) + (HQ + head) * D + d
        k_1, k_2 = tl.load(source, mask=exists, other=0.0), tl.load(source + HALF, mask=exists, other=0.0)
        source += HKV * D
        v_1, v_2 = tl.load(source, mask=exists, other=0.0), tl.load(source + HALF, mask=exists, other=0.0)
        k_1, k_2 = rotate(k_1.to(tl.float32), k_2.to(tl.float32), gain_1, gain_2, cos, sin, eps, NORM, dtype)
        v_1, v_2, v_factor = quantise_heads(v_1, v_2, KIND, SMALLEST, FAST)
        k_1, k_2, k_factor = quantise_heads(k_1, k_2, KIND, SMALLEST, FAST)
        exists = exists & (slot >= 0)
        store_heads(v_1, v_2, v_factor, head, exists, slot, v_cache, v_scale, block_stride, BLOCK_SIZE, HKV)
        store_heads(k_1, k_2, k_factor, head, exists, slot, k_cache, k_scale, block_stride, BLOCK_SIZE, HKV)


def check_heads(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos_sin: Tensor,
    positions: Tensor,
    cache: KVCache,
    slots: Tensor,
) -> tuple[int, int]:
    """Check shapes, strides and dtypes of what is to be rotated and stored. T and Hq."""
    check_rows(qkv)
    num_tokens, width = qkv.shape
    num_kv_heads, head_dim = cache.k.shape[2:]
    num_heads = width // head_dim - 2 * num_kv_heads
    assert width == (num_heads + 2 * num_kv_heads) * head_dim and num_heads > 0
    assert cos_sin.dtype == torch.float32 and cos_sin.shape[1] == head_dim and cos_sin.is_contiguous()
    for index in (positions, slots):
        assert index.dtype == torch.int32 and index.shape == (num_tokens,) and index.is_contiguous()
    assert (q_norm is None) == (k_norm is None)
    for gain in (q_norm, k_norm):
        assert gain is None or (gain.shape == (head_dim,) and gain.is_contiguous())
    return num_tokens, num_heads


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
    num_tokens, num_heads = check_heads(qkv, q_norm, k_norm, cos_sin, positions, cache, slots)
    _, block_size, num_kv_heads, head_dim = cache.k.shape
    kind, k_cache, v_cache, k_scale, v_scale = check_cache(cache, qkv.dtype)
    q = qkv.new_empty(num_tokens, num_heads, head_dim)
    if num_tokens:
        tokens, q_heads, kv_heads, warps = _FEW if num_tokens <= _FEW_TOKENS else _MANY
        parts = triton.cdiv(num_heads, q_heads) + triton.cdiv(num_kv_heads, kv_heads)
        grid = (parts * triton.cdiv(num_tokens, tokens),)
        rope_and_store_kernel[grid](
            qkv,
            qkv if q_norm is None else q_norm,
            qkv if k_norm is None else k_norm,
            cos_sin,
            positions,
            slots,
            q,
            k_cache,
            v_cache,
            k_scale,
            v_scale,
            eps,
            k_cache.stride(0),
            num_tokens,
            BLOCK_SIZE=block_size,
            HQ=num_heads,
            HKV=num_kv_heads,
            D=head_dim,
            NORM=q_norm is not None,
            KIND=kind,
            SMALLEST=SMALLEST_KV,
            FAST=not triton.knobs.runtime.interpret,
            Q_HEADS=q_heads,
            KV_HEADS=kv_heads,
            TOKENS=tokens,
            num_warps=warps,
            **chip.dependent_launch(qkv.device),
        )
    return q
