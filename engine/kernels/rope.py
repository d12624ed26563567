"""Triton kernel of norm, rotation and KV store: one pass over a few heads of one token. Letters as in `__init__`.

Arithmetic is fp32; values are rounded to the tensor's dtype exactly where the twin rounds. `rotate` and `store_heads`
are also the beginning of decode attention, where a batch only decodes.
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

_FEW_TOKENS = 16  # up to here a step waits for the longest program, beyond for the start of all of them
_FEW = (2, 1)  # heads and warps of a program
_MANY = (16, 4)


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
def store_heads(
    first,
    second,
    kv_head,
    is_k,
    is_v,
    slot,
    k_cache,
    v_cache,
    k_scale,
    v_scale,
    block_stride,
    BLOCK_SIZE: tl.constexpr,
    HKV: tl.constexpr,
    KIND: tl.constexpr,
    SMALLEST: tl.constexpr,
):
    """Halves [N, D/2] of heads, in the computing dtype, to one slot of the cache. kv_head, is_k, is_v: [N, 1]."""
    HALF: tl.constexpr = first.shape[1]
    D: tl.constexpr = 2 * HALF
    block, offset = (slot // BLOCK_SIZE).to(tl.int64), slot % BLOCK_SIZE
    if KIND != "":
        LARGEST: tl.constexpr = 448.0 if KIND == "fp8" else 127.0
        wide_1, wide_2 = first.to(tl.float32), second.to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(wide_1), axis=1), tl.max(tl.abs(wide_2), axis=1))[:, None]  # [N, 1]
        kv_scale = tl.div_rn(tl.maximum(largest, SMALLEST), tl.full(largest.shape, LARGEST, tl.float32))
        first = encode(tl.div_rn(wide_1, kv_scale.broadcast_to(wide_1.shape)), KIND)
        second = encode(tl.div_rn(wide_2, kv_scale.broadcast_to(wide_2.shape)), KIND)
        scale_place = block * (HKV * BLOCK_SIZE) + offset + kv_head * BLOCK_SIZE
        tl.store(k_scale + scale_place, kv_scale, mask=is_k)
        tl.store(v_scale + scale_place, kv_scale, mask=is_v)
    place = block * block_stride + offset * (HKV * D) + kv_head * D + tl.arange(0, HALF)[None, :]
    tl.store(k_cache + place, first, mask=is_k)
    tl.store(k_cache + place + HALF, second, mask=is_k)
    tl.store(v_cache + place, first, mask=is_v)
    tl.store(v_cache + place + HALF, second, mask=is_v)


@triton.jit(do_not_specialize_on_alignment=["positions", "slots"])
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
    BLOCK_SIZE: tl.constexpr,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    NORM: tl.constexpr,
    KIND: tl.constexpr,
    SMALLEST: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    HALF: tl.constexpr = D // 2
    dtype = q.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]  # [BLOCK_H, 1]
    d = tl.arange(0, HALF)[None, :]  # [1, D/2]
    exists = head < HQ + 2 * HKV
    is_q = head < HQ
    is_v = head >= HQ + HKV
    gain_1, gain_2 = None, None
    if NORM:  # weights, which no kernel writes
        gain_1 = tl.where(is_q, tl.load(q_norm + d), tl.load(k_norm + d)).to(tl.float32)
        gain_2 = tl.where(is_q, tl.load(q_norm + HALF + d), tl.load(k_norm + HALF + d)).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    position = tl.load(positions + token).to(tl.int64)
    slot = tl.load(slots + token)
    source = qkv + token * ((HQ + 2 * HKV) * D) + head * D + d
    first = tl.load(source, mask=exists, other=0.0).to(tl.float32)  # [BLOCK_H, D/2]
    second = tl.load(source + HALF, mask=exists, other=0.0).to(tl.float32)
    cos = tl.load(cos_sin + position * D + d)
    sin = tl.load(cos_sin + position * D + HALF + d)
    rotated_1, rotated_2 = rotate(first, second, gain_1, gain_2, cos, sin, eps, NORM, dtype)
    rotated_1 = tl.where(is_v, first.to(dtype), rotated_1)
    rotated_2 = tl.where(is_v, second.to(dtype), rotated_2)
    q_out = q + token * (HQ * D) + head * D + d
    tl.store(q_out, rotated_1, mask=is_q)
    tl.store(q_out + HALF, rotated_2, mask=is_q)
    is_k = (head >= HQ) & (head < HQ + HKV) & (slot >= 0)
    kv_head = head - tl.where(is_v, HQ + HKV, HQ)
    store_heads(
        rotated_1,
        rotated_2,
        kv_head,
        is_k,
        is_v & exists & (slot >= 0),
        slot,
        k_cache,
        v_cache,
        k_scale,
        v_scale,
        block_stride,
        BLOCK_SIZE,
        HKV,
        KIND,
        SMALLEST,
    )


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
        heads, warps = _FEW if num_tokens <= _FEW_TOKENS else _MANY
        grid = (num_tokens, triton.cdiv(num_heads + 2 * num_kv_heads, heads))
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
            BLOCK_SIZE=block_size,
            HQ=num_heads,
            HKV=num_kv_heads,
            D=head_dim,
            NORM=q_norm is not None,
            KIND=kind,
            SMALLEST=SMALLEST_KV,
            BLOCK_H=heads,
            num_warps=warps,
            **chip.dependent_launch(qkv.device),
        )
    return q
