"""Triton kernel of the weight-only product: 8-bit weights stay so until they are in registers. Letters: `__init__`.

One kernel, three shapes of tile. Up to 16 rows (decode) the weights are the traffic, so tiles are narrow in N, to give
every SM some, and wide in K, to keep many bytes in flight. Above, tiles grow towards square, as in any matrix product.

float8_e4m3fn is widened by bits, as in the twin: shifted into fp16's fields the value comes out divided by 256, which
the scale takes back. The hardware's conversion does not exist on sm_80.
"""

# Triton is untyped: a jitted function has no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Tile:
    """One shape of program, for products of up to `max_rows` rows."""

    max_rows: int
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


TILES_16BIT = (
    Tile(16, 16, 16, 512, 4, 3),
    Tile(64, 64, 64, 128, 4, 3),
    Tile(1 << 62, 128, 128, 64, 8, 3),
)
TILES_32BIT = (
    Tile(16, 16, 32, 32, 4, 3),
    Tile(1 << 62, 64, 64, 16, 8, 3),
)


@triton.jit(do_not_specialize=["M"])
def weight_only_matmul_kernel(
    x,
    qdata,
    scale,
    bias,
    out,
    M,
    N,
    K,
    FP8: tl.constexpr,
    BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # Programs run in bands of GROUP_M row tiles, so that what is resident together shares rows and weights in L2.
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    band = program // (GROUP_M * num_n)
    rows_in_band = min(num_m - band * GROUP_M, GROUP_M)
    inside = program % (GROUP_M * num_n)
    m = (band * GROUP_M + inside % rows_in_band) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (inside // rows_in_band) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_tile = x + m.to(tl.int64)[:, None] * K + k[None, :]  # [BLOCK_M, BLOCK_K]
    w_tile = qdata + n.to(tl.int64)[None, :] * K + k[:, None]  # [BLOCK_K, BLOCK_N]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        x_mask, w_mask = m[:, None] < M, n[None, :] < N
        if not EVEN_K:
            x_mask, w_mask = x_mask & (start + k[None, :] < K), w_mask & (start + k[:, None] < K)
        a = tl.load(x_tile + start, mask=x_mask, other=0.0)
        w = tl.load(w_tile + start, mask=w_mask, other=0)
        if FP8:
            w = ((w.to(tl.int16) << 7) & -16385).to(tl.float16, bitcast=True)  # -16385: all but bit 14
        acc = tl.dot(a, w.to(a.dtype), acc, input_precision="ieee")
    row_scale = tl.load(scale + n, mask=n < N, other=0.0)
    if FP8:
        row_scale *= 256.0
    acc *= row_scale[None, :]
    if BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    target = out + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


def choose_tile(num_rows: int, dtype: torch.dtype) -> Tile:
    tiles = TILES_32BIT if dtype == torch.float32 else TILES_16BIT
    return next(t for t in tiles if num_rows <= t.max_rows)


def weight_only_matmul(x: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    assert x.dim() == 2 and x.is_contiguous()
    assert x.dtype in (torch.bfloat16, torch.float16, torch.float32), x.dtype
    (rows, depth), (width, stored_depth) = x.shape, qdata.shape
    assert depth == stored_depth and qdata.is_contiguous()
    assert qdata.dtype in (torch.int8, torch.float8_e4m3fn), qdata.dtype
    assert scale.shape == (width, 1) and scale.dtype == torch.float32 and scale.is_contiguous()
    assert bias is None or (bias.shape == (width,) and bias.is_contiguous())
    out = x.new_empty(rows, width)
    if rows:
        tile = choose_tile(rows, x.dtype)
        grid = (triton.cdiv(rows, tile.block_m) * triton.cdiv(width, tile.block_n),)
        weight_only_matmul_kernel[grid](
            x,
            qdata.view(torch.int8),
            scale,
            scale if bias is None else bias,
            out,
            rows,
            width,
            depth,
            FP8=qdata.dtype == torch.float8_e4m3fn,
            BIAS=bias is not None,
            EVEN_K=depth % tile.block_k == 0,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            GROUP_M=8,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return out
