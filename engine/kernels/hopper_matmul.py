"""Gluon kernel of the products of 2 to 256 rows on sm_90, fed by the bulk copy engine (TMA). Letters: `__init__`.

For few rows a product takes as long as its weights take to arrive, so they should never stop arriving. A program has a
ring of buffers, each with a barrier that counts the bytes of one step: BLOCK_K inputs of its weights and of its rows.
Before it waits for the kernel that makes the rows it asks for the weights of all buffers, so that between two products
of a model's step memory goes on; then for the rows. One thread asks, and a copy takes no registers, addresses or masks:
what lies past an edge arrives as zeros. A buffer is asked for again when the product that reads it is done, which is
when that of the next step has begun.

The weight is the left operand, as the tensor cores want 64 rows of that: out.T is computed, and turned on its way out
through shared memory, from where the copy engine stores it. Inputs that are split over programs, and digits, are as in
`matmul.py`. A gated product multiplies the same rows by the weights of gate and of up, and stores silu(gate) * up.
"""

# Gluon is untyped: a jitted function has no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language import debug_barrier
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine.kernels import chip
from engine.kernels.convert import LOW_FP8, LOW_INT8
from engine.kernels.tiles import DIGITS, PLAIN, Tile


@gluon.jit
def _fetch_weights(w_desc, w_bufs, up_bufs, bars, slot, n, up_n, k, more, GATED: gl.constexpr, BYTES: gl.constexpr):
    mbarrier.expect(bars.index(slot), BYTES, pred=more)
    tma.async_copy_global_to_shared(w_desc, [n, k], bars.index(slot), w_bufs.index(slot), pred=more)
    if GATED:
        tma.async_copy_global_to_shared(w_desc, [up_n, k], bars.index(slot), up_bufs.index(slot), pred=more)


@gluon.jit
def _fetch_rows(x_desc, x_bufs, bars, slot, m, k, more):
    tma.async_copy_global_to_shared(x_desc, [m, k], bars.index(slot), x_bufs.index(slot), pred=more)


@gluon.jit(do_not_specialize=["R", "num_splits"])
def hopper_matmul_kernel(
    x_desc,
    w_desc,
    out_desc,
    x_scale,
    w_scale,
    bias,
    partial,
    counters,
    R,
    N,
    K,
    num_splits,
    KIND: gl.constexpr,
    GATED: gl.constexpr,
    BIAS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    WARPS: gl.constexpr,
    PDL: gl.constexpr,
):
    # R is x's rows, two for each of out where they are digits. N is out's columns. Programs of the same weights are
    # neighbours.
    if PDL:
        gdc_launch_dependents()
    BITS: gl.constexpr = x_desc.dtype.primitive_bitwidth
    BYTES: gl.constexpr = BLOCK_K * (BLOCK_N * (2 if GATED else 1) + BLOCK_M) * BITS // 8
    num_m = gl.cdiv(R, BLOCK_M)
    tile, split = gl.program_id(0), gl.program_id(1)
    first_m, first_n = (tile % num_m) * BLOCK_M, (tile // num_m) * BLOCK_N
    per_split = gl.cdiv(gl.cdiv(K, BLOCK_K), num_splits)
    first_k = split * per_split * BLOCK_K
    count = gl.minimum(per_split, gl.cdiv(K - first_k, BLOCK_K))  # 0 or less: a part of no inputs
    w_bufs = gl.allocate_shared_memory(w_desc.dtype, [STAGES, BLOCK_N, BLOCK_K], w_desc.layout)
    up_bufs = w_bufs
    if GATED:
        up_bufs = gl.allocate_shared_memory(w_desc.dtype, [STAGES, BLOCK_N, BLOCK_K], w_desc.layout)
    x_bufs = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BLOCK_M, BLOCK_K], x_desc.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(bars.index(i), count=1)
    fence_async_shared()
    for i in gl.static_range(STAGES):
        k = first_k + i * BLOCK_K
        _fetch_weights(w_desc, w_bufs, up_bufs, bars, i, first_n, N + first_n, k, i < count, GATED, BYTES)
    if PDL:
        gdc_wait()
    for i in gl.static_range(STAGES):
        _fetch_rows(x_desc, x_bufs, bars, i, first_m, first_k + i * BLOCK_K, i < count)

    ALONG_N: gl.constexpr = WARPS if BLOCK_N >= 16 * WARPS else BLOCK_N // 16  # warps; the others take other rows
    N_MOST: gl.constexpr = 128 if x_desc.dtype == gl.int8 else 256
    N_EACH: gl.constexpr = min(BLOCK_M // (WARPS // ALONG_N), N_MOST)
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0],
        warps_per_cta=[ALONG_N, WARPS // ALONG_N],
        instr_shape=[16, N_EACH, 256 // BITS],
    )
    acc = gl.zeros([BLOCK_N, BLOCK_M], gl.int32 if x_desc.dtype == gl.int8 else gl.float32, MMA)
    up = acc
    slot, phase = 0, 0
    for i in range(0, count):
        mbarrier.wait(bars.index(slot), phase)
        rows = x_bufs.index(slot).permute((1, 0))
        running = warpgroup_mma(w_bufs.index(slot), rows, acc, is_async=True)
        if GATED:
            running_up = warpgroup_mma(up_bufs.index(slot), rows, up, is_async=True)
            acc, up = warpgroup_mma_wait(2, deps=[running, running_up])
        else:
            acc = warpgroup_mma_wait(1, deps=[running])
        # The product of the step before is done: its buffer is free.
        done, k = gl.where(slot == 0, STAGES, slot) - 1, first_k + (i - 1 + STAGES) * BLOCK_K
        more = (i > 0) & (i - 1 + STAGES < count)
        _fetch_weights(w_desc, w_bufs, up_bufs, bars, done, first_n, N + first_n, k, more, GATED, BYTES)
        _fetch_rows(x_desc, x_bufs, bars, done, first_m, k, more)
        slot += 1
        phase = gl.where(slot == STAGES, phase ^ 1, phase)
        slot = gl.where(slot == STAGES, 0, slot)
    acc, up = warpgroup_mma_wait(0, deps=[acc, up])

    total = acc.to(gl.float32)
    ROWS: gl.constexpr = BLOCK_M // 2 if KIND == DIGITS else BLOCK_M
    if KIND == DIGITS:
        high, low = gl.split(gl.reshape(total, [BLOCK_N, ROWS, 2]))
        total = high + low * (LOW_INT8 if x_desc.dtype == gl.int8 else LOW_FP8)
        first_m, R = first_m // 2, R // 2
    LAYOUT: gl.constexpr = total.type.layout
    inside_n, inside_m = gl.arange(0, BLOCK_N, gl.SliceLayout(1, LAYOUT)), gl.arange(0, ROWS, gl.SliceLayout(0, LAYOUT))
    last = num_splits == 1
    if num_splits > 1:
        SIZE: gl.constexpr = BLOCK_N * ROWS
        place = partial + (tile * num_splits).to(gl.int64) * SIZE + inside_n[:, None] * ROWS + inside_m[None, :]
        gl.store(place + split * SIZE, total)
        debug_barrier()  # every thread's part is stored before one of them says so
        last = gl.atomic_add(counters + tile, 1, sem="acq_rel") == num_splits - 1
        if last:
            gl.store(counters + tile, 0)  # as the next product expects it
            total = gl.zeros([BLOCK_N, ROWS], gl.float32, LAYOUT)
            for i in range(num_splits):
                total += gl.load(place + i * SIZE, cache_modifier=".cg")
    if last:
        n, m = first_n + inside_n, first_m + inside_m
        if KIND != PLAIN:
            total *= gl.load(w_scale + n, mask=n < N, other=0.0)[:, None]
            total *= gl.load(x_scale + m, mask=m < R, other=0.0)[None, :]
        if BIAS:
            total += gl.load(bias + n, mask=n < N, other=0.0).to(gl.float32)[:, None]
        result = total.to(out_desc.dtype)
        if GATED:  # rounded where the separate operations round
            gate = result.to(gl.float32)
            silu = (gate / (1.0 + gl.exp(-gate))).to(out_desc.dtype).to(gl.float32)
            result = (silu * up.to(out_desc.dtype).to(gl.float32)).to(out_desc.dtype)
        turned = gl.allocate_shared_memory(out_desc.dtype, [ROWS, BLOCK_N], out_desc.layout)
        turned.permute((1, 0)).store(result)
        fence_async_shared()
        tma.async_copy_shared_to_global(out_desc, [first_m, first_n], turned)
        tma.store_wait(0)


def launch(
    x: Tensor,
    x_scale: Tensor | None,
    w: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    kind: int,
    tile: Tile,
    num_splits: int,
    counters: Tensor,
    *,
    gated: bool = False,
) -> None:
    """As `matmul.multiply`, which has chosen the tile. gated: w[2N, K] is gate | up, out[M, N] is silu(gate) * up."""
    (rows, depth), width = x.shape, out.shape[1]
    block_m, block_n, block_k = tile.block_m, tile.block_n, tile.block_k
    out_rows = block_m // 2 if kind == DIGITS.value else block_m
    num_tiles = triton.cdiv(rows, block_m) * triton.cdiv(width, block_n)
    parts = num_tiles * num_splits * out_rows * block_n if num_splits > 1 else 0
    hopper_matmul_kernel[(num_tiles, num_splits)](
        _descriptor(x, block_m, block_k),
        _descriptor(w, block_n, block_k),
        _descriptor(out, out_rows, block_n),
        x if x_scale is None else x_scale,
        x if scale is None else scale,
        x if bias is None else bias,
        x.new_empty(parts, dtype=torch.float32),
        counters,
        rows,
        width,
        depth,
        num_splits,
        KIND=kind,
        GATED=gated,
        BIAS=bias is not None,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        STAGES=tile.num_stages,
        WARPS=tile.num_warps,
        num_warps=tile.num_warps,
        **chip.dependent_launch(x.device),
    )


_TYPES = {
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.int8: gl.int8,
    torch.float8_e4m3fn: gl.float8e4nv,
}


@cache
def _layout(rows: int, columns: int, dtype: torch.dtype) -> Any:
    return gl.NVMMASharedLayout.get_default_for([rows, columns], _TYPES[dtype])


def _descriptor(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Of blocks of a contiguous matrix."""
    shape, strides = [*matrix.shape], [matrix.shape[1], 1]
    return TensorDescriptor(matrix, shape, strides, [rows, columns], _layout(rows, columns, matrix.dtype))
