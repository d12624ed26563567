"""Triton kernels that produce activations already in 8 bits: `fused`'s norms and silu, then `quantize_tokens`.

A program handles one token, the last one first as in `fused`. Values are rounded to the compute dtype where the
separate kernels write them out, so that codes and scales are those of the two kernels one after the other. What is
saved is a launch, and writing and reading the activations in the compute dtype.
"""

# Triton is untyped: a jitted function has no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, var-annotated"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine.kernels import Codes, Quantised, chip
from engine.kernels.convert import cut, empty_codes, smooths, store_codes
from engine.kernels.fused import FEW_TOKENS, add_planes, check_added, check_rows, few_warps

_CHUNK = 2048  # values of a token that silu takes at a time


@triton.jit
def norm_quantize_kernel(
    x,
    residual,
    weight,
    pre_scale,
    qdata,
    scales,
    total,
    eps,
    H: tl.constexpr,
    ADD: tl.constexpr,
    PLANES: tl.constexpr,
    SMOOTH: tl.constexpr,
    PARTS: tl.constexpr,
    SPAN: tl.constexpr,
    GROUPS: tl.constexpr,
    DIGITS: tl.constexpr,
    PDL: tl.constexpr,
):
    row = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    k = tl.arange(0, PARTS)[:, None] * SPAN + tl.arange(0, SPAN)[None, :]  # [PARTS, SPAN]
    mask = k < H
    gain = tl.load(weight + k, mask=mask, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    dtype = total.dtype.element_ty
    if PLANES:
        value = add_planes(x, row * H + k, mask, H, PLANES, dtype)
    else:
        value = tl.load(x + row * H + k, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + row * H + k, mask=mask, other=0.0).to(tl.float32)
        rounded = value.to(dtype)
        tl.store(total + row * H + k, rounded, mask=mask)
        value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(tl.sum(value * value, axis=1), axis=0) / H + eps)
    normed = (gain * (value * scale).to(dtype).to(tl.float32)).to(dtype)
    if SMOOTH:
        normed = normed.to(tl.float32) * tl.load(pre_scale + k, mask=mask, other=0.0)
    store_codes((normed,), qdata, scales, row, H, PARTS, SPAN, GROUPS, DIGITS)


@triton.jit
def silu_mul_quantize_kernel(
    gate_up,
    pre_scale,
    qdata,
    scales,
    I: tl.constexpr,  # noqa: E741 (the legend's letter)
    SMOOTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    PARTS: tl.constexpr,
    SPAN: tl.constexpr,
    GROUPS: tl.constexpr,
    DIGITS: tl.constexpr,
    PDL: tl.constexpr,
):
    row = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    k = tl.arange(0, PARTS)[:, None] * SPAN + tl.arange(0, SPAN)[None, :]  # [PARTS, SPAN]
    dtype = gate_up.dtype.element_ty
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    gates, ups, products = (), (), ()
    for i in tl.static_range(CHUNKS):  # all loads first
        at = i * PARTS * SPAN + k
        gates += (tl.load(gate_up + row * 2 * I + at, mask=at < I, other=0.0),)
        ups += (tl.load(gate_up + row * 2 * I + I + at, mask=at < I, other=0.0),)
    for i in tl.static_range(CHUNKS):
        at = i * PARTS * SPAN + k
        gate = gates[i].to(tl.float32)
        silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
        product = (silu * ups[i].to(tl.float32)).to(dtype)
        if SMOOTH:
            product = product.to(tl.float32) * tl.load(pre_scale + at, mask=at < I, other=0.0)
        products += (product,)
    store_codes(products, qdata, scales, row, I, PARTS, SPAN, GROUPS, DIGITS)


def rms_norm(x: Tensor, weight: Tensor, eps: float, codes: Codes) -> Quantised:
    check_rows(x)
    return _norm(x, x, weight, eps, codes, x, add=False)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, codes: Codes) -> tuple[Quantised, Tensor]:
    check_added(x, residual)
    total = torch.empty_like(residual)
    return _norm(x, residual, weight, eps, codes, total, add=True), total


def silu_mul(gate_up: Tensor, codes: Codes) -> Quantised:
    check_rows(gate_up)
    num_tokens, width = gate_up.shape
    assert width % 2 == 0
    qdata, scale = empty_codes(gate_up, width // 2, codes)
    if num_tokens:
        chunks, parts, span = _chunks(width // 2, codes.group_size)
        silu_mul_quantize_kernel[(num_tokens,)](
            gate_up,
            gate_up if codes.pre_scale is None else codes.pre_scale,
            qdata,
            scale,
            I=width // 2,
            SMOOTH=smooths(codes.pre_scale, width // 2),
            CHUNKS=chunks,
            PARTS=parts,
            SPAN=span,
            GROUPS=scale.shape[1],
            DIGITS=codes.digits,
            num_warps=8,
            enable_fp_fusion=False,
            **chip.dependent_launch(gate_up.device),
        )
    return Quantised(qdata, scale, gate_up.dtype)


def _chunks(width: int, group_size: int) -> tuple[int, int, int]:
    """(CHUNKS, PARTS, SPAN) for one token of `width` values: chunks of about 2,048, so that few are past its end."""
    span = group_size or 128
    parts = min(triton.next_power_of_2(triton.cdiv(width, span)), max(_CHUNK // span, 1))
    return triton.cdiv(width, parts * span), parts, span


def _norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, codes: Codes, total: Tensor, *, add: bool
) -> Quantised:
    assert weight.shape == residual.shape[1:] and weight.is_contiguous()
    num_tokens, width = residual.shape
    qdata, scale = empty_codes(residual, width, codes)
    if num_tokens:
        parts, span, warps = cut(width, codes.group_size)
        warps = few_warps(parts * span) if num_tokens <= FEW_TOKENS else warps
        norm_quantize_kernel[(num_tokens,)](
            x,
            residual,
            weight,
            weight if codes.pre_scale is None else codes.pre_scale,
            qdata,
            scale,
            total,
            eps,
            H=width,
            ADD=add,
            PLANES=x.shape[0] if x.dim() == 3 else 0,
            SMOOTH=smooths(codes.pre_scale, width),
            PARTS=parts,
            SPAN=span,
            GROUPS=scale.shape[1],
            DIGITS=codes.digits,
            num_warps=warps,
            enable_fp_fusion=False,
            **chip.dependent_launch(x.device),
        )
    return Quantised(qdata, scale, residual.dtype)
