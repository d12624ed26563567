"""Triton kernel of the products with stored weights, and which of three ways a product goes. Letters: `__init__`.

One row goes through `gemv.py`. From a few rows to a few hundred, the kernel here: the weight is the left operand, so
that 8-bit weights are widened in registers on their way into the tensor cores (as the right operand sm_90 would want
them back in shared memory first), and out.T[N, M] is cut into tiles along N and, where that leaves SMs idle, along K:
the programs of one tile leave their sums in `partial`, and the last to arrive adds them, in order. More rows still:
weight-only matrices are widened once, into scratch, and the library multiplies them, as widening inside every tile
costs more than it saves there; FP8 x FP8 goes to the library's product where the chip has it.
"""

# Triton is untyped: a jitted function has no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels import chip
from engine.kernels.convert import codes, dequantize, widen
from engine.kernels.gemv import gemv

DEQUANTIZE_ROWS = 65  # from so many rows on, a weight-only matrix is widened once for all of them
LIBRARY_FP8_ROWS = 64  # from so many rows on, FP8 rows go to torch._scaled_mm on sm_90
PLAIN_ROWS = 16  # up to so many rows, 16-bit weights go through our kernels and not the library's

_MAX_SPLITS = 16
_MIN_STEPS = 2  # tiles of K that a split must have
_MAX_TILES = 4096  # that can be split: at most two for each SM are

# The kinds of product: both operands in one wide type, 8-bit weights, both in 8 bits.
PLAIN, WEIGHT_ONLY, W8A8 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@dataclass(frozen=True)
class Tile:
    """One shape of program, for products of up to `max_rows` rows: out.T tiles of block_n x block_m."""

    max_rows: int
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


TILES_16BIT = (
    Tile(16, 16, 64, 128, 4, 4),
    Tile(32, 32, 64, 128, 4, 4),
    Tile(64, 64, 64, 128, 4, 3),
    Tile(1 << 62, 128, 128, 64, 8, 3),
)
TILES_W8A8 = (
    Tile(16, 16, 64, 256, 4, 4),
    Tile(32, 32, 64, 256, 4, 4),
    Tile(64, 64, 64, 256, 4, 3),
    Tile(1 << 62, 128, 128, 128, 8, 3),
)
TILES_32BIT = (
    Tile(16, 16, 32, 32, 4, 3),
    Tile(1 << 62, 64, 64, 16, 8, 3),
)


@triton.jit(do_not_specialize=["M", "num_splits"])
def matmul_kernel(
    x,
    x_scale,
    w,
    w_scale,
    bias,
    out,
    partial,
    counters,
    M,
    N,
    K,
    num_groups,
    num_splits,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
):
    # Programs run in bands of BAND row tiles, so that what is resident together shares rows and weights in L2.
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0)
    split = tl.program_id(1)
    band = tile // (BAND * num_n)
    rows_in_band = min(num_m - band * BAND, BAND)
    inside = tile % (BAND * num_n)
    m = (band * BAND + inside % rows_in_band) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (inside // rows_in_band) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_tile = x + m.to(tl.int64)[None, :] * K + k[:, None]  # [BLOCK_K, BLOCK_M]
    w_tile = w + n.to(tl.int64)[:, None] * K + k[None, :]  # [BLOCK_N, BLOCK_K]
    m_exists, n_exists = m < M, n < N
    INTEGER: tl.constexpr = KIND == W8A8 and x.dtype.element_ty == tl.int8 and GROUP == 0
    NEAR: tl.constexpr = min(BLOCK_K, 128)  # FP8 sums are added up in full fp32 so often: sm_90's own have 14 bits
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32 if INTEGER else tl.float32)
    per_split = tl.cdiv(tl.cdiv(K, BLOCK_K), num_splits) * BLOCK_K
    for start in range(split * per_split, min((split + 1) * per_split, K), BLOCK_K):
        x_mask, w_mask = m_exists[None, :], n_exists[:, None]
        if not EVEN_K:
            x_mask, w_mask = x_mask & (start + k[:, None] < K), w_mask & (start + k[None, :] < K)
        b = tl.load(x_tile + start, mask=x_mask, other=0.0)
        a = tl.load(w_tile + start, mask=w_mask, other=0.0)
        if KIND == WEIGHT_ONLY:
            a = widen(a, b.dtype)
        if GROUP == 0:
            if INTEGER:
                acc = tl.dot(a, b, acc, out_dtype=tl.int32)
            else:
                acc = tl.dot(a, b, acc, input_precision="ieee", max_num_imprecise_acc=NEAR)
        else:
            part = tl.dot(a, b, input_precision="ieee").to(tl.float32)
            group = start // GROUP
            part *= tl.load(w_scale + n * num_groups + group, mask=n_exists, other=0.0)[:, None]
            if KIND == W8A8:
                part *= tl.load(x_scale + m * num_groups + group, mask=m_exists, other=0.0)[None, :]
            acc += part
    acc = acc.to(tl.float32)
    last = num_splits == 1
    if num_splits > 1:
        place = (tile * num_splits).to(tl.int64) * (BLOCK_M * BLOCK_N)
        place += tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        tl.store(partial + place + split * (BLOCK_M * BLOCK_N), acc)
        tl.debug_barrier()  # every thread's part is stored before one of them says so
        last = tl.atomic_add(counters + tile, 1, sem="acq_rel") == num_splits - 1
        if last:
            tl.store(counters + tile, 0)  # as the next product expects it
            acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
            for i in range(num_splits):
                acc += tl.load(partial + place + i * (BLOCK_M * BLOCK_N), cache_modifier=".cg")
    if last:
        if GROUP == 0 and KIND != PLAIN:
            acc *= tl.load(w_scale + n, mask=n_exists, other=0.0)[:, None]
            if KIND == W8A8:
                acc *= tl.load(x_scale + m, mask=m_exists, other=0.0)[None, :]
        if BIAS:
            acc += tl.load(bias + n, mask=n_exists, other=0.0).to(tl.float32)[:, None]
        target = out + m.to(tl.int64)[:, None] * N + n[None, :]
        result = tl.trans(acc.to(out.dtype.element_ty))
        tl.store(target, result, mask=m_exists[:, None] & n_exists[None, :])


def choose_tile(num_rows: int, x: torch.dtype, w: torch.dtype) -> Tile:
    tiles = TILES_32BIT if x == torch.float32 else TILES_W8A8 if x == w and w.itemsize == 1 else TILES_16BIT
    return next(t for t in tiles if num_rows <= t.max_rows)


def choose_splits(num_tiles: int, steps: int, num_sms: int) -> int:
    """Into how many parts to cut K, of `steps` tiles, so that every SM has two programs."""
    return max(1, min(2 * num_sms // num_tiles, steps // _MIN_STEPS, _MAX_SPLITS))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    assert out is None or out.is_contiguous()
    if x.shape[0] == 1 and x.is_contiguous():
        return gemv(x, weight, None, bias, out=out)
    if 1 < x.shape[0] <= PLAIN_ROWS and x.is_contiguous() and x.itemsize == 2:
        return multiply(x, None, weight, None, bias, x.dtype, 0, out=out)
    if out is None:
        return F.linear(x, weight, bias)
    return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)


def weight_only_matmul(
    x: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None = None, group_size: int = 0
) -> Tensor:
    _check(x, qdata, scale, bias, group_size)
    assert x.dtype in (torch.bfloat16, torch.float16, torch.float32), x.dtype
    rows = x.shape[0]
    if rows == 1:
        return gemv(x, qdata, scale, bias, group_size)
    if rows >= DEQUANTIZE_ROWS:
        return F.linear(x, dequantize(qdata, scale, group_size, x.dtype), bias)
    return multiply(x, None, qdata, scale, bias, x.dtype, group_size)


def w8a8_matmul(
    x: Tensor,
    x_scale: Tensor,
    qdata: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    group_size: int = 0,
) -> Tensor:
    _check(x, qdata, scale, bias, group_size)
    assert x.dtype == qdata.dtype
    assert x_scale.shape == (x.shape[0], scale.shape[1]) and x_scale.dtype == torch.float32 and x_scale.is_contiguous()
    if _library_multiplies(x, qdata, dtype, group_size):
        out = torch._scaled_mm(x, qdata.t(), x_scale, scale.t(), out_dtype=dtype, use_fast_accum=True)
        return out if bias is None else out.add_(bias)
    return multiply(x, x_scale, qdata, scale, bias, dtype, group_size)


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
) -> Tensor:
    """Any of the products through `matmul_kernel`. tile, num_splits: the tests' and measurements' choice of them."""
    (rows, depth), width = x.shape, w.shape[0]
    if out is None:
        out = x.new_empty(rows, width, dtype=dtype)
    if rows == 0:
        return out
    tile = tile or choose_tile(rows, x.dtype, w.dtype)
    block_k = min(tile.block_k, group_size or tile.block_k)
    num_tiles = triton.cdiv(rows, tile.block_m) * triton.cdiv(width, tile.block_n)
    steps = triton.cdiv(depth, block_k)
    num_splits = num_splits or choose_splits(num_tiles, steps, chip.num_sms(x.device))
    parts = num_tiles * num_splits * tile.block_m * tile.block_n if num_splits > 1 else 0
    kind = W8A8 if x_scale is not None else PLAIN if scale is None else WEIGHT_ONLY
    matmul_kernel[(num_tiles, num_splits)](
        x,
        x if x_scale is None else x_scale,
        codes(w) if kind == WEIGHT_ONLY else w,
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
        KIND=kind.value,
        GROUP=group_size,
        BIAS=bias is not None,
        EVEN_K=depth % block_k == 0,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=block_k,
        BAND=8,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
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
