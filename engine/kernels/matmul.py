"""Triton kernel of the products with stored weights, and which of the ways a product goes. Letters: `__init__`.

One row goes through `gemv.py`, 2 to 256 rows on sm_90 through `hopper_matmul.py`: bulk tiles; gate and up in 16 bits of
more than 64 through `gated_hopper.py`. They need rows of whole 16 bytes. 16 bits of more rows go to the library, and
past FEW_ROWS where the SMs would take turns at bulk tiles, or out is narrow and inputs are many. What remains, and the
other chips, is told here. From two rows on:

8 bits by 8 bits goes to the 8-bit tensor cores. 8-bit weights with 16-bit activations do too, up to DIGIT_ROWS: each
token is written in two 8-bit digits (`convert.split_tokens`), which are two rows of one product, added up at its end.
That takes twice the operations of widened weights, at twice the rate, and no instruction to widen them: on sm_90 these
cost more than the bytes they save. More rows than that: the weights are widened once, into scratch, and the
library multiplies. Where the chip has no 8-bit product of these types, weights are widened inside the kernel.

The kernel: out is cut into tiles, a program for each, which walks the inputs, loading some steps ahead. For few rows
the weight is the left operand, as the tensor cores want 64 rows of that. Where tiles are few and inputs many, the
inputs are cut too: the programs of one tile leave their sums in `partial`, and the last to arrive adds them, in order.
Or in planes, [S, M, N] fp32, which the norm that follows adds: then nobody waits to be the last.
Small tiles (EARLY_ROWS) fetch the weights of their first step before they wait for the kernel that makes x.
"""

# Triton is untyped: a jitted function has no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine.kernels import chip, tuned
from engine.kernels.convert import LOW_FP8, LOW_INT8, codes, dequantize, split_tokens, widen
from engine.kernels.gemv import gemv
from engine.kernels.tiles import (
    DIGITS,
    GATED,
    PLAIN,
    W8A8,
    WEIGHT_ONLY,
    Tile,
    choose_gated,
    choose_splits,
    choose_tile,
    count_tiles,
    empty_rows,
    one_turn,
    tiles_for,
)

DEQUANTIZE_ROWS = 65  # where there are no digits: from so many rows on, a weight-only matrix is widened once for all
DIGIT_ROWS = 256  # up to so many rows, 8-bit weights meet two-digit activations
GROUPED_DIGIT_ROWS = 64  # where groups of inputs have scales, and no bulk tile: their sums are scaled one by one
LIBRARY_FP8_ROWS = 1024  # from so many rows on, FP8 rows go to torch._scaled_mm on sm_90
LIBRARY_BLOCK_ROWS = 257  # those with scales of 1 x 128 by weights of 128 x 128
PLAIN_ROWS = 32  # up to so many rows, 16-bit weights go through our kernels and not the library's
PLAIN_WIDTH = 65536  # outputs of these at most: for a head of 151,936 the library is within 6 % of the copy rate
BULK_ROWS = 256  # up to so many rows products take bulk tiles where there are any
FEW_ROWS = 128  # of more, in 16 bits, the library multiplies where SMs would take turns at bulk tiles, and gate and up
DEEP = 2  # as many inputs as outputs, and past FEW_ROWS the library multiplies, in two planes where it may
ONE_TURN_ROWS = 64  # from more rows on, gate and up in 16 bits take one program an SM: `tiles.one_turn`
GATED_DIGIT_ROWS = 32  # up to so many, tokens in two digits are gated where they are multiplied: more gain nothing
EARLY_ROWS = 32  # tiles of so many rows at most fetch weights before they wait for the kernel that makes the rows

_MAX_TILES = 4096  # that can be split: at most one for each SM are
_KINDS = ("plain", "weight_only", "w8a8", "digits")  # as tuned tables call them


@triton.jit
def _along(v, FIRST: tl.constexpr):
    """A vector along the first of two dimensions, or the second."""
    return v[:, None] if FIRST else v[None, :]


@triton.jit
def _dot(x, w, acc, WEIGHT_LEFT: tl.constexpr):
    if WEIGHT_LEFT:
        acc = tl.dot(w, x, acc, input_precision="ieee", out_dtype=acc.dtype)
    else:
        acc = tl.dot(x, w, acc, input_precision="ieee", out_dtype=acc.dtype)
    return acc


@triton.jit
def _wait_at(start, first):
    """`gdc_wait` in the first step of a loop; 0, to be added to the addresses of what must not be read before.

    In the loop, so that the pipeliner puts it among the loads that it moves ahead: after the first of weights. It moves
    only what is pure, so this is called so; its result keeps it before the loads of x, and start inside the loop.
    """
    return tl.inline_asm_elementwise(
        "{ .reg .pred now; setp.eq.s32 now, $1, $2; @now griddepcontrol.wait; mov.b32 $0, 0; }",
        "=r,r,r",
        [start, first],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit(do_not_specialize=["R", "num_splits"])
def matmul_kernel(
    x,
    x_scale,
    w,
    w_scale,
    bias,
    out,
    partial,
    counters,
    R,
    N,
    K,
    num_groups,
    num_splits,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    BIAS: tl.constexpr,
    PLANES: tl.constexpr,
    EVEN_K: tl.constexpr,
    WEIGHT_LEFT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
):
    # R is x's rows, two for each row of out where they are digits. Programs run in bands of BAND row tiles, so that
    # what is resident together shares rows and weights in L2.
    if PDL:
        gdc_launch_dependents()
    num_m, num_n = tl.cdiv(R, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0)
    split = tl.program_id(1)
    band = tile // (BAND * num_n)
    rows_in_band = min(num_m - band * BAND, BAND)
    inside = tile % (BAND * num_n)
    first = (band * BAND + inside % rows_in_band) * BLOCK_M
    r = first + tl.arange(0, BLOCK_M)
    n = (inside // rows_in_band) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    r_exists, n_exists = r < R, n < N
    # x_tile [BLOCK_M, BLOCK_K] and w_tile [BLOCK_K, BLOCK_N], or their transposes and the other way round.
    x_tile = x + _along(r.to(tl.int64) * K, not WEIGHT_LEFT) + _along(k, WEIGHT_LEFT)
    w_tile = w + _along(n.to(tl.int64) * K, WEIGHT_LEFT) + _along(k, not WEIGHT_LEFT)
    INTEGER: tl.constexpr = KIND >= W8A8 and x.dtype.element_ty == tl.int8
    SHAPE: tl.constexpr = (BLOCK_N, BLOCK_M) if WEIGHT_LEFT else (BLOCK_M, BLOCK_N)
    acc = tl.zeros(SHAPE, dtype=tl.int32 if INTEGER and GROUP == 0 else tl.float32)
    per_split = tl.cdiv(tl.cdiv(K, BLOCK_K), num_splits) * BLOCK_K
    begin = split * per_split
    if PDL and not EARLY:
        gdc_wait()
    for start in range(begin, min(begin + per_split, K), BLOCK_K):
        x_mask, w_mask = _along(r_exists, not WEIGHT_LEFT), _along(n_exists, WEIGHT_LEFT)
        if not EVEN_K:
            x_mask, w_mask = (
                x_mask & _along(start + k < K, WEIGHT_LEFT),
                w_mask & _along(start + k < K, not WEIGHT_LEFT),
            )
        x_start = start
        if EARLY:
            w_part = tl.load(w_tile + start, mask=w_mask, other=0.0)
            if PDL:
                x_start += _wait_at(start, begin) * BLOCK_K  # a multiple: else the copies of x would be of one value
        if GROUP != 0:  # ahead of the operands, so that they come while those are waited for
            scales = tl.load(w_scale + n * num_groups + start // GROUP, mask=n_exists, other=0.0)
            scales = _along(scales, WEIGHT_LEFT)
            if KIND == W8A8:
                x_scales = tl.load(x_scale + r * num_groups + x_start // GROUP, mask=r_exists, other=0.0)
                x_scales = _along(x_scales, not WEIGHT_LEFT)
        x_part = tl.load(x_tile + x_start, mask=x_mask, other=0.0)
        if not EARLY:
            w_part = tl.load(w_tile + start, mask=w_mask, other=0.0)
        if KIND == WEIGHT_ONLY:
            w_part = widen(w_part, x_part.dtype)
        if GROUP == 0:
            acc = _dot(x_part, w_part, acc, WEIGHT_LEFT)
        else:
            zeros = tl.zeros(SHAPE, dtype=tl.int32 if INTEGER else tl.float32)
            part = _dot(x_part, w_part, zeros, WEIGHT_LEFT).to(tl.float32)
            acc += part * (scales * x_scales) if KIND == W8A8 else part * scales
    if PDL and EARLY:
        gdc_wait()  # a part of no inputs has not waited
    acc = acc.to(tl.float32)
    ROWS: tl.constexpr = BLOCK_M // 2 if KIND == DIGITS else BLOCK_M
    m, M = first + tl.arange(0, ROWS), R
    if KIND == DIGITS:
        if not WEIGHT_LEFT:
            acc = tl.trans(acc)
        high, low = tl.split(tl.reshape(acc, (BLOCK_N, ROWS, 2)))
        acc = high + low * (LOW_INT8 if x.dtype.element_ty == tl.int8 else LOW_FP8)
        m, M = first // 2 + tl.arange(0, ROWS), R // 2
    m_exists = m < M
    LEFT: tl.constexpr = WEIGHT_LEFT or KIND == DIGITS  # acc is of out.T
    if GROUP == 0 and KIND != PLAIN:
        acc *= _along(tl.load(w_scale + n, mask=n_exists, other=0.0), LEFT)
    if KIND == DIGITS or (KIND == W8A8 and GROUP == 0):
        acc *= _along(tl.load(x_scale + m, mask=m_exists, other=0.0), not LEFT)
    last = num_splits == 1
    if PLANES:
        last, out = True, out + split.to(tl.int64) * M * N
    elif num_splits > 1:
        OUT: tl.constexpr = (BLOCK_N, ROWS) if LEFT else (ROWS, BLOCK_N)
        place = (tile * num_splits).to(tl.int64) * (ROWS * BLOCK_N)
        place += tl.arange(0, OUT[0])[:, None] * OUT[1] + tl.arange(0, OUT[1])[None, :]
        tl.store(partial + place + split * (ROWS * BLOCK_N), acc)
        tl.debug_barrier()  # every thread's part is stored before one of them says so
        last = tl.atomic_add(counters + tile, 1, sem="acq_rel") == num_splits - 1
        if last:
            tl.store(counters + tile, 0)  # as the next product expects it
            acc = tl.zeros(OUT, dtype=tl.float32)
            for i in range(num_splits):
                acc += tl.load(partial + place + i * (ROWS * BLOCK_N), cache_modifier=".cg")
    if last:
        if BIAS:
            acc += _along(tl.load(bias + n, mask=n_exists, other=0.0).to(tl.float32), LEFT)
        result = acc.to(out.dtype.element_ty)
        if LEFT:
            result = tl.trans(result)
        target = out + m.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(target, result, mask=m_exists[:, None] & n_exists[None, :])


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None, planes: bool = False
) -> Tensor:
    assert out is None or out.is_contiguous()
    rows, width = x.shape[0], weight.shape[0]
    if rows == 1 and x.is_contiguous():
        return gemv(x, weight, None, bias, out=out)
    ours = 1 < rows <= BULK_ROWS and width <= PLAIN_WIDTH and x.is_contiguous() and x.itemsize == 2
    ours = ours and (rows <= PLAIN_ROWS or _bulk(x, weight, width))
    found = tuned.choice("plain", x, weight) if ours else tuned.NOT_OURS
    deep = ours and rows > FEW_ROWS and x.shape[1] >= DEEP * width
    fits = rows <= FEW_ROWS or (not deep and count_tiles(rows, width, 128, 64) <= chip.num_sms(x.device))
    if found or (found is None and fits):
        return multiply(x, None, weight, None, bias, x.dtype, 0, out=out, planes=planes)
    if deep and planes and bias is None and out is None and x.shape[1] % 16 == 0:
        return _halves(x, weight)
    return _by_library(x, weight, bias, out)


def _halves(x: Tensor, weight: Tensor) -> Tensor:
    """The library's products of either half of the inputs, at once -> [2, M, N] fp32. It would cut them itself, and
    launch a kernel to add the parts.
    """
    depth = x.shape[1] // 2
    halves = x.view(-1, 2, depth).transpose(0, 1)
    return torch.bmm(halves, weight.view(-1, 2, depth).permute(1, 2, 0), out_dtype=torch.float32)


def _by_library(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    if out is None:
        return F.linear(x, weight, bias)
    return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)


def gated(x: Tensor, weight: Tensor, scale: Tensor | None = None, group_size: int = 0) -> Tensor | None:
    """silu(gate) * up of x[M, K] by weight[2I, K], one launch -> [M, I]; None where there is none for such operands.
    Of 8-bit weights, which are then widened first, there is one for many rows.
    """
    rows, width, num_sms = x.shape[0], weight.shape[0] // 2, chip.num_sms(x.device)
    if rows < 2 or not (x.is_contiguous() and x.itemsize == 2 and _bulk(x, weight, width)):
        return None
    if rows > BULK_ROWS:
        tile = choose_gated(rows, width, num_sms)
    elif scale is not None:
        return None
    else:
        found = tuned.choice("gated", x, weight)
        tile = one_turn(rows, width, num_sms) if found is None and rows > ONE_TURN_ROWS else None
        if tile is None and (found or (found is None and rows <= FEW_ROWS)):
            return multiply(x, None, weight, None, None, x.dtype, 0, gated=True)
    if tile is None:
        return None
    if scale is not None:
        _check(x, weight, scale, None, group_size)
        weight = dequantize(weight, scale, group_size, x.dtype)
    from engine.kernels import gated_hopper

    return gated_hopper.launch(x, weight, tile, one_turn=rows <= BULK_ROWS)


def warm_up(device: torch.device, dtype: torch.dtype) -> None:
    """Compile what only batches of some sizes take."""
    if takes_bulk(device, dtype, 64, 64):
        from engine.kernels import gated_hopper

        x = torch.zeros(64, 64, dtype=dtype, device=device)
        for tile in GATED:
            gated_hopper.launch(x, x, tile)


def gated_codes(x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor | None:
    """`gated` of codes by codes, or of tokens in two digits, with scales of whole rows."""
    _check(x, weight, scale, None, 0)
    most = BULK_ROWS if x_scale.shape[0] == x.shape[0] else GATED_DIGIT_ROWS
    if x_scale.shape[0] > most or dtype.itemsize != 2 or not _bulk(x, weight, weight.shape[0] // 2):
        return None
    return multiply(x, x_scale, weight, scale, None, dtype, 0, gated=True)


def added(x: Tensor, residual: Tensor, weight: Tensor, scale: Tensor | None, group_size: int) -> Tensor | None:
    """residual[M, N] += x[M, K] @ weight[N, K].T by the library, from so many rows on that no product of ours is taken;
    None for fewer.
    """
    if x.shape[0] <= BULK_ROWS:
        return None
    assert residual.shape == (x.shape[0], weight.shape[0]) and residual.dtype == x.dtype
    if scale is not None:
        _check(x, weight, scale, None, group_size)
        weight = dequantize(weight, scale, group_size, x.dtype)
    return residual.addmm_(x, weight.t())


def _bulk(x: Tensor, w: Tensor, width: int) -> bool:
    """Whether a bulk tile multiplies x[M, K] by rows of w[., K], to M x width of 16 bits."""
    aligned = x.data_ptr() % 16 == w.data_ptr() % 16 == 0
    return aligned and takes_bulk(x.device, x.dtype, width, x.shape[1])


def takes_bulk(device: torch.device, dtype: torch.dtype, width: int, depth: int) -> bool:
    """Whether this chip has bulk tiles, and they take such operands: 8 or 16 bits, and rows of whole 16 bytes."""
    fits = dtype.itemsize <= 2 and depth * dtype.itemsize % 16 == 0 and width % 8 == 0
    return fits and chip.runs_gluon(device)


def weight_only_matmul(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    group_size: int = 0,
    out: Tensor | None = None,
    planes: bool = False,
) -> Tensor:
    _check(x, qdata, scale, bias, group_size)
    assert x.dtype in (torch.bfloat16, torch.float16, torch.float32), x.dtype
    rows = x.shape[0]
    if rows == 1:
        return gemv(x, qdata, scale, bias, group_size, out=out)
    if takes_digits(x, qdata.dtype, group_size):
        return digits_matmul(*split_tokens(x, qdata.dtype), qdata, scale, bias, x.dtype, group_size, out, planes)
    if rows >= DEQUANTIZE_ROWS:
        # Not through our kernels: they fetch weights before the kernel before them, which writes these, is done.
        return _by_library(x, dequantize(qdata, scale, group_size, x.dtype), bias, out)
    return multiply(x, None, qdata, scale, bias, x.dtype, group_size, out=out, planes=planes)


def takes_digits(x: Tensor, stored: torch.dtype, group_size: int) -> bool:
    """Whether so many rows, of this dtype and on this device, meet weights of `stored` in two digits."""
    if not x.is_cuda or x.itemsize != 2:
        return False
    if stored != torch.int8 and (chip.capability(x.device) < (8, 9) or x.dtype != torch.bfloat16):
        return False  # two FP8 digits have the 8 bits of bf16, not fp16's 11
    few = group_size and not chip.runs_gluon(x.device)
    return 1 < x.shape[0] <= (GROUPED_DIGIT_ROWS if few else DIGIT_ROWS)


def digits_matmul(
    x: Tensor,
    x_scale: Tensor,
    qdata: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    group_size: int = 0,
    out: Tensor | None = None,
    planes: bool = False,
) -> Tensor:
    _check(x, qdata, scale, bias, group_size)
    assert x.dtype == qdata.dtype
    assert x_scale.shape == (x.shape[0] // 2, 1) and x_scale.dtype == torch.float32 and x_scale.is_contiguous()
    return multiply(x, x_scale, qdata, scale, bias, dtype, group_size, out=out, planes=planes)


def w8a8_matmul(
    x: Tensor,
    x_scale: Tensor,
    qdata: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    group_size: int = 0,
    out: Tensor | None = None,
    block_scale: Tensor | None = None,
    planes: bool = False,
) -> Tensor:
    _check(x, qdata, scale, bias, group_size)
    assert x.dtype == qdata.dtype
    assert x_scale.shape == (x.shape[0], scale.shape[1]) and x_scale.dtype == torch.float32 and x_scale.is_contiguous()
    if x.shape[0] == 1 and group_size:
        return gemv(x, qdata, scale, bias, group_size, out=out, x_scale=x_scale, dtype=dtype)
    if _library_multiplies(x, qdata, dtype, group_size):
        product = torch._scaled_mm(x, qdata.t(), x_scale, scale.t(), out_dtype=dtype, use_fast_accum=True)
        product = product if bias is None else product.add_(bias)
        return product if out is None else out.copy_(product)
    if block_scale is None or not _library_multiplies_blocks(x, dtype, block_scale):
        return multiply(x, x_scale, qdata, scale, bias, dtype, group_size, out=out, planes=planes)
    if out is None:
        out = x.new_empty(x.shape[0], qdata.shape[0], dtype=dtype)
    rows = x.shape[0] // 4 * 4  # the library wants the scales of a group aligned: the others are ours
    x_scales = x_scale[:rows].t().contiguous().t()
    torch._scaled_mm(x[:rows], qdata.t(), x_scales, block_scale.t(), out_dtype=dtype, out=out[:rows])
    if bias is not None:
        out[:rows].add_(bias)
    if rows < x.shape[0]:
        w8a8_matmul(x[rows:], x_scale[rows:], qdata, scale, bias, dtype, group_size, out[rows:])
    return out


def _library_multiplies_blocks(x: Tensor, dtype: torch.dtype, block_scale: Tensor) -> bool:
    """Whether torch's FP8 product with scales of blocks takes these, and is the faster one. On other chips than sm_90
    it has none, with CUDA before 12.9 neither.
    """
    return (
        x.shape[0] >= LIBRARY_BLOCK_ROWS
        and dtype == torch.bfloat16
        and block_scale.shape[1] % 4 == 0
        and x.shape[1] % 128 == 0
        and chip.capability(x.device) == (9, 0)
        and _cuda_version() >= (12, 9)
    )


@cache
def _cuda_version() -> tuple[int, ...]:
    return tuple(int(part) for part in (torch.version.cuda or "0").split("."))


def _library_multiplies(x: Tensor, qdata: Tensor, dtype: torch.dtype, group_size: int) -> bool:
    """Whether torch's FP8 product with a scale a row takes these, and is the faster one."""
    return (
        x.is_cuda
        and x.shape[0] >= LIBRARY_FP8_ROWS
        and x.dtype == torch.float8_e4m3fn
        and dtype == torch.bfloat16
        and group_size == 0
        and qdata.shape[0] % 16 == qdata.shape[1] % 16 == 0
        and chip.capability(x.device) == (9, 0)
    )


def multiply(
    x: Tensor,
    x_scale: Tensor | None,
    w: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    group_size: int,
    tile: Tile | None = None,
    num_splits: int = 0,
    out: Tensor | None = None,
    gated: bool = False,
    planes: bool = False,
) -> Tensor:
    """Any of the products through a kernel of ours; x has two rows for each of x_scale's where they are digits. tile,
    num_splits: the tests' and measurements' choice of them. gated: by a bulk tile alone, see `gated`. planes: where
    inputs are cut, out may be [S, M, N] fp32, see above.
    """
    (rows, depth), width = x.shape, w.shape[0] // 2 if gated else w.shape[0]
    if x_scale is not None:
        kind = (W8A8 if x_scale.shape[0] == rows else DIGITS).value
    else:
        kind = (PLAIN if scale is None else WEIGHT_ONLY).value
    out_rows = rows if x_scale is None else x_scale.shape[0]
    if rows == 0:
        return x.new_empty(0, width, dtype=dtype) if out is None else out
    num_sms = chip.num_sms(x.device)
    if tile is None:
        bulk = out_rows <= BULK_ROWS and kind != WEIGHT_ONLY.value and dtype.itemsize == 2
        bulk = bulk and (out is None or out.data_ptr() % 16 == 0) and _bulk(x, w, width)
        found = tuned.choice("gated" if gated else _KINDS[kind], x, w, group_size=group_size)
        if found and (bulk or found[5] != tuned.BULK):
            tile, num_splits = tuned.tile(found)
        else:
            tile = choose_tile(tiles_for(x.device, kind, x.dtype, group_size, bulk, gated), rows, width, num_sms)
    block_k = min(tile.block_k, group_size or tile.block_k)
    num_tiles = count_tiles(rows, width, tile.block_m, tile.block_n)
    num_splits = 1 if gated else num_splits or choose_splits(num_tiles, depth, num_sms, tile, group_size)
    assert num_splits == 1 or num_tiles <= _MAX_TILES
    planes = planes and num_splits > 1 and bias is None and out is None
    if planes:
        out = x.new_empty(num_splits, out_rows, width, dtype=torch.float32)
    elif out is None:
        out = empty_rows(x, out_rows, width, dtype=dtype)
    if tile.bulk:
        from engine.kernels import hopper_matmul

        counters = _counters(x.device)
        hopper_matmul.launch(x, x_scale, w, scale, bias, out, kind, tile, group_size, num_splits, counters, gated=gated)
        return out
    assert not gated
    parts = num_tiles * num_splits * tile.block_m * tile.block_n if num_splits > 1 and not planes else 0
    matmul_kernel[(num_tiles, num_splits)](
        x,
        x if x_scale is None else x_scale,
        codes(w) if kind == WEIGHT_ONLY.value else w,
        x if scale is None else scale,
        x if bias is None else bias,
        out,
        x.new_empty(parts, dtype=torch.float32),
        _counters(x.device),
        rows,
        width,
        depth,
        1 if scale is None else scale.shape[1],
        num_splits,
        KIND=kind,
        GROUP=group_size,
        BIAS=bias is not None,
        PLANES=planes,
        EVEN_K=depth % block_k == 0,
        WEIGHT_LEFT=tile.weight_left,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=block_k,
        BAND=8,
        EARLY=tile.block_m <= EARLY_ROWS,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **chip.dependent_launch(x.device),
    )
    return out


def _check(x: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None, group_size: int) -> None:
    assert x.dim() == 2 and x.is_contiguous() and qdata.is_contiguous()
    width, depth = qdata.shape
    assert x.shape[1] == depth
    assert qdata.dtype in (torch.int8, torch.float8_e4m3fn), qdata.dtype
    groups = triton.cdiv(depth, group_size) if group_size else 1
    assert scale.shape == (width, groups) and scale.dtype == torch.float32 and scale.is_contiguous()
    assert bias is None or (bias.shape == (width,) and bias.is_contiguous())


@cache
def _counters(device: torch.device) -> Tensor:
    """How many programs of each tile have arrived; every product leaves zeros. One stream at a time may use them."""
    assert device.type == "cpu" or not torch.cuda.is_current_stream_capturing(), "run a product before capturing one"
    return torch.zeros(_MAX_TILES, dtype=torch.int32, device=device)
