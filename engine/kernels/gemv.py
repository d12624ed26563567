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

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine.kernels import chip, tuned
from engine.kernels.convert import codes, widen

# Weights of a program's tile, warps and, where it walks several tiles, programs of one multiprocessor (0: one tile
# a program), by bytes of a weight: near the best for the chain of Qwen3-1.7B's matrices on an H200.
TILES = {2: (4096, 4, 4), 4: (4096, 4, 4), 1: (4096, 4, 0)}


@triton.jit
def _load(w_tile, k, exists, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Weights [BLOCK_N, PARTS, SPAN]; zeros past K, or where the tile does not exist. exists: [1, 1, 1], as the
    interpreter of Triton 3.9 makes integers, which are no mask, of a scalar that meets a mask.
    """
    if K != BLOCK_K:
        exists = (k < K)[None, :, :] & exists
    return tl.load(w_tile, mask=exists, other=0.0, eviction_policy="evict_first")


@triton.jit
def _finish(
    stored,  # [BLOCK_N, PARTS, SPAN]
    value,  # [PARTS, SPAN]
    row,  # [BLOCK_N] of the weight
    tile,
    w_scale,
    bias,
    out,
    N,
    num_groups,
    SCALED: tl.constexpr,
    GROUP: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    sums = tl.sum(widen(stored, tl.float32) * value[None, :, :], axis=2)  # [BLOCK_N, PARTS]
    if GROUP != 0:
        part = tl.arange(0, sums.shape[1])
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


@triton.jit
def gemv_kernel(
    x,
    x_scale,
    w,
    w_scale,
    bias,
    out,
    N,
    num_groups,
    K: tl.constexpr,
    SCALED: tl.constexpr,
    X_SCALED: tl.constexpr,
    GROUP: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    WALK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPAN: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    PARTS: tl.constexpr = BLOCK_K // SPAN
    OUTPUTS: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    k = tl.arange(0, PARTS)[:, None] * SPAN + tl.arange(0, SPAN)[None, :]  # [PARTS, SPAN]
    r = tl.arange(0, BLOCK_N)
    first = r % OUTPUTS + r // OUTPUTS * N  # rows of tile 0
    tile = tl.program_id(0)
    # The addresses of a tile are those of tile 0 and one number: Triton would exchange advancing ones between threads.
    ADVANCE: tl.constexpr = OUTPUTS * K if WALK else 0
    row = first
    if not WALK:  # past the end of N the last row is read again, and not stored
        row = tl.minimum(tile * OUTPUTS + r % OUTPUTS, N - 1) + r // OUTPUTS * N
    w_tile = w + row.to(tl.int64)[:, None, None] * K + k[None, :, :]
    following = _load(w_tile + tile.to(tl.int64) * ADVANCE, k, tl.full((1, 1, 1), True, tl.int1), K, BLOCK_K)
    if PDL:
        gdc_wait()
    value = widen(tl.load(x + k, mask=k < K, other=0.0), tl.float32)
    if X_SCALED:
        part = tl.arange(0, PARTS)
        value *= tl.load(x_scale + part, mask=part < num_groups, other=0.0)[:, None]
    if WALK:
        step, num_tiles = tl.num_programs(0), N // OUTPUTS
        while tile < num_tiles:
            stored = following
            exists = tl.full((1, 1, 1), tile + step, tl.int32) < num_tiles
            following = _load(w_tile + (tile + step).to(tl.int64) * ADVANCE, k, exists, K, BLOCK_K)
            row = first + tile * OUTPUTS
            _finish(
                stored, value, row, tile, w_scale, bias, out, N, num_groups, SCALED, GROUP, BIAS, GATED, OUTPUTS,
            )  # fmt: skip
            tile += step
    else:
        _finish(
            following, value, row, tile, w_scale, bias, out, N, num_groups, SCALED, GROUP, BIAS, GATED, OUTPUTS,
        )  # fmt: skip


def gemv(
    x: Tensor,
    w: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    group_size: int = 0,
    *,
    gated: bool = False,
    out: Tensor | None = None,
    x_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x[1, K] @ w[N, K].T -> [1, N]: `linear` where scale is None, else `weight_only_matmul`, or, with an x_scale of
    each group and the dtype of what comes out, `w8a8_matmul`; gated: `silu_mul` of it, [1, N / 2].
    """
    width, depth = w.shape
    assert x.shape == (1, depth) and x.is_contiguous() and w.is_contiguous()
    assert x_scale is None or group_size
    found = tuned.choices(x.device).get(tuned.gemv_key(w.itemsize, width, depth, group_size=group_size))
    size, num_warps, programs = found or TILES[w.itemsize]
    block_k = triton.next_power_of_2(depth)
    outputs = max(size // block_k, 1)
    if gated:
        assert width % 2 == 0
        width //= 2
    if out is None:
        out = x.new_empty(1, width, dtype=dtype)
    tiles, most = triton.cdiv(width, outputs), programs * chip.num_sms(x.device)
    walk = width % outputs == 0 and 0 < most < tiles
    gemv_kernel[(most if walk else tiles,)](
        codes(x),
        x if x_scale is None else x_scale,
        codes(w),
        x if scale is None else scale,
        x if bias is None else bias,
        out,
        width,
        1 if scale is None else scale.shape[1],
        K=depth,
        SCALED=scale is not None,
        X_SCALED=x_scale is not None,
        GROUP=group_size,
        BIAS=bias is not None,
        GATED=gated,
        WALK=walk,
        BLOCK_N=2 * outputs if gated else outputs,
        BLOCK_K=block_k,
        SPAN=min(group_size or 16 // w.itemsize, block_k),
        num_warps=max(num_warps, block_k // 2048),
        **chip.dependent_launch(x.device),
    )
    return out
