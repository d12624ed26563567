"""Triton kernels between the stored 8-bit types and the compute types: one pass over the input, no product.

`quantize_tokens`, one program a token, and `dequantize`, one program a stretch of one output's weights. The numbers are
`quant.quantize`'s, bit for bit. `widen` and `codes` are shared with the products.
"""

# Triton is untyped: a jitted function has no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine.kernels import Codes, chip
from engine.kernels.tiles import empty_rows

_STRETCH = 2048  # weights of one program
SMALLEST = tl.constexpr(1e-30)  # of a token's largest magnitude, where it is split in digits
LOW_INT8, LOW_FP8 = tl.constexpr(1.0 / 254.0), tl.constexpr(1.0 / 16.0)  # what the second digit stands for in the first
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it and taking it away rounds halves to even


@triton.jit
def widen(w, dtype: tl.constexpr):
    """Stored weights in `dtype`, exactly: int8, or float8_e4m3fn as `codes` passes it.

    By the hardware, through fp32: straight to bf16 takes slower instructions on sm_90. Without it by bits: moved into
    the fields of a wider float they are the value divided by a power of two, subnormals too.
    """
    if w.dtype == tl.float8e4nv:
        wide = w.to(tl.float32).to(dtype)
    elif w.dtype == tl.uint8:
        bits = w.to(tl.int8, bitcast=True)
        if dtype == tl.bfloat16:
            wide = ((bits.to(tl.int16) << 4) & -30736).to(tl.bfloat16, bitcast=True)  # -30736: bits 15, 10 to 4
            wide = wide * tl.full(w.shape, 2.0**120, tl.bfloat16)
        elif dtype == tl.float16:
            wide = ((bits.to(tl.int16) << 7) & -16385).to(tl.float16, bitcast=True)  # -16385: all but bit 14
            wide = wide * tl.full(w.shape, 256.0, tl.float16)
        else:
            wide = ((bits.to(tl.int32) << 20) & -2014314496).to(tl.float32, bitcast=True)  # bits 31, 26 to 20
            wide = wide * 2.0**120
    else:
        wide = w.to(dtype)
    return wide


@triton.jit
def divide(value, divisor):
    """value[M, N] / divisor[M, 1] in fp32, where a divisor of 0 counts as 1.

    By one reciprocal and a correction: rounded as a division is (Markstein, 1990), where no remainder is lost to
    underflow, so tiny divisors are lifted first. The correction of a zero is a zero of its sign.
    """
    lift = tl.where(divisor < 2.0**-60, 2.0**64, 1.0)
    divisor = tl.where(divisor == 0.0, 1.0, divisor * lift)
    inverse = tl.div_rn(tl.full(divisor.shape, 1.0, tl.float32), divisor)
    value *= lift
    quotient = value * inverse
    excess = tl.fma(quotient, tl.broadcast_to(divisor, value.shape), -value)
    return tl.fma(excess, tl.broadcast_to(-inverse, value.shape), quotient)


@triton.jit
def quantize_values(raw, largest, dtype: tl.constexpr):
    """raw[PARTS, SPAN], the largest magnitude [PARTS] of what shares a scale -> codes in `dtype`, scale[PARTS].

    Kernels that call this are compiled without fusing products into additions, which would move codes at ties.
    """
    value = raw.to(tl.float32)
    limit = tl.full(largest.shape, 127.5 if dtype == tl.int8 else 448.0, tl.float32)
    scale = tl.div_rn(largest, limit).to(raw.dtype).to(tl.float32)
    if dtype == tl.int8:
        scale = tl.maximum(scale, 1.1920928955078125e-07)  # 2^-23
        value = value * tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)[:, None]
        value = tl.minimum(tl.maximum((value + _ROUND) - _ROUND, -128.0), 127.0)
    else:
        value = divide(value, scale[:, None])  # what rounding the scale puts above 448 is 448 in FP8, too
    return value.to(dtype), scale


@triton.jit
def split_values(raw, largest, dtype: tl.constexpr):
    """raw values of one token, its largest magnitude -> their high and low digits in `dtype`, and the scale. Compiled
    as `quantize_values`.
    """
    value = raw.to(tl.float32)
    largest = tl.maximum(largest, SMALLEST)
    if dtype == tl.int8:
        scale = tl.div_rn(largest, 127.0)
        value *= tl.div_rn(1.0, scale)
        high = (value + _ROUND) - _ROUND
        low = ((value - high) * 254.0 + _ROUND) - _ROUND
    else:
        exponent = (largest.to(tl.int32, bitcast=True) + 0x1FFFFF) >> 23
        scale = ((exponent - 8) << 23).to(tl.float32, bitcast=True)
        value *= ((262 - exponent) << 23).to(tl.float32, bitcast=True)
        high = value.to(dtype).to(tl.float32)
        low = (value - high) * 16.0
    return high.to(dtype), low.to(dtype), scale


@triton.jit
def store_codes(
    chunks, qdata, scales, row, K, PARTS: tl.constexpr, SPAN: tl.constexpr, GROUPS: tl.constexpr, DIGITS: tl.constexpr
):
    """Quantise a token of K values, which come in chunks [PARTS, SPAN], 0 past its end: a part is a group where there
    are several, and two digits have one scale.
    """
    k = tl.arange(0, PARTS)[:, None] * SPAN + tl.arange(0, SPAN)[None, :]  # [PARTS, SPAN]
    largest = tl.zeros((PARTS,), tl.float32)
    if GROUPS == 1:
        for i in tl.static_range(len(chunks)):
            largest = tl.maximum(largest, tl.max(tl.abs(chunks[i].to(tl.float32)), axis=1))
        largest = tl.zeros((PARTS,), tl.float32) + tl.max(largest, axis=0)
    for i in tl.static_range(len(chunks)):
        at, part = i * PARTS * SPAN + k, i * PARTS + tl.arange(0, PARTS)
        if DIGITS == 2:
            high, low, scale = split_values(chunks[i], tl.max(largest, axis=0), qdata.dtype.element_ty)
            tl.store(qdata + 2 * row * K + at, high, mask=at < K)
            tl.store(qdata + (2 * row + 1) * K + at, low, mask=at < K)
            if i == 0:
                tl.store(scales + row, scale)
        else:
            if GROUPS > 1:
                largest = tl.max(tl.abs(chunks[i].to(tl.float32)), axis=1)
            code, scale = quantize_values(chunks[i], largest, qdata.dtype.element_ty)
            tl.store(qdata + row * K + at, code, mask=at < K)
            if GROUPS > 1 or i == 0:
                tl.store(scales + row * GROUPS + part, scale, mask=part < GROUPS)


@triton.jit
def split_tokens_kernel(x, qdata, scales, K, PARTS: tl.constexpr, SPAN: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, PARTS)[:, None] * SPAN + tl.arange(0, SPAN)[None, :]  # [PARTS, SPAN]
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    raw = tl.load(x + row * K + k, mask=k < K, other=0.0)
    store_codes((raw,), qdata, scales, row, K, PARTS, SPAN, 1, 2)


@triton.jit
def quantize_tokens_kernel(
    x,
    pre_scale,
    qdata,
    scales,
    K,
    SMOOTH: tl.constexpr,
    PARTS: tl.constexpr,
    SPAN: tl.constexpr,
    GROUPS: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, PARTS)[:, None] * SPAN + tl.arange(0, SPAN)[None, :]  # [PARTS, SPAN]
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    raw = tl.load(x + row * K + k, mask=k < K, other=0.0)
    if SMOOTH:
        raw = raw.to(tl.float32) * tl.load(pre_scale + k, mask=k < K, other=0.0)
    store_codes((raw,), qdata, scales, row, K, PARTS, SPAN, GROUPS, 1)


@triton.jit
def dequantize_kernel(
    qdata,
    scales,
    out,
    K,
    num_groups,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    SPAN: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * (PARTS * SPAN) + tl.arange(0, PARTS) * SPAN
    k = first[:, None] + tl.arange(0, SPAN)[None, :]  # [PARTS, SPAN]
    stored = tl.load(qdata + row * K + k, mask=k < K, other=0.0)
    if GROUP == 0:
        scale = tl.zeros((PARTS,), tl.float32) + tl.load(scales + row)
    else:
        scale = tl.load(scales + row * num_groups + first // GROUP, mask=first < K, other=0.0)
    value = widen(stored, tl.float32)
    if PDL:
        gdc_wait()  # whoever had the scratch before has read it
    tl.store(out + row * K + k, (value * scale[:, None]).to(out.dtype.element_ty), mask=k < K)


def codes(w: Tensor) -> Tensor:
    """Weights as the kernels take them: e4m3fn as uint8 where the hardware cannot convert it."""
    bits = w.dtype == torch.float8_e4m3fn and chip.capability(w.device) < (8, 9)
    return w.view(torch.uint8) if bits else w


def quantize_tokens(
    x: Tensor, dtype: torch.dtype, group_size: int = 0, pre_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    assert x.dim() == 2 and x.is_contiguous()
    assert x.dtype in (torch.bfloat16, torch.float16, torch.float32), x.dtype
    rows, depth = x.shape
    qdata, scale = empty_codes(x, depth, Codes(dtype, group_size))
    if rows:
        parts, span, warps = cut(depth, group_size)
        quantize_tokens_kernel[(rows,)](
            x,
            x if pre_scale is None else pre_scale,
            qdata,
            scale,
            depth,
            SMOOTH=smooths(pre_scale, depth),
            PARTS=parts,
            SPAN=span,
            GROUPS=scale.shape[1],
            num_warps=warps,
            enable_fp_fusion=False,
            **chip.dependent_launch(x.device),
        )
    return qdata, scale


def split_tokens(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    assert x.dim() == 2 and x.is_contiguous()
    rows, depth = x.shape
    qdata, scale = empty_codes(x, depth, Codes(dtype, digits=2))
    if rows:
        parts, span, warps = cut(depth, 0)
        split_tokens_kernel[(rows,)](
            x,
            qdata,
            scale,
            depth,
            PARTS=parts,
            SPAN=span,
            num_warps=warps,
            enable_fp_fusion=False,
            **chip.dependent_launch(x.device),
        )
    return qdata, scale


def smooths(pre_scale: Tensor | None, depth: int) -> bool:
    """Whether there is a pre_scale[depth] fp32 to multiply tokens with before they are quantised."""
    assert pre_scale is None or (pre_scale.shape == (depth,) and pre_scale.dtype == torch.float32)
    return pre_scale is not None


def cut(depth: int, group_size: int) -> tuple[int, int, int]:
    """(PARTS, SPAN, warps) for one token of `depth` values in registers: a part is a group, or 128 values."""
    span = group_size or 128
    parts = triton.next_power_of_2(triton.cdiv(depth, span))
    return parts, span, min(max(parts * span // 1024, 1), 8)


def empty_codes(like: Tensor, depth: int, codes: Codes) -> tuple[Tensor, Tensor]:
    """Room for codes[M * digits, depth] and scale[M, G] of as many tokens as `like` has."""
    assert codes.dtype in (torch.int8, torch.float8_e4m3fn), codes.dtype
    groups = triton.cdiv(depth, codes.group_size) if codes.group_size else 1
    rows = like.shape[0]
    qdata = empty_rows(like, rows * codes.digits, depth, dtype=codes.dtype)
    return qdata, like.new_empty(rows, groups, dtype=torch.float32)


def dequantize(qdata: Tensor, scale: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """`quant.quantize.dequantize` of a contiguous qdata[N, K], scale[N, G]."""
    assert qdata.dim() == 2 and qdata.is_contiguous() and scale.is_contiguous()
    rows, depth = qdata.shape
    groups = triton.cdiv(depth, group_size) if group_size else 1
    assert scale.shape == (rows, groups) and scale.dtype == torch.float32
    out = torch.empty_like(qdata, dtype=dtype)
    span = group_size or 128
    grid = (rows, triton.cdiv(depth, _STRETCH))
    dequantize_kernel[grid](
        codes(qdata),
        scale,
        out,
        depth,
        groups,
        GROUP=group_size,
        PARTS=_STRETCH // span,
        SPAN=span,
        **chip.dependent_launch(qdata.device),
    )
    return out
