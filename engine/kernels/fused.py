"""Triton kernels of the element-wise operations: each is one pass over its inputs. Twins and letters as in `__init__`.

A program handles one token (norms), one stretch of one token (silu) or a few heads of one token (rotary). Arithmetic is
fp32; values are rounded to the tensor's dtype exactly where the twins round.
"""

# Triton is untyped: a jitted function has no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels import KVCache
from engine.kernels.kv_codes import check_cache, encode
from engine.kernels.reference import SMALLEST_KV

_SILU_BLOCK = 1024
_ROPE_HEADS = 4  # heads a program: one token spreads over several SMs, 8,192 tokens do not queue as 262,144 programs


@triton.jit
def rms_norm_kernel(x, residual, weight, out, total, eps, H: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * H
    offset = tl.arange(0, BLOCK)
    mask = offset < H
    value = tl.load(x + row + offset, mask=mask, other=0.0).to(tl.float32)
    dtype = out.dtype.element_ty
    if ADD:
        value += tl.load(residual + row + offset, mask=mask, other=0.0).to(tl.float32)
        rounded = value.to(dtype)
        tl.store(total + row + offset, rounded, mask=mask)
        value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / H + eps)
    normed = (value * scale).to(dtype).to(tl.float32)
    gain = tl.load(weight + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row + offset, (gain * normed).to(dtype), mask=mask)


@triton.jit
def silu_mul_kernel(gate_up, out, I: tl.constexpr, BLOCK: tl.constexpr):  # noqa: E741 (the legend's letter)
    token = tl.program_id(0).to(tl.int64)
    offset = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < I
    gate = tl.load(gate_up + token * 2 * I + offset, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * 2 * I + I + offset, mask=mask, other=0.0).to(tl.float32)
    dtype = out.dtype.element_ty
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out + token * I + offset, (silu * up).to(dtype), mask=mask)


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
):
    HALF: tl.constexpr = D // 2
    dtype = q.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]  # [BLOCK_H, 1]
    d = tl.arange(0, HALF)[None, :]  # [1, D/2]
    exists = head < HQ + 2 * HKV
    is_q = head < HQ
    is_v = head >= HQ + HKV
    source = qkv + token * ((HQ + 2 * HKV) * D) + head * D + d
    first = tl.load(source, mask=exists, other=0.0).to(tl.float32)  # [BLOCK_H, D/2]
    second = tl.load(source + HALF, mask=exists, other=0.0).to(tl.float32)
    first_v, second_v = first, second
    if NORM:
        square = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
        scale = tl.rsqrt(square / D + eps)[:, None]
        gain_1 = tl.where(is_q, tl.load(q_norm + d), tl.load(k_norm + d)).to(tl.float32)
        gain_2 = tl.where(is_q, tl.load(q_norm + HALF + d), tl.load(k_norm + HALF + d)).to(tl.float32)
        first = (gain_1 * (first * scale).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        second = (gain_2 * (second * scale).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    position = tl.load(positions + token).to(tl.int64)
    cos = tl.load(cos_sin + position * D + d)
    sin = tl.load(cos_sin + position * D + HALF + d)
    rotated_1 = tl.where(is_v, first_v, first * cos - second * sin).to(dtype)
    rotated_2 = tl.where(is_v, second_v, second * cos + first * sin).to(dtype)
    q_out = q + token * (HQ * D) + head * D + d
    tl.store(q_out, rotated_1, mask=is_q)
    tl.store(q_out + HALF, rotated_2, mask=is_q)
    slot = tl.load(slots + token)
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


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    _check_rows(x)
    assert weight.shape == x.shape[1:] and weight.is_contiguous()
    out = torch.empty_like(x)
    _launch_norm(x, x, weight, out, out, eps, add=False)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    _check_rows(x)
    _check_rows(residual)
    assert residual.shape == x.shape and residual.dtype == x.dtype
    assert weight.shape == x.shape[1:] and weight.is_contiguous()
    out, total = torch.empty_like(x), torch.empty_like(x)
    _launch_norm(x, residual, weight, out, total, eps, add=True)
    return out, total


def silu_mul(gate_up: Tensor) -> Tensor:
    _check_rows(gate_up)
    num_tokens, width = gate_up.shape
    assert width % 2 == 0
    out = gate_up.new_empty(num_tokens, width // 2)
    if num_tokens:
        grid = (num_tokens, triton.cdiv(width // 2, _SILU_BLOCK))
        silu_mul_kernel[grid](gate_up, out, I=width // 2, BLOCK=_SILU_BLOCK)
    return out


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
    _check_rows(qkv)
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
        grid = (num_tokens, triton.cdiv(num_heads + 2 * num_kv_heads, _ROPE_HEADS))
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
            BLOCK_H=_ROPE_HEADS,
            num_warps=1,
        )
    return q


def _check_rows(x: Tensor) -> None:
    assert x.dim() == 2 and x.is_contiguous()
    assert x.dtype in (torch.bfloat16, torch.float16, torch.float32), x.dtype


def _launch_norm(
    x: Tensor, residual: Tensor, weight: Tensor, out: Tensor, total: Tensor, eps: float, *, add: bool
) -> None:
    num_tokens, width = x.shape
    if num_tokens:
        block = triton.next_power_of_2(width)
        warps = min(max(block // 512, 1), 8)
        rms_norm_kernel[(num_tokens,)](
            x, residual, weight, out, total, eps, H=width, BLOCK=block, ADD=add, num_warps=warps
        )
