"""Triton kernel of the product of one row: a stream of weights, each widened and multiplied once. Letters: `__init__`.

A program owns BLOCK_N outputs and walks all their inputs in stretches of BLOCK_K, the next one loaded before the
present one is used. A stretch is cut into PARTS of SPAN inputs: the groups that share a scale, or what one thread loads
at once. Each part is summed, and scaled where it is a group; the parts are added up at the end.
"""

# Triton is untyped: a jitted function has no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine.kernels import chip
from engine.kernels.convert import codes, widen


@dataclass(frozen=True)
class Stretch:
    """What one program loads at a time: block_n outputs of block_k inputs."""

    block_n: int
    block_k: int
    num_warps: int


STRETCH = Stretch(2, 2048, 4)  # the best or within 3 % of it for each matrix of Qwen3-1.7B on an H200, 8 and 16 bits
_LEAST_K = 512


@triton.jit
def gemv_kernel(
    x,
    w,
    w_scale,
    bias,
    out,
    N,
    num_groups,
    K: tl.constexpr,
    SCALED: tl.constexpr,
    GROUP: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPAN: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    PARTS: tl.constexpr = BLOCK_K // SPAN
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, N - 1)  # past the end: read the last row again, store nothing
    part = tl.arange(0, PARTS)
    k = part[:, None] * SPAN + tl.arange(0, SPAN)[None, :]  # [PARTS, SPAN]
    w_tile = w + row.to(tl.int64)[:, None, None] * K + k[None, :, :]  # [BLOCK_N, PARTS, SPAN]
    EVEN: tl.constexpr = K % BLOCK_K == 0
    if EVEN:
        following = tl.load(w_tile, eviction_policy="evict_first")
    else:
        following = tl.load(w_tile, mask=(k < K)[None, :, :], other=0.0, eviction_policy="evict_first")
    if PDL:
        gdc_wait()
    acc = tl.zeros((BLOCK_N, PARTS), tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        stored = following
        if EVEN:
            x_part = tl.load(x + start + k)
            if start + BLOCK_K < K:
                following = tl.load(w_tile + start + BLOCK_K, eviction_policy="evict_first")
        else:
            x_part = tl.load(x + start + k, mask=start + k < K, other=0.0)
            if start + BLOCK_K < K:
                following = tl.load(
                    w_tile + start + BLOCK_K,
                    mask=(start + BLOCK_K + k < K)[None, :, :],
                    other=0.0,
                    eviction_policy="evict_first",
                )
        product = widen(stored, tl.float32) * x_part.to(tl.float32)[None, :, :]
        sums = tl.sum(product, axis=2)  # [BLOCK_N, PARTS]
        if GROUP != 0:
            group = start // GROUP + part
            places = w_scale + row.to(tl.int64)[:, None] * num_groups + group[None, :]
            sums *= tl.load(places, mask=group[None, :] < num_groups, other=0.0)
        acc += sums
    total = tl.sum(acc, axis=1)
    if SCALED and GROUP == 0:
        total *= tl.load(w_scale + row)
    if BIAS:
        total += tl.load(bias + row).to(tl.float32)
    tl.store(out + n, total.to(out.dtype.element_ty), mask=n < N)


def choose_stretch(depth: int) -> Stretch:
    """The largest stretch that divides the inputs, with more outputs where it is shorter; else one that is masked."""
    block_k = STRETCH.block_k
    while depth % block_k and block_k > _LEAST_K:
        block_k //= 2
    if depth % block_k:
        block_k = min(STRETCH.block_k // 2, triton.next_power_of_2(depth))
    return Stretch(STRETCH.block_n * STRETCH.block_k // block_k, block_k, STRETCH.num_warps)


def gemv(
    x: Tensor,
    w: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    group_size: int = 0,
    stretch: Stretch | None = None,
) -> Tensor:
    """x[1, K] @ w[N, K].T -> [1, N]: `linear` where scale is None, else `weight_only_matmul`."""
    width, depth = w.shape
    assert x.shape == (1, depth) and x.is_contiguous() and w.is_contiguous()
    stretch = stretch or choose_stretch(depth)
    out = x.new_empty(1, width)
    gemv_kernel[(triton.cdiv(width, stretch.block_n),)](
        x,
        codes(w),
        x if scale is None else scale,
        x if bias is None else bias,
        out,
        width,
        1 if scale is None else scale.shape[1],
        K=depth,
        SCALED=scale is not None,
        GROUP=group_size,
        BIAS=bias is not None,
        BLOCK_N=stretch.block_n,
        BLOCK_K=stretch.block_k,
        SPAN=min(group_size or 16 // w.itemsize, stretch.block_k),
        num_warps=stretch.num_warps,
        **chip.dependent_launch(x.device),
    )
    return out
