"""Triton kernel of norm, rotation and KV store: one pass over a few heads of one token. Letters as in `__init__`.

Arithmetic is fp32; values are rounded to the tensor's dtype exactly where the twin rounds.
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
    tl.store(q_out, rotated_1, mask=is_q)
    tl.store(q_out + HALF, rotated_2, mask=is_q)
    block, offset = (slot // BLOCK_SIZE).to(tl.int64), slot % BLOCK_SIZE
    is_k = (head >= HQ) & (head < HQ + HKV) & (slot >= 0)
    is_v = is_v & exists & (slot >= 0)
    if KIND != "":
        LARGEST: tl.constexpr = 448.0 if KIND == "fp8" else 127.0
        wide_1, wide_2 = rotated_1.to(tl.float32), rotated_2.to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(wide_1), axis=1), tl.max(tl.abs(wide_2), axis=1))[:, None]  # [BLOCK_H, 1]
        kv_scale = tl.div_rn(tl.maximum(largest, SMALLEST), tl.full(largest.shape, LARGEST, tl.float32))
        rotated_1 = encode(tl.div_rn(wide_1, kv_scale.broadcast_to(wide_1.shape)), KIND)
        rotated_2 = encode(tl.div_rn(wide_2, kv_scale.broadcast_to(wide_2.shape)), KIND)
        scale_place = block * (HKV * BLOCK_SIZE) + offset
        tl.store(k_scale + scale_place + (head - HQ) * BLOCK_SIZE, kv_scale, mask=is_k)
        tl.store(v_scale + scale_place + (head - HQ - HKV) * BLOCK_SIZE, kv_scale, mask=is_v)
    place = block * block_stride + offset * (HKV * D) + d
    k_out = k_cache + place + (head - HQ) * D
    tl.store(k_out, rotated_1, mask=is_k)
    tl.store(k_out + HALF, rotated_2, mask=is_k)
    v_out = v_cache + place + (head - HQ - HKV) * D
    tl.store(v_out, rotated_1, mask=is_v)
    tl.store(v_out + HALF, rotated_2, mask=is_v)


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
