"""Gluon kernel of the products of 2 to 256 rows on sm_90, fed by the bulk copy engine (TMA). Letters: `__init__`.

For few rows a product takes as long as its weights take to arrive, so they should never stop arriving. A program has a
ring of buffers, each with a barrier that counts the bytes of one step: BLOCK_K inputs of its weights and of its rows.
Before it waits for the kernel that makes the rows it asks for the weights of all buffers, so that between two products
of a model's step memory goes on; then for the rows. One thread asks, and a copy takes no registers, addresses or masks:
what lies past an edge arrives as zeros, but for rows that have memory behind them: what is there is fetched, as that is
faster, and nobody looks at what comes out. A buffer is asked for again when the product that reads it is done, which is
when that of the next step has begun.

The weight is the left operand, as the tensor cores want 64 rows of that: out.T is computed, and turned on its way out
through shared memory, from where the copy engine stores it. Inputs that are split over programs, planes, and digits
are as in `matmul.py`. A gated product multiplies the same rows by the weights of gate and of up, and stores
silu(gate) * up.

Scales of weights are loaded before that wait, too, and those of rows before the first product. Where groups of inputs
have scales, a step is of one group, or of a part of it, and has a sum of its own; two of them alternate, so that the
tensor cores work on one while the other is scaled and added up in fp32. The scales of a step's weights are loaded two
steps ahead, those of a program's rows at its beginning, into shared memory.
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
    async_copy,
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
from engine.kernels.gluon_names import fetch, fetch_each, store, view
from engine.kernels.tiles import DIGITS, PLAIN, W8A8, Tile, count_tiles

SHARED = 226 << 10  # bytes of a program's buffers and scales; barriers have the rest of 227 KiB


@gluon.jit
def _fetch_weights(w_desc, w_bufs, up_bufs, bars, slot, n, up_n, k, more, GATED: gl.constexpr, BYTES: gl.constexpr):
    mbarrier.expect(bars.index(slot), BYTES, pred=more)
    fetch(w_desc, [n, k], bars.index(slot), w_bufs.index(slot), pred=more)
    if GATED:
        fetch(w_desc, [up_n, k], bars.index(slot), up_bufs.index(slot), pred=more)


@gluon.jit
def _fetch_rows(x_desc, x_bufs, bars, slot, m, k, more):
    fetch(x_desc, [m, k], bars.index(slot), x_bufs.index(slot), pred=more)


@gluon.jit
def following(slot, phase, STAGES: gl.constexpr):
    """The buffer of the step after, and the phase of its barrier."""
    slot += 1
    phase = gl.where(slot == STAGES, phase ^ 1, phase)
    return gl.where(slot == STAGES, 0, slot), phase


@gluon.jit
def _multiply_step(w_bufs, x_bufs, bars, slot, phase, none):
    """The sum of one step, begun once its weights and rows are there."""
    mbarrier.wait(bars.index(slot), phase)
    rows = x_bufs.index(slot).permute((1, 0))
    return warpgroup_mma(w_bufs.index(slot), rows, none, use_acc=False, is_async=True)


@gluon.jit
def _joined(acc, KIND: gl.constexpr):
    """The sums of a tile in fp32, where they are of digits each pair as one."""
    total = acc.to(gl.float32)
    if KIND == DIGITS:
        high, low = gl.split(gl.reshape(total, [acc.shape[0], acc.shape[1] // 2, 2]))
        total = high + low * (LOW_INT8 if acc.dtype == gl.int32 else LOW_FP8)
    return total


@gluon.jit
def _load_scales(w_scale, n, group, N, num_groups):
    """Of one group of the inputs of n; zeros past the edges."""
    return gl.load(w_scale + n * num_groups + group, mask=(n < N) & (group < num_groups), other=0.0)


@gluon.jit
def _add_scaled(acc, part, w_scales, x_scales, KIND: gl.constexpr):
    """acc[BLOCK_N, ROWS] += a step's sum * its scales. Of digits: in units of the low one in INT8, where the sum of up
    to 512 inputs is exact, else of the high one.
    """
    if KIND == DIGITS:
        high, low = gl.split(gl.reshape(part, [acc.shape[0], acc.shape[1], 2]))
        value = (high * 254 + low).to(gl.float32) if part.dtype == gl.int32 else high + low * LOW_FP8
        acc += value * w_scales[:, None]
    else:
        acc += part.to(gl.float32) * (w_scales[:, None] * x_scales[None, :])
    return acc


@gluon.jit(do_not_specialize=["R", "num_groups", "num_splits"])
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
    num_groups,
    num_splits,
    KIND: gl.constexpr,
    GROUP: gl.constexpr,
    ROOM: gl.constexpr,
    GATED: gl.constexpr,
    BIAS: gl.constexpr,
    PLANES: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    WARPS: gl.constexpr,
    PDL: gl.constexpr,
):
    # R is x's rows, two for each of out where they are digits. N is out's columns. ROOM: groups that a program's rows
    # have scales of. Programs of the same weights are neighbours.
    if PDL:
        gdc_launch_dependents()
    BITS: gl.constexpr = x_desc.dtype.primitive_bitwidth
    BYTES: gl.constexpr = BLOCK_K * (BLOCK_N * (2 if GATED else 1) + BLOCK_M) * BITS // 8
    num_m = gl.cdiv(R, BLOCK_M)
    tile, split = gl.program_id(0), gl.program_id(1)
    first_m, first_n = (tile % num_m) * BLOCK_M, (tile // num_m) * BLOCK_N
    PAIR: gl.constexpr = 2 if GROUP else 1  # with groups an even number of steps, the last perhaps of zeros
    num_steps = gl.cdiv(gl.cdiv(K, BLOCK_K), PAIR) * PAIR
    per_split = gl.cdiv(num_steps, num_splits * PAIR) * PAIR
    first_k = split * per_split * BLOCK_K
    count = gl.minimum(per_split, num_steps - split * per_split)  # 0 or less: a part of no inputs
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
    ROWS: gl.constexpr = BLOCK_M // 2 if KIND == DIGITS else BLOCK_M
    ALONG_N: gl.constexpr = WARPS if BLOCK_N >= 16 * WARPS else BLOCK_N // 16  # warps; the others take other rows
    N_MOST: gl.constexpr = 128 if x_desc.dtype == gl.int8 else 256
    N_EACH: gl.constexpr = min(BLOCK_M // (WARPS // ALONG_N), N_MOST)
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0],
        warps_per_cta=[ALONG_N, WARPS // ALONG_N],
        instr_shape=[16, N_EACH, 256 // BITS],
    )
    none = gl.zeros([BLOCK_N, BLOCK_M], gl.int32 if x_desc.dtype == gl.int8 else gl.float32, MMA)
    total = none.to(gl.float32)
    if KIND == DIGITS:
        total, _ = gl.split(gl.reshape(total, [BLOCK_N, ROWS, 2]))
    LAYOUT: gl.constexpr = total.type.layout
    ALONG: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    ACROSS: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    n = first_n + gl.arange(0, BLOCK_N, ALONG)
    if GROUP:
        first_group = first_k // GROUP
        even_scales = _load_scales(w_scale, n, first_group, N, num_groups)
        odd_scales = _load_scales(w_scale, n, (first_k + BLOCK_K) // GROUP, N, num_groups)
    elif KIND != PLAIN:
        scales = gl.load(w_scale + n, mask=n < N, other=0.0)
        if GATED:
            up_scales = gl.load(w_scale + N + n, mask=n < N, other=0.0)
    if PDL:
        gdc_wait()
    for i in gl.static_range(STAGES):
        _fetch_rows(x_desc, x_bufs, bars, i, first_m, first_k + i * BLOCK_K, i < count)
    if KIND == DIGITS or (KIND == W8A8 and not GROUP):
        m = first_m * ROWS // BLOCK_M + gl.arange(0, ROWS, ACROSS)
        factors = gl.load(x_scale + m, mask=m < R * ROWS // BLOCK_M, other=0.0)
        if GROUP and x_desc.dtype == gl.int8:
            factors *= LOW_INT8

    slot, phase = 0, 0
    if GROUP:
        TURNED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
        pieces = gl.allocate_shared_memory(gl.float32, [ROOM // 16, 16, BLOCK_M], TURNED)
        x_scales = view(pieces, gl.float32, [ROOM, BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        if KIND == W8A8:
            EACH: gl.constexpr = gl.BlockedLayout([1, 1], [16, 2], [1, WARPS], [0, 1])
            row = first_m + gl.arange(0, BLOCK_M, gl.SliceLayout(0, EACH))[None, :]
            for i in gl.static_range(ROOM // 16):
                group = first_group + 16 * i + gl.arange(0, 16, gl.SliceLayout(1, EACH))[:, None]
                exists = (row < R) & (group < num_groups)
                fetch_each(pieces.index(i), x_scale + row * num_groups + group, exists)
            async_copy.commit_group()
        for i in range(0, count, 2):
            k, done = first_k + i * BLOCK_K, slot
            even = _multiply_step(w_bufs, x_bufs, bars, slot, phase, none)
            slot, phase = following(slot, phase, STAGES)
            odd = _multiply_step(w_bufs, x_bufs, bars, slot, phase, none)
            part = warpgroup_mma_wait(1, deps=[even])
            more, ahead = i + STAGES < count, k + STAGES * BLOCK_K
            _fetch_weights(w_desc, w_bufs, up_bufs, bars, done, first_n, 0, ahead, more, GATED, BYTES)
            _fetch_rows(x_desc, x_bufs, bars, done, first_m, ahead, more)
            if KIND == W8A8:
                async_copy.wait_group(0)  # the first time
            total = _add_scaled(total, part, even_scales, x_scales.index(k // GROUP - first_group).load(ACROSS), KIND)
            k += BLOCK_K
            even_scales = _load_scales(w_scale, n, (k + BLOCK_K) // GROUP, N, num_groups)
            part = warpgroup_mma_wait(0, deps=[odd])
            more, ahead = i + 1 + STAGES < count, ahead + BLOCK_K
            _fetch_weights(w_desc, w_bufs, up_bufs, bars, slot, first_n, 0, ahead, more, GATED, BYTES)
            _fetch_rows(x_desc, x_bufs, bars, slot, first_m, ahead, more)
            total = _add_scaled(total, part, odd_scales, x_scales.index(k // GROUP - first_group).load(ACROSS), KIND)
            odd_scales = _load_scales(w_scale, n, (k + 2 * BLOCK_K) // GROUP, N, num_groups)
            slot, phase = following(slot, phase, STAGES)
    else:
        acc = none
        up = acc
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
            slot, phase = following(slot, phase, STAGES)
        acc, up = warpgroup_mma_wait(0, deps=[acc, up])
        total, total_up = _joined(acc, KIND), _joined(up, KIND)
    if KIND != PLAIN and not GROUP:
        total *= scales[:, None]
    if KIND == DIGITS or (KIND == W8A8 and not GROUP):
        total *= factors[None, :]
    if PLANES:
        m, M = first_m * ROWS // BLOCK_M + gl.arange(0, ROWS, ACROSS), R * ROWS // BLOCK_M
        place = partial + split.to(gl.int64) * M * N + m[None, :] * N + n[:, None]
        gl.store(place, total, mask=(m < M)[None, :] & (n < N)[:, None])
    else:
        last = num_splits == 1
        if num_splits > 1:
            SIZE: gl.constexpr = BLOCK_N * ROWS
            inside = gl.arange(0, BLOCK_N, ALONG)[:, None] * ROWS + gl.arange(0, ROWS, ACROSS)[None, :]
            place = partial + (tile * num_splits).to(gl.int64) * SIZE + inside
            gl.store(place + split * SIZE, total)
            debug_barrier()  # every thread's part is stored before one of them says so
            last = gl.atomic_add(counters + tile, 1, sem="acq_rel") == num_splits - 1
            if last:
                gl.store(counters + tile, 0)  # as the next product expects it
                total = gl.zeros([BLOCK_N, ROWS], gl.float32, LAYOUT)
                for i in range(num_splits):
                    total += gl.load(place + i * SIZE, cache_modifier=".cg")
        if last:
            if BIAS:
                total += gl.load(bias + n, mask=n < N, other=0.0).to(gl.float32)[:, None]
            result = total.to(out_desc.dtype)
            if GATED:  # rounded where the separate operations round
                if KIND != PLAIN:
                    total_up = total_up * up_scales[:, None] * factors[None, :]
                gate = result.to(gl.float32)
                silu = (gate / (1.0 + gl.exp(-gate))).to(out_desc.dtype).to(gl.float32)
                result = (silu * total_up.to(out_desc.dtype).to(gl.float32)).to(out_desc.dtype)
            turned = gl.allocate_shared_memory(out_desc.dtype, [ROWS, BLOCK_N], out_desc.layout)
            turned.permute((1, 0)).store(result)
            fence_async_shared()
            store(out_desc, [first_m * ROWS // BLOCK_M, first_n], turned)
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
    group_size: int,
    num_splits: int,
    counters: Tensor,
    *,
    gated: bool = False,
) -> None:
    """As `matmul.multiply`, which has chosen the tile. gated: w[2N, K] is gate | up, out[M, N] is silu(gate) * up. out:
    with one dimension more, a plane for each split.
    """
    (rows, depth), width, planes = x.shape, out.shape[-1], out.dim() == 3
    block_m, block_n, block_k = tile.block_m, tile.block_n, min(tile.block_k, group_size or tile.block_k)
    out_rows = block_m // 2 if kind == DIGITS.value else block_m
    num_tiles = count_tiles(rows, width, block_m, block_n)
    parts = num_tiles * num_splits * out_rows * block_n if num_splits > 1 and not planes else 0
    room, num_stages = 16, tile.num_stages
    if group_size and kind == W8A8.value:
        inputs = triton.cdiv(depth, 2 * block_k * num_splits) * 2 * block_k  # of a program
        room = triton.cdiv(triton.cdiv(inputs, group_size) + (block_k < group_size), 16) * 16
        num_stages = min(num_stages, (SHARED - 4 * room * block_m) // (x.itemsize * (block_m + block_n) * block_k))
    hopper_matmul_kernel[(num_tiles, num_splits)](
        descriptor(x, block_m, block_k, height_of(x, block_m)),
        descriptor(w, block_n, block_k),
        descriptor(x if planes else out, out_rows, block_n),
        x if x_scale is None else x_scale,
        x if scale is None else scale,
        x if bias is None else bias,
        out if planes else x.new_empty(parts, dtype=torch.float32),
        counters,
        rows,
        width,
        depth,
        1 if scale is None else scale.shape[1],
        num_splits,
        KIND=kind,
        GROUP=group_size,
        ROOM=room,
        GATED=gated,
        BIAS=bias is not None,
        PLANES=planes,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        STAGES=num_stages,
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


def height_of(x: Tensor, block_m: int) -> int:
    """Rows of whole tiles, as far as there is memory behind x: see `tiles.empty_rows`."""
    behind = x.untyped_storage().nbytes() // x.itemsize - x.storage_offset()
    return min(-(-x.shape[0] // block_m) * block_m, behind // x.shape[1])


def descriptor(matrix: Tensor, rows: int, columns: int, height: int = 0) -> TensorDescriptor:
    """Of blocks of a contiguous matrix, of `height` rows where that is given."""
    shape, strides = [height or matrix.shape[0], matrix.shape[1]], [matrix.shape[1], 1]
    return TensorDescriptor(matrix, shape, strides, [rows, columns], _layout(rows, columns, matrix.dtype))
