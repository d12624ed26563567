"""Gluon kernel of gate and up of many tokens with silu in its end, in 16 bits, on sm_90. Letters as in `__init__`.

The library writes 2I values a token and silu reads them, almost a third of what a layer of prefill moves through
memory. Here out[M, I] = silu(x @ gate.T) * (x @ up.T) leaves the program that multiplies.

One program an SM walks tiles of 64 GROUPS tokens by MAIN + SIDE columns. A warp fetches x and both weights, as far
ahead as there are buffers, also past the end of a tile. GROUPS groups of four warps multiply 64 tokens each by the rows
of gate and of up side by side, as one product of 2 MAIN columns: a thread then has gate and up of the same column. A
group can be ahead of the others by as many steps as there are buffers, and then takes its exponentials while they
multiply.

Prefill: 128 columns. Three groups fetch least for what they multiply, 192 + 256 rows for 192 x 256 sums; two leave less
of the last tiles of some batches empty. What a tile has past an edge is fetched as zeros, or as another's, and is not
stored. Tiles go in bands of tokens, so that those which run together share rows and weights in L2.

Decode of 65 to 256 sequences, ONE_TURN: as many columns as give each SM one tile and leave few without, 128 tiles of
128 x 96 for the 256 x 6,144 of Qwen3-1.7B. Sides of Triton's tensors are powers of two, so these are a product of MAIN
columns and one of SIDE in each step, with sums of their own. The first weights are fetched before the wait for the
kernel that makes x, and a group leaves its result where its tokens were: in 227 KiB, the room of one buffer more.
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
from engine.kernels.gluon_names import fetch, store, view
from engine.kernels.hopper_matmul import SHARED, descriptor, following, height_of
from engine.kernels.tiles import GATED_ROWS, GatedTile, empty_rows

_ROWS = gl.constexpr(GATED_ROWS)
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
def _fetch_weights(weights, full, slot, n, k, width, more, MAIN: gl.constexpr, SIDE: gl.constexpr, BYTES: gl.constexpr):
    """Those of one step, after saying how many bytes are to come with its rows."""
    w_desc, s_desc, w_pieces, s_pieces = weights
    bar = full.index(slot)
    mbarrier.expect(bar, BYTES, pred=more)
    for i in gl.static_range(2):
        row, piece = i * width + n * (MAIN + SIDE), slot * 2 + i
        fetch(w_desc, [row, k], bar, w_pieces.index(piece), pred=more)
        if SIDE:
            fetch(s_desc, [row + MAIN, k], bar, s_pieces.index(piece), pred=more)


@gluon.jit
def _fetch(
    descs,
    bufs,
    barriers,
    sizes,
    MAIN: gl.constexpr,
    SIDE: gl.constexpr,
    GROUPS: gl.constexpr,
    STAGES: gl.constexpr,
    BAND: gl.constexpr,
    ONE_TURN: gl.constexpr,
    PDL: gl.constexpr,
):
    """The warp that fetches."""
    x_desc, w_desc, s_desc = descs
    x_bufs, w_pieces, s_pieces = bufs
    full, empty = barriers
    num_m, num_n, num_steps, width = sizes
    weights = (w_desc, s_desc, w_pieces, s_pieces)
    BYTES: gl.constexpr = (GROUPS * _ROWS + 2 * (MAIN + SIDE)) * _DEPTH * 2
    early = 0  # so many steps have asked for their weights already
    if ONE_TURN:
        _, n = _place(gl.program_id(0), num_m, num_n, BAND)
        for i in gl.static_range(STAGES):
            _fetch_weights(weights, full, i, n, i * _DEPTH, width, i < num_steps, MAIN, SIDE, BYTES)
        early = gl.minimum(num_steps, STAGES)
    if PDL:
        gdc_wait()
    slot, phase = 0, 1
    for tile in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
        m, n = _place(tile, num_m, num_n, BAND)
        for step in range(num_steps):
            k = step * _DEPTH
            mbarrier.wait(empty.index(slot), phase)
            _fetch_weights(weights, full, slot, n, k, width, early <= 0, MAIN, SIDE, BYTES)
            early -= 1
            for i in gl.static_range(GROUPS):
                row = (m * GROUPS + i) * _ROWS
                fetch(x_desc, [row, k], full.index(slot), x_bufs[i].index(slot))
            slot, phase = following(slot, phase, STAGES)


@gluon.jit
def _rows_and_out(x_desc, out_desc, MAIN: gl.constexpr, STAGES: gl.constexpr, ONE_TURN: gl.constexpr):
    """Buffers of one group: of its tokens, and of its result, which in one turn is where they were."""
    x_bufs = gl.allocate_shared_memory(x_desc.dtype, [STAGES, _ROWS, _DEPTH], x_desc.layout)
    if ONE_TURN:
        out_buf = view(x_bufs, x_desc.dtype, [_ROWS, MAIN], out_desc.layout)
    else:
        out_buf = gl.allocate_shared_memory(x_desc.dtype, [_ROWS, MAIN], out_desc.layout)
    return x_bufs, out_buf


@gluon.jit
def _gated(acc, WIDTH: gl.constexpr, dtype: gl.constexpr):
    """silu(gate) * up of acc[_ROWS, 2 WIDTH], gate beside up, rounded where the separate operations round."""
    gate, up = gl.split(gl.permute(gl.reshape(acc, [_ROWS, 2, WIDTH]), (0, 2, 1)))
    gate = gate.to(dtype).to(gl.float32)
    silu = (gate / (1.0 + gl.exp(-gate))).to(dtype).to(gl.float32)
    return (silu * up.to(dtype).to(gl.float32)).to(dtype)


@gluon.jit
def _multiply(
    out_descs,
    buffers,
    barriers,
    sizes,
    GROUP: gl.constexpr,
    MAIN: gl.constexpr,
    SIDE: gl.constexpr,
    GROUPS: gl.constexpr,
    STAGES: gl.constexpr,
    BAND: gl.constexpr,
):
    """Group number GROUP of those that multiply."""
    out_desc, side_desc = out_descs
    x_bufs, w_bufs, s_bufs, out_bufs = buffers
    full, empty = barriers
    num_m, num_n, num_steps, _ = sizes
    # ptxas takes no instruction of 256 columns where a thread starts with 128 registers
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, min(2 * MAIN, 256 if GROUPS == 2 else 128), 16])
    SIDES: gl.constexpr = 2 * SIDE if SIDE else 16
    SIDE_ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIDES, 16])
    dtype: gl.constexpr = out_desc.dtype
    out_buf = out_bufs[GROUP]
    slot, phase, before = 0, 0, 0
    for tile in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
        m, n = _place(tile, num_m, num_n, BAND)
        acc = gl.zeros([_ROWS, 2 * MAIN], gl.float32, ACC)
        side = gl.zeros([_ROWS, SIDES], gl.float32, SIDE_ACC)
        for step in range(num_steps):
            mbarrier.wait(full.index(slot), phase)
            x = x_bufs[GROUP].index(slot)
            running = warpgroup_mma(x, w_bufs.index(slot).permute((1, 0)), acc, is_async=True)
            if SIDE:
                running_side = warpgroup_mma(x, s_bufs.index(slot).permute((1, 0)), side, is_async=True)
                acc, side = warpgroup_mma_wait(2, deps=[running, running_side])
            else:
                acc = warpgroup_mma_wait(1, deps=[running])
            mbarrier.arrive(empty.index(before), count=1, pred=step > 0)  # the products of the step before are done
            before = slot
            slot, phase = following(slot, phase, STAGES)
        if SIDE:
            acc, side = warpgroup_mma_wait(0, deps=[acc, side])
        else:
            acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(before), count=1)
        row, column = (m * GROUPS + GROUP) * _ROWS, n * (MAIN + SIDE)
        result = _gated(acc, MAIN, dtype)
        tma.store_wait(0)  # what was stored before has left the buffer
        out_buf.store(result)
        fence_async_shared()
        store(out_desc, [row, column], out_buf)
        if SIDE:
            result = _gated(side, SIDE, dtype)
            tma.store_wait(0)
            side_buf = view(out_buf, dtype, [_ROWS, SIDE], side_desc.layout)
            side_buf.store(result)
            fence_async_shared()
            store(side_desc, [row, column + MAIN], side_buf)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_m", "num_n", "num_steps", "width"])
def gated_hopper_kernel(
    x_desc,  # [M, K] in pieces of [_ROWS, 64]
    w_desc,  # [2I, K] in pieces of [MAIN, 64]
    s_desc,  # in pieces of [SIDE, 64]
    out_desc,  # [M, I] in pieces of [_ROWS, MAIN]
    side_desc,  # in pieces of [_ROWS, SIDE]
    num_m,
    num_n,
    num_steps,
    width,  # I
    MAIN: gl.constexpr,
    SIDE: gl.constexpr,
    GROUPS: gl.constexpr,
    STAGES: gl.constexpr,
    BAND: gl.constexpr,
    ONE_TURN: gl.constexpr,
    PDL: gl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    dtype: gl.constexpr = out_desc.dtype
    x0, out0 = _rows_and_out(x_desc, out_desc, MAIN, STAGES, ONE_TURN)
    x1, out1 = _rows_and_out(x_desc, out_desc, MAIN, STAGES, ONE_TURN)
    x2, out2 = x1, out1
    if GROUPS == 3:
        x2, out2 = _rows_and_out(x_desc, out_desc, MAIN, STAGES, ONE_TURN)
    w_pieces = gl.allocate_shared_memory(dtype, [STAGES * 2, MAIN, _DEPTH], w_desc.layout)
    w_bufs = view(w_pieces, dtype, [STAGES, 2 * MAIN, _DEPTH], w_desc.layout)
    s_pieces, s_bufs = w_pieces, w_bufs
    if SIDE:
        s_pieces = gl.allocate_shared_memory(dtype, [STAGES * 2, SIDE, _DEPTH], s_desc.layout)
        s_bufs = view(s_pieces, dtype, [STAGES, 2 * SIDE, _DEPTH], s_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=GROUPS)
    fence_async_shared()
    barriers, sizes = (full, empty), (num_m, num_n, num_steps, width)
    x_bufs, out_descs = (x0, x1, x2), (out_desc, side_desc)
    buffers = (x_bufs, w_bufs, s_bufs, (out0, out1, out2))
    descs, pieces = (x_desc, w_desc, s_desc), (x_bufs, w_pieces, s_pieces)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_multiply, (out_descs, buffers, barriers, sizes, 0, MAIN, SIDE, GROUPS, STAGES, BAND)),
                (_multiply, (out_descs, buffers, barriers, sizes, 1, MAIN, SIDE, GROUPS, STAGES, BAND)),
                (_fetch, (descs, pieces, barriers, sizes, MAIN, SIDE, GROUPS, STAGES, BAND, ONE_TURN, PDL)),
            ],
            [4, 1],
            [232, 40],  # registers of a thread; the first group has the same 232, three times 168 are there
        )
    else:
        gl.warp_specialize(
            [
                (_multiply, (out_descs, buffers, barriers, sizes, 0, MAIN, SIDE, GROUPS, STAGES, BAND)),
                (_multiply, (out_descs, buffers, barriers, sizes, 1, MAIN, SIDE, GROUPS, STAGES, BAND)),
                (_multiply, (out_descs, buffers, barriers, sizes, 2, MAIN, SIDE, GROUPS, STAGES, BAND)),
                (_fetch, (descs, pieces, barriers, sizes, MAIN, SIDE, GROUPS, STAGES, BAND, ONE_TURN, PDL)),
            ],
            [4, 4, 1],
            [160, 160, 32],  # four times 128
        )


def launch(x: Tensor, weight: Tensor, tile: GatedTile, one_turn: bool = False) -> Tensor:
    """silu(gate) * up of x[M, K] by weight[2I, K] in x's dtype, in rows of whole 16 bytes -> [M, I]. one_turn: there
    are no more tiles than SMs, and no kernel of the step writes the weights.
    """
    (rows, depth), width = x.shape, weight.shape[0] // 2
    out = empty_rows(x, rows, width)
    num_m, num_n = triton.cdiv(rows, tile.height), triton.cdiv(width, tile.width)
    num_sms = chip.num_sms(x.device)
    assert not one_turn or num_m * num_n <= num_sms
    room = SHARED - (0 if one_turn else tile.height * tile.main * x.itemsize)
    w_desc, out_desc = descriptor(weight, tile.main, _DEPTH.value), descriptor(out, _ROWS.value, tile.main)
    gated_hopper_kernel[(min(num_m * num_n, num_sms),)](
        descriptor(x, _ROWS.value, _DEPTH.value, height_of(x, tile.height)),
        w_desc,
        descriptor(weight, tile.side, _DEPTH.value) if tile.side else w_desc,
        out_desc,
        descriptor(out, _ROWS.value, tile.side) if tile.side else out_desc,
        num_m,
        num_n,
        triton.cdiv(depth, _DEPTH.value),
        width,
        MAIN=tile.main,
        SIDE=tile.side,
        GROUPS=tile.groups,
        STAGES=min(8, room // ((tile.height + 2 * tile.width) * _DEPTH.value * x.itemsize)),
        BAND=_BANDS[tile.groups],
        ONE_TURN=one_turn,
        num_warps=4,
        **chip.dependent_launch(x.device),
    )
    return out
