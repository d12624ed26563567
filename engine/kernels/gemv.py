"""Triton kernel of the product of one row: a stream of weights, each widened and multiplied once. Letters: `__init__`.

A program holds the row in fp32 registers and walks tiles of BLOCK_N weight rows, the next tile loaded before the
present one is used, and the first before the row is there (it is the previous kernel's, the weights are not). A weight
row is cut into PARTS of SPAN inputs: the groups that share a scale, or what one thread loads at once.

GATED: the weight is gate | up, a tile is some rows of gate and the same of up, and the output silu(gate) * up, rounded
where `silu_mul` of the product would be.
"""

# Triton is untyped: a jitted function has no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine.kernels import chip
from engine.kernels.convert import codes, widen

# On an H200, for each matrix of Qwen3-1.7B, the best or within 3 % of it, in 8 and 16 bits.
TILE = 4096  # weights of a program's tile; half of what the row takes in registers at 8,192 inputs
PROGRAMS = 6  # of one multiprocessor


@triton.jit
def _load(w, row, k, exists, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Weights [BLOCK_N, PARTS, SPAN] of these rows; zeros past K, or where the tile does not exist."""
    place = w + row.to(tl.int64)[:, None, None] * K + k[None, :, :]
    if K != BLOCK_K:
        exists = (k < K)[None, :, :] & exists
    return tl.load(place, mask=exists, other=0.0, eviction_policy="evict_first")


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
    GATED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPAN: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    PARTS: tl.constexpr = BLOCK_K // SPAN
    OUTPUTS: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    part = tl.arange(0, PARTS)
    k = part[:, None] * SPAN + tl.arange(0, SPAN)[None, :]  # [PARTS, SPAN]
    r = tl.arange(0, BLOCK_N)
    inside, half = r % OUTPUTS, r // OUTPUTS
    tile, step, num_tiles = tl.program_id(0), tl.num_programs(0), tl.cdiv(N, OUTPUTS)
    # Past the end of N the last row is read again, and not stored.
    ahead = tl.minimum(tile * OUTPUTS + inside, N - 1) + half * N
    following = _load(w, ahead, k, True, K, BLOCK_K)
    if PDL:
        gdc_wait()
    value = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
    while tile < num_tiles:
        row, stored = ahead, following
        ahead = tl.minimum((tile + step) * OUTPUTS + inside, N - 1) + half * N
        following = _load(w, ahead, k, tile + step < num_tiles, K, BLOCK_K)
        sums = tl.sum(widen(stored, tl.float32) * value[None, :, :], axis=2)  # [BLOCK_N, PARTS]
        if GROUP != 0:
            scales = w_scale + row.to(tl.int64)[:, None] * num_groups + part[None, :]
            sums *= tl.load(scales, mask=part[None, :] < num_groups, other=0.0)
        total = tl.sum(sums, axis=1)
        if SCALED and GROUP == 0:
            total *= tl.load(w_scale + row)
        if BIAS:
            total += tl.load(bias + row).to(tl.float32)
        total = total.to(out.dtype.element_ty)
        n = tile * OUTPUTS + tl.arange(0, OUTPUTS)
        if GATED:
            gate, up = tl.split(tl.trans(tl.reshape(total.to(tl.float32), (2, OUTPUTS))))
            total = ((gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32) * up).to(total.dtype)
        tl.store(out + n, total, mask=n < N)
        tile += step


def gemv(
    x: Tensor,
    w: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    group_size: int = 0,
    *,
    gated: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """x[1, K] @ w[N, K].T -> [1, N]: `linear` where scale is None, else `weight_only_matmul`; gated: `silu_mul` of it,
    [1, N / 2].
    """
    width, depth = w.shape
    assert x.shape == (1, depth) and x.is_contiguous() and w.is_contiguous()
    block_k = triton.next_power_of_2(depth)
    block_n = max(TILE // block_k, 1)
    if gated:
        assert width % 2 == 0
        width, block_n = width // 2, 2 * block_n
    if out is None:
        out = x.new_empty(1, width)
    tiles = triton.cdiv(width, block_n // 2 if gated else block_n)
    gemv_kernel[(min(tiles, PROGRAMS * chip.num_sms(x.device)),)](
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
        GATED=gated,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        SPAN=min(group_size or 16 // w.itemsize, block_k),
        num_warps=max(4, block_k // 2048),
        **chip.dependent_launch(x.device),
    )
    return out
