"""Triton kernel of norm, rotation and KV store: one pass over a few heads of a few tokens. Letters as in `__init__`.

A row is a head of a token; a program takes a few of them, neighbours in memory. Arithmetic is fp32; values are rounded
to the tensor's dtype exactly where the twin rounds.
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
from engine.kernels.fused import check_rows
from engine.kernels.kv_codes import check_cache, encode
from engine.kernels.reference import SMALLEST_KV

_FEW_TOKENS = 32  # up to here a step waits for the longest program, beyond for the start of all of them
_FEW = (2, 1)  # rows and warps of a program
_MANY = (32, 4)


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["positions", "slots"])
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
    num_rows,
    BLOCK_SIZE: tl.constexpr,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    NORM: tl.constexpr,
    KIND: tl.constexpr,
    FAST: tl.constexpr,
    SMALLEST: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    HALF: tl.constexpr = D // 2
    dtype = q.dtype.element_ty
    HEADS: tl.constexpr = HQ + 2 * HKV
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    exists = row < num_rows
    token, head = (row // HEADS).to(tl.int64), row % HEADS
    d = tl.arange(0, HALF)[None, :]  # [1, D/2]
    is_q = head < HQ
    is_v = head >= HQ + HKV
    if NORM:  # weights, which no kernel writes
        gain_1 = tl.where(is_q, tl.load(q_norm + d), tl.load(k_norm + d)).to(tl.float32)
        gain_2 = tl.where(is_q, tl.load(q_norm + HALF + d), tl.load(k_norm + HALF + d)).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    position = tl.load(positions + token, mask=exists, other=0).to(tl.int64)
    slot = tl.load(slots + token, mask=exists, other=-1)
    source = qkv + row.to(tl.int64) * D + d
    first = tl.load(source, mask=exists, other=0.0).to(tl.float32)  # [ROWS, D/2]
    second = tl.load(source + HALF, mask=exists, other=0.0).to(tl.float32)
    first_v, second_v = first, second
    if NORM:
        square = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
        scale = tl.rsqrt(square / D + eps)[:, None]
        first = (gain_1 * (first * scale).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        second = (gain_2 * (second * scale).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    cos = tl.load(cos_sin + position * D + d)
    sin = tl.load(cos_sin + position * D + HALF + d)
    rotated_1 = tl.where(is_v, first_v, first * cos - second * sin).to(dtype)
    rotated_2 = tl.where(is_v, second_v, second * cos + first * sin).to(dtype)
    q_out = q + token * (HQ * D) + head * D + d
    tl.store(q_out, rotated_1, mask=is_q & exists)
    tl.store(q_out + HALF, rotated_2, mask=is_q & exists)
    first_head = (tl.program_id(0) * ROWS) % HEADS
    if first_head + ROWS > HQ:  # not queries alone
        block, offset = (slot // BLOCK_SIZE).to(tl.int64), slot % BLOCK_SIZE
        is_k = (head >= HQ) & (head < HQ + HKV) & (slot >= 0)
        is_v = is_v & (slot >= 0)
        if KIND != "":
            stored_1, stored_2, kv_scale = _quantize(rotated_1, rotated_2, KIND, FAST, SMALLEST)
            scale_place = block * (HKV * BLOCK_SIZE) + offset
            tl.store(k_scale + scale_place + (head - HQ) * BLOCK_SIZE, kv_scale, mask=is_k)
            tl.store(v_scale + scale_place + (head - HQ - HKV) * BLOCK_SIZE, kv_scale, mask=is_v)
        else:
            stored_1, stored_2 = rotated_1, rotated_2
        place = block * block_stride + offset * (HKV * D) + d
        k_out = k_cache + place + (head - HQ) * D
        tl.store(k_out, stored_1, mask=is_k)
        tl.store(k_out + HALF, stored_2, mask=is_k)
        v_out = v_cache + place + (head - HQ - HKV) * D
        tl.store(v_out, stored_1, mask=is_v)
        tl.store(v_out + HALF, stored_2, mask=is_v)


@triton.jit
def _quantize(first, second, KIND: tl.constexpr, FAST: tl.constexpr, SMALLEST: tl.constexpr):
    """Both halves [ROWS, D/2] of each row as codes, and the scale [ROWS, 1]."""
    first, second = first.to(tl.float32), second.to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(first), axis=1), tl.max(tl.abs(second), axis=1))[:, None]
    limit = tl.full(largest.shape, 448.0 if KIND == "fp8" else 127.0, tl.float32)
    scale = tl.div_rn(tl.maximum(largest, SMALLEST), limit)
    return encode(_divide(first, scale, FAST), KIND), encode(_divide(second, scale, FAST), KIND), scale


@triton.jit
def _divide(value, divisor, FAST: tl.constexpr):
    """value[ROWS, D/2] / divisor[ROWS, 1], rounded as division is.

    FAST: by one reciprocal a row and a correction (Markstein, 1990, theorem 8.4). The interpreter has no fused product
    and sum.
    """
    wide = divisor.broadcast_to(value.shape)
    if not FAST:
        return tl.div_rn(value, wide)
    inverse = tl.div_rn(tl.full(divisor.shape, 1.0, tl.float32), divisor).broadcast_to(value.shape)
    quotient = value * inverse
    return tl.fma(tl.fma(-quotient, wide, value), inverse, quotient)


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
    check_rows(qkv)
    num_tokens, width = qkv.shape
    _, block_size, num_kv_heads, head_dim = cache.k.shape
    num_heads = width // head_dim - 2 * num_kv_heads
    kind, k_cache, v_cache, k_scale, v_scale = check_cache(cache, qkv.dtype)
    assert width == (num_heads + 2 * num_kv_heads) * head_dim and num_heads > 0
    assert cos_sin.dtype == torch.float32 and cos_sin.shape[1] == head_dim and cos_sin.is_contiguous()
    for index in (positions, slots):
        assert index.dtype == torch.int32 and index.shape == (num_tokens,) and index.is_contiguous()
    assert (q_norm is None) == (k_norm is None)
    for gain in (q_norm, k_norm):
        assert gain is None or (gain.shape == (head_dim,) and gain.is_contiguous())
    q = qkv.new_empty(num_tokens, num_heads, head_dim)
    if num_tokens:
        num_rows = num_tokens * (num_heads + 2 * num_kv_heads)
        rows, warps = _FEW if num_tokens <= _FEW_TOKENS else _MANY
        rope_and_store_kernel[(triton.cdiv(num_rows, rows),)](
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
            num_rows,
            BLOCK_SIZE=block_size,
            HQ=num_heads,
            HKV=num_kv_heads,
            D=head_dim,
            NORM=q_norm is not None,
            KIND=kind,
            FAST=not triton.knobs.runtime.interpret,
            SMALLEST=SMALLEST_KV,
            ROWS=rows,
            num_warps=warps,
            **chip.dependent_launch(qkv.device),
        )
    return q
