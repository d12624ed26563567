"""Gluon kernel of gate and up of many tokens with silu in its end, in 16 bits, on sm_90. Letters as in `__init__`.

The library writes 2I values a token and silu reads them, almost a third of what a layer of prefill moves through
memory. Here out[M, I] = silu(x @ gate.T) * (x @ up.T) leaves the program that multiplies.

One program an SM walks tiles of 64 GROUPS tokens by _WIDTH columns. A warp fetches x and both weights, as far ahead as
there are buffers, also past the end of a tile. GROUPS groups of four warps multiply 64 tokens each by the rows of gate
and of up side by side, as one product of 2 _WIDTH columns: a thread then has gate and up of the same column. A group
can be ahead of the others by as many steps as there are buffers, and then takes its exponentials while they multiply.

Three groups fetch least for what they multiply, 192 + 256 rows for 192 x 256 sums; two leave less of the last tiles of
some batches empty. What a tile has past an edge is fetched as zeros, or as another's, and is not stored. Tiles go in
bands of tokens, so that those which run together share rows and weights in L2.
"""

# Gluon is untyped: a jitted function has no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

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
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine.kernels import chip
from engine.kernels.hopper_matmul import descriptor, following
from engine.kernels.tiles import GATED_ROWS, GATED_WIDTH

_ROWS = gl.constexpr(GATED_ROWS)
_WIDTH = gl.constexpr(GATED_WIDTH)
_DEPTH = gl.constexpr(64)  # inputs of one buffer: the 128 bytes of one swizzle
_BANDS = {2: 16, 3: 22}  # tiles of tokens in a band, by the number of groups


@gluon.jit
def _place(tile, num_m, num_n, BAND: gl.constexpr):
    """Which tokens and which columns the tile of this number has, in tiles."""
    band = tile // (BAND * num_n)
    inside = tile - band * BAND * num_n
    height = gl.minimum(num_m - band * BAND, BAND)
    return band * BAND + inside % height, inside // height


@gluon.jit
def _fetch(
    x_desc,
    w_desc,
    x_bufs,
    w_pieces,
    barriers,
    sizes,
    GROUPS: gl.constexpr,
    STAGES: gl.constexpr,
    BAND: gl.constexpr,
):
    """The warp that fetches."""
    full, empty = barriers
    num_m, num_n, num_steps, width = sizes
    BYTES: gl.constexpr = (GROUPS * _ROWS + 2 * _WIDTH) * _DEPTH * 2
    slot, phase = 0, 1
    for tile in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
        m, n = _place(tile, num_m, num_n, BAND)
        for step in range(num_steps):
            k = step * _DEPTH
            mbarrier.wait(empty.index(slot), phase)
            mbarrier.expect(full.index(slot), BYTES)
            for i in gl.static_range(GROUPS):
                row = (m * GROUPS + i) * _ROWS
                tma.async_copy_global_to_shared(x_desc, [row, k], full.index(slot), x_bufs.index(slot * GROUPS + i))
            for i in gl.static_range(2):
                row = i * width + n * _WIDTH
                tma.async_copy_global_to_shared(w_desc, [row, k], full.index(slot), w_pieces.index(slot * 2 + i))
            slot, phase = following(slot, phase, STAGES)


@gluon.jit
def _multiply(
    out_desc,
    buffers,
    barriers,
    sizes,
    GROUP: gl.constexpr,
    GROUPS: gl.constexpr,
    STAGES: gl.constexpr,
    BAND: gl.constexpr,
):
    """Group number GROUP of those that multiply."""
    x_bufs, w_bufs, out_bufs = buffers
    full, empty = barriers
    num_m, num_n, num_steps, _ = sizes
    # ptxas takes no instruction of 256 columns where a thread starts with 128 registers
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * _WIDTH if GROUPS == 2 else _WIDTH, 16])
    dtype: gl.constexpr = out_desc.dtype
    out_buf = out_bufs.index(GROUP)
    slot, phase, before = 0, 0, 0
    for tile in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
        m, n = _place(tile, num_m, num_n, BAND)
        acc = gl.zeros([_ROWS, 2 * _WIDTH], gl.float32, ACC)
        for step in range(num_steps):
            mbarrier.wait(full.index(slot), phase)
            columns = w_bufs.index(slot).permute((1, 0))
            running = warpgroup_mma(x_bufs.index(slot * GROUPS + GROUP), columns, acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[running])
            mbarrier.arrive(empty.index(before), count=1, pred=step > 0)  # the product of the step before is done
            before = slot
            slot, phase = following(slot, phase, STAGES)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(before), count=1)
        gate, up = gl.split(gl.permute(gl.reshape(acc, [_ROWS, 2, _WIDTH]), (0, 2, 1)))
        gate = gate.to(dtype).to(gl.float32)  # rounded where the separate operations round
        silu = (gate / (1.0 + gl.exp(-gate))).to(dtype).to(gl.float32)
        result = (silu * up.to(dtype).to(gl.float32)).to(dtype)
        tma.store_wait(0)  # what was stored before has left the buffer
        out_buf.store(result)
        fence_async_shared()
        tma.async_copy_shared_to_global(out_desc, [(m * GROUPS + GROUP) * _ROWS, n * _WIDTH], out_buf)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_m", "num_n", "num_steps", "width"])
def gated_hopper_kernel(
    x_desc,  # [M, K] in pieces of [64, 64]
    w_desc,  # [2I, K] in pieces of [_WIDTH, 64]
    out_desc,  # [M, I] in pieces of [64, _WIDTH]
    num_m,
    num_n,
    num_steps,
    width,  # I
    GROUPS: gl.constexpr,
    STAGES: gl.constexpr,
    BAND: gl.constexpr,
    PDL: gl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    dtype: gl.constexpr = out_desc.dtype
    x_bufs = gl.allocate_shared_memory(dtype, [STAGES * GROUPS, _ROWS, _DEPTH], x_desc.layout)
    w_pieces = gl.allocate_shared_memory(dtype, [STAGES * 2, _WIDTH, _DEPTH], w_desc.layout)
    w_bufs = w_pieces._reinterpret(dtype, [STAGES, 2 * _WIDTH, _DEPTH], w_desc.layout)
    out_bufs = gl.allocate_shared_memory(dtype, [GROUPS, _ROWS, _WIDTH], out_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=GROUPS)
    fence_async_shared()
    buffers, barriers, sizes = (x_bufs, w_bufs, out_bufs), (full, empty), (num_m, num_n, num_steps, width)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_multiply, (out_desc, buffers, barriers, sizes, 0, GROUPS, STAGES, BAND)),
                (_multiply, (out_desc, buffers, barriers, sizes, 1, GROUPS, STAGES, BAND)),
                (_fetch, (x_desc, w_desc, x_bufs, w_pieces, barriers, sizes, GROUPS, STAGES, BAND)),
            ],
            [4, 1],
            [232, 40],  # registers of a thread; the first group has the same 232, three times 168 are there
        )
    else:
        gl.warp_specialize(
            [
                (_multiply, (out_desc, buffers, barriers, sizes, 0, GROUPS, STAGES, BAND)),
                (_multiply, (out_desc, buffers, barriers, sizes, 1, GROUPS, STAGES, BAND)),
                (_multiply, (out_desc, buffers, barriers, sizes, 2, GROUPS, STAGES, BAND)),
                (_fetch, (x_desc, w_desc, x_bufs, w_pieces, barriers, sizes, GROUPS, STAGES, BAND)),
            ],
            [4, 4, 1],
            [160, 160, 32],  # four times 128
        )


def launch(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """silu(gate) * up of x[M, K] by weight[2I, K] in x's dtype, in rows of whole 16 bytes -> [M, I]. groups: 2 or 3."""
    (rows, depth), width = x.shape, weight.shape[0] // 2
    out = x.new_empty(rows, width)
    num_m, num_n = triton.cdiv(rows, groups * GATED_ROWS), triton.cdiv(width, GATED_WIDTH)
    gated_hopper_kernel[(min(num_m * num_n, chip.num_sms(x.device)),)](
        descriptor(x, _ROWS.value, _DEPTH.value),
        descriptor(weight, _WIDTH.value, _DEPTH.value),
        descriptor(out, _ROWS.value, _WIDTH.value),
        num_m,
        num_n,
        triton.cdiv(depth, _DEPTH.value),
        width,
        GROUPS=groups,
        STAGES=6 - groups,
        BAND=_BANDS[groups],
        num_warps=4,
        **chip.dependent_launch(x.device),
    )
    return out
