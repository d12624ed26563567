"""Triton kernels of the element-wise operations: each is one pass over its inputs. Twins and letters as in `__init__`.

A program handles one token (norms) or one stretch of one token (silu). Of many tokens the last one is first: a product
writes from the first token to the last, so what it wrote last is still in L2, and what is written last here is what the
next product begins with. Arithmetic is fp32; values are rounded to the tensor's dtype exactly where the twins round.
"""

# Triton is untyped: a jitted function has no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine.kernels import chip
from engine.kernels.tiles import empty_rows

_SILU_BLOCK = 1024
FEW_TOKENS = 256  # of up to so many a norm takes as long as one program does, of more as long as memory does


@triton.jit
def add_planes(x, offset, mask, H: tl.constexpr, PLANES: tl.constexpr, dtype: tl.constexpr):
    """x[PLANES, T, H] fp32 added up in order, and rounded as a product is, by T programs.

    An argument T * H could be any number to the compiler, which then loads each value of a later plane alone.
    """
    plane = tl.num_programs(0).to(tl.int64) * H
    value = tl.load(x + offset, mask=mask, other=0.0)
    for i in tl.static_range(1, PLANES):
        value += tl.load(x + i * plane + offset, mask=mask, other=0.0)
    return value.to(dtype).to(tl.float32)


@triton.jit
def rms_norm_kernel(
    x,
    residual,
    weight,
    out,
    total,
    eps,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    PLANES: tl.constexpr,
    PDL: tl.constexpr,
):
    row = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64) * H
    offset = tl.arange(0, BLOCK)
    mask = offset < H
    gain = tl.load(weight + offset, mask=mask, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    dtype = out.dtype.element_ty
    if PLANES:
        value = add_planes(x, row + offset, mask, H, PLANES, dtype)
    else:
        value = tl.load(x + row + offset, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + row + offset, mask=mask, other=0.0).to(tl.float32)
        rounded = value.to(dtype)
        tl.store(total + row + offset, rounded, mask=mask)
        value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / H + eps)
    normed = (value * scale).to(dtype).to(tl.float32)
    tl.store(out + row + offset, (gain * normed).to(dtype), mask=mask)


@triton.jit
def silu_mul_kernel(
    gate_up,
    out,
    I: tl.constexpr,  # noqa: E741 (the legend's letter)
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    number = tl.num_programs(0) - 1 - tl.program_id(0)
    STRETCHES: tl.constexpr = (I + BLOCK - 1) // BLOCK
    token = (number // STRETCHES).to(tl.int64)
    offset = number % STRETCHES * BLOCK + tl.arange(0, BLOCK)
    mask = offset < I
    gate = tl.load(gate_up + token * 2 * I + offset, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * 2 * I + I + offset, mask=mask, other=0.0).to(tl.float32)
    dtype = out.dtype.element_ty
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out + token * I + offset, (silu * up).to(dtype), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    check_rows(x)
    assert weight.shape == x.shape[1:] and weight.is_contiguous()
    out = empty_rows(x, *x.shape)
    _launch_norm(x, x, weight, out, out, eps, add=False)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    check_added(x, residual)
    assert weight.shape == residual.shape[1:] and weight.is_contiguous()
    out, total = empty_rows(residual, *residual.shape), torch.empty_like(residual)
    _launch_norm(x, residual, weight, out, total, eps, add=True)
    return out, total


def silu_mul(gate_up: Tensor) -> Tensor:
    check_rows(gate_up)
    num_tokens, width = gate_up.shape
    assert width % 2 == 0
    out = empty_rows(gate_up, num_tokens, width // 2)
    if num_tokens:
        grid = (num_tokens * triton.cdiv(width // 2, _SILU_BLOCK),)
        silu_mul_kernel[grid](gate_up, out, I=width // 2, BLOCK=_SILU_BLOCK, **chip.dependent_launch(gate_up.device))
    return out


def few_warps(block: int) -> int:
    """Of a norm of few tokens of `block` values: a thread has four of each operand, 16 bytes of fp32 planes."""
    return min(max(block // 128, 1), 16)


def check_rows(x: Tensor) -> None:
    assert x.dim() == 2 and x.is_contiguous()
    assert x.dtype in (torch.bfloat16, torch.float16, torch.float32), x.dtype


def check_added(x: Tensor, residual: Tensor) -> None:
    """x: as the residual, or planes of fp32."""
    check_rows(residual)
    planes = x.dim() == 3 and x.dtype == torch.float32 and x.shape[0] > 1
    assert x.is_contiguous() and residual.shape == x.shape[-2:] and (planes or x.dtype == residual.dtype)


def _launch_norm(
    x: Tensor, residual: Tensor, weight: Tensor, out: Tensor, total: Tensor, eps: float, *, add: bool
) -> None:
    num_tokens, width = residual.shape
    if num_tokens:
        block = triton.next_power_of_2(width)
        warps = few_warps(block) if 1 < num_tokens <= FEW_TOKENS else min(max(block // 512, 1), 8)
        rms_norm_kernel[(num_tokens,)](
            x,
            residual,
            weight,
            out,
            total,
            eps,
            H=width,
            BLOCK=block,
            ADD=add,
            PLANES=x.shape[0] if x.dim() == 3 else 0,
            num_warps=warps,
            **chip.dependent_launch(x.device),
        )
