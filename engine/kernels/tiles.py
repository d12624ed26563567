"""The tiles that products with stored weights are cut into, by chip, kind of product and number of rows: `matmul.py`.

Rules for what no tuned table names (`tuned.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels import chip

_MIN_DEPTH = 1536  # inputs that a split must have: fewer, and adding the parts up costs more than they save
_MIN_BULK_DEPTH = 1024  # of a bulk tile
_MIN_GROUPED_DEPTH, _MIN_FEW_DEPTH = 2048, 640  # of one with scales of groups, and with up to 16 rows besides

GATED_ROWS = 64  # of `gated_hopper.py`: tokens of a group of warps
_MIN_SHARE = 0.84  # of the SMs' time that its tiles fill, at least: with less the library and silu apart are as fast
_THREE = 1.03  # what a program of three groups has over one of two where they fill as much
_MIN_TURN = 0.55  # as _MIN_SHARE, where they take one turn

ROOM_ROWS = 512  # up to so many, rows that a product takes have memory behind them for a whole bulk tile

# The kinds of product: both in one wide type, 8-bit weights; from W8A8 on both in 8 bits: one digit, two digits.
PLAIN, WEIGHT_ONLY, W8A8, DIGITS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@dataclass(frozen=True)
class Tile:
    """One shape of program: block_m x block_n of out; weight_left: computed as block_n x block_m of out.T. bulk: a
    program of `hopper_matmul.py`, with the weight left.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    weight_left: bool = True
    bulk: bool = False


@dataclass(frozen=True)
class GatedTile:
    """One shape of program of `gated_hopper.py`: groups of four warps, and main + side columns of out."""

    groups: int
    main: int
    side: int = 0

    @property
    def height(self) -> int:
        return self.groups * GATED_ROWS

    @property
    def width(self) -> int:
        return self.main + self.side


GATED = (GatedTile(2, 128), GatedTile(3, 128))  # of many tokens
_WIDTHS = ((32, 0), (32, 16), (64, 0), (64, 32), (128, 0), (128, 32), (128, 64))
ONE_TURN = (  # of as few as decode has
    *(GatedTile(3, 64, side) for side in (0, 16, 32)),
    *(GatedTile(2, *width) for width in _WIDTHS),
)


def _bulk(block_m: int, block_n: int, block_k: int, num_warps: int, num_stages: int) -> Tile:
    return Tile(block_m, block_n, block_k, num_warps, num_stages, weight_left=True, bulk=True)


# For operands of up to so many rows, tiles in the order in which they are tried: the first that gives no SM a second
# program is taken, else the last, of which several fit on an SM at few rows.
Tiles = tuple[tuple[int, tuple[Tile, ...]], ...]
_ANY = 1 << 62

TILES_32BIT: Tiles = ((16, (Tile(16, 32, 32, 4, 3),)), (_ANY, (Tile(64, 64, 16, 8, 3),)))
# In 99 KiB of shared memory, for chips without wgmma.
TILES_16BIT: Tiles = (
    (16, (Tile(16, 64, 128, 4, 4),)),
    (32, (Tile(32, 64, 128, 4, 4),)),
    (64, (Tile(64, 64, 128, 4, 3),)),
    (_ANY, (Tile(128, 128, 64, 8, 3),)),
)
TILES_8BIT: Tiles = (
    (16, (Tile(16, 64, 256, 4, 4),)),
    (32, (Tile(32, 64, 256, 4, 4),)),
    (64, (Tile(64, 64, 256, 4, 3),)),
    (_ANY, (Tile(128, 128, 128, 8, 3),)),
)
# Best or within a few % of it for each matrix of Qwen3-1.7B on an H200: docs/performance.md.
PLAIN_SM90: Tiles = ((16, (Tile(16, 64, 128, 4, 6),)), (_ANY, (Tile(32, 64, 128, 4, 6),)))
_FEW_SM90: Tiles = (
    (16, (Tile(16, 64, 256, 4, 6), Tile(16, 64, 256, 4, 3))),
    (32, (Tile(32, 64, 256, 4, 5), Tile(32, 64, 256, 4, 3))),
)
_WAVE_64 = (Tile(64, 32, 256, 4, 6, weight_left=False), Tile(64, 128, 128, 4, 6, weight_left=False))
_WAVE = (
    Tile(64, 64, 256, 4, 5, weight_left=False),
    Tile(64, 128, 128, 4, 6, weight_left=False),
    Tile(128, 128, 128, 8, 6, weight_left=False),
)
_MANY = Tile(128, 256, 128, 8, 3, weight_left=False)
W8A8_FP8_SM90: Tiles = (*_FEW_SM90, (64, _WAVE_64), (_ANY, (*_WAVE, _MANY)))
W8A8_INT8_SM90: Tiles = (
    *_FEW_SM90,
    (64, _WAVE_64),
    (256, (*_WAVE[:2], Tile(64, 128, 128, 4, 4, weight_left=False))),
    (_ANY, (*_WAVE, _MANY)),
)
_WAVE_DIGITS = (Tile(64, 64, 256, 4, 5), Tile(128, 64, 128, 4, 6), Tile(128, 128, 128, 8, 5))
_FEW_DIGITS: Tiles = (*_FEW_SM90, (64, (Tile(64, 64, 256, 4, 5), Tile(64, 64, 256, 4, 3))))
DIGITS_FP8_SM90: Tiles = (*_FEW_DIGITS, (256, (*_WAVE_DIGITS, Tile(256, 128, 128, 8, 3))), (_ANY, _WAVE_DIGITS))
DIGITS_INT8_SM90: Tiles = (*_FEW_DIGITS, (_ANY, (*_WAVE_DIGITS[:2], Tile(128, 64, 128, 4, 4))))
# With scales of groups: a second sum needs registers, and from eight warps on each thread loads all its scales itself.
GROUPED_W8A8_SM90: Tiles = (
    *_FEW_SM90,
    (_ANY, (Tile(64, 64, 128, 4, 6, weight_left=False), Tile(64, 128, 128, 4, 4, weight_left=False))),
)
GROUPED_DIGITS_SM90: Tiles = (*_FEW_DIGITS, (_ANY, (Tile(64, 64, 256, 4, 5), Tile(128, 64, 128, 4, 4))))


# Bulk tiles for matrices of 2,048 to 12,288 outputs: best in a layer of Qwen3-1.7B on an H200, or within a few %. Tiles
# that are tried first have as many buffers as an SM has room for, the last of each line leaves it to several programs.
PLAIN_BULK: Tiles = (
    (16, (_bulk(16, 64, 128, 4, 8), _bulk(16, 64, 128, 4, 5))),
    (32, (_bulk(32, 64, 128, 4, 8), _bulk(32, 64, 128, 4, 4))),
    (64, (_bulk(64, 64, 128, 4, 7), _bulk(64, 64, 128, 4, 3))),
    (128, (_bulk(64, 64, 128, 4, 7), _bulk(128, 128, 64, 8, 7), _bulk(128, 64, 64, 4, 4))),
    (_ANY, (_bulk(64, 64, 64, 4, 8), _bulk(128, 64, 64, 4, 8), _bulk(128, 64, 64, 4, 3))),
)
GATED_BULK: Tiles = (
    (16, (_bulk(16, 64, 128, 4, 6), _bulk(16, 64, 128, 4, 3))),
    (32, (_bulk(32, 64, 128, 4, 5), _bulk(32, 64, 64, 4, 5))),
    (64, (_bulk(64, 64, 128, 8, 4), _bulk(64, 64, 64, 4, 4))),
    (128, (_bulk(128, 64, 128, 4, 3), _bulk(128, 64, 64, 4, 3))),
)
BYTES_BULK: Tiles = (
    (16, (_bulk(16, 64, 256, 4, 5),)),
    (32, (_bulk(32, 64, 256, 4, 8), _bulk(32, 64, 128, 4, 8))),
    (64, (_bulk(64, 64, 256, 4, 7), _bulk(64, 64, 256, 4, 3))),
    (128, (_bulk(64, 64, 128, 4, 8), _bulk(128, 128, 128, 8, 7), _bulk(128, 64, 128, 4, 4))),
    (256, (_bulk(64, 64, 128, 4, 8), _bulk(128, 64, 128, 4, 8), _bulk(128, 64, 128, 4, 3))),
    (_ANY, (_bulk(128, 64, 128, 4, 8), _bulk(256, 64, 128, 4, 5), _bulk(128, 64, 128, 4, 3))),
)
GATED_BYTES_BULK: Tiles = (
    (16, (_bulk(16, 64, 256, 4, 6), _bulk(16, 64, 256, 4, 3))),
    (32, (_bulk(32, 64, 256, 4, 5), _bulk(32, 64, 128, 4, 5))),
    (64, (_bulk(64, 64, 256, 8, 4), _bulk(64, 64, 128, 4, 4))),
    (128, (_bulk(128, 64, 256, 4, 3), _bulk(128, 64, 128, 4, 3))),
    (_ANY, (_bulk(256, 64, 128, 8, 4), _bulk(128, 64, 128, 4, 3))),
)
# With scales of groups: a step is of 128 inputs at most, and has a sum of its own.
GROUPED_W8A8_BULK: Tiles = (
    (8, (_bulk(8, 64, 128, 4, 12),)),
    (16, (_bulk(16, 64, 128, 4, 11), _bulk(16, 64, 128, 4, 7))),
    (32, (_bulk(32, 64, 128, 4, 12), _bulk(32, 64, 128, 4, 7))),
    (64, (_bulk(64, 64, 128, 4, 12), _bulk(64, 64, 128, 4, 6))),
    (_ANY, (_bulk(64, 64, 128, 4, 12), _bulk(64, 64, 128, 4, 4))),
)
GROUPED_DIGITS_BULK: Tiles = (
    (16, (_bulk(16, 64, 128, 4, 11), _bulk(16, 64, 128, 4, 7))),
    (32, (_bulk(32, 64, 128, 4, 12), _bulk(32, 64, 128, 4, 7))),
    (64, (_bulk(64, 64, 128, 4, 12), _bulk(64, 64, 128, 4, 7))),
    (128, (_bulk(64, 64, 128, 4, 7), _bulk(128, 64, 128, 4, 4))),
    (_ANY, (_bulk(64, 64, 128, 4, 12), _bulk(128, 64, 128, 4, 9), _bulk(128, 64, 128, 4, 4))),
)


def empty_rows(like: Tensor, rows: int, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised [rows, *shape] on the device of `like`, followed by memory for as many rows as a bulk tile may
    have: the copy engine takes longer to make up rows than to fetch some that nobody looks at.
    """
    room = max(16, triton.next_power_of_2(rows)) if 0 < rows <= ROOM_ROWS else rows
    return like.new_empty(room, *shape, dtype=dtype or like.dtype)[:rows]


def tiles_for(
    device: torch.device, kind: int, dtype: torch.dtype, group_size: int, bulk: bool = False, gated: bool = False
) -> Tiles:
    """Of products whose activations come in `dtype`; bulk tiles for those that take them."""
    if bulk and group_size:
        return GROUPED_W8A8_BULK if kind == W8A8.value else GROUPED_DIGITS_BULK
    if bulk and kind == PLAIN.value:
        return GATED_BULK if gated else PLAIN_BULK
    if bulk:
        return GATED_BYTES_BULK if gated else BYTES_BULK
    if dtype == torch.float32:
        return TILES_32BIT
    if chip.capability(device) != (9, 0) or kind == WEIGHT_ONLY.value:
        return TILES_8BIT if dtype.itemsize == 1 else TILES_16BIT
    if kind == PLAIN.value:
        return PLAIN_SM90
    if group_size:
        return GROUPED_W8A8_SM90 if kind == W8A8.value else GROUPED_DIGITS_SM90
    if kind == W8A8.value:
        return W8A8_INT8_SM90 if dtype == torch.int8 else W8A8_FP8_SM90
    return DIGITS_INT8_SM90 if dtype == torch.int8 else DIGITS_FP8_SM90


def count_tiles(rows: int, width: int, block_m: int, block_n: int) -> int:
    """Of out[rows, width]."""
    return -(-rows // block_m) * -(-width // block_n)


def choose_tile(tiles: Tiles, rows: int, width: int, num_sms: int) -> Tile:
    candidates = next(c for max_rows, c in tiles if rows <= max_rows)
    one_wave = (t for t in candidates if count_tiles(rows, width, t.block_m, t.block_n) <= num_sms)
    return next(one_wave, candidates[-1])


@cache
def choose_gated(rows: int, width: int, num_sms: int) -> GatedTile | None:
    """For out[rows, width] of many tokens, by `gated_hopper.py`; None: the library multiplies."""
    shares = {}
    for tile in GATED:
        turns = triton.cdiv(count_tiles(rows, width, tile.height, tile.width), num_sms)
        shares[tile] = rows * width / (turns * num_sms * tile.height * tile.width)
    two, three = GATED
    best = three if shares[three] * _THREE >= shares[two] else two
    return best if shares[best] >= _MIN_SHARE else None


@cache
def one_turn(rows: int, width: int, num_sms: int) -> GatedTile | None:
    """For out[rows, width] of few tokens: of the tiles of which no SM gets two, the one that fetches least, which time
    goes with; None where there is none, or many SMs would get none. The same up to each multiple of 64 rows, as
    `runner.WARM_UP_ROWS` has it.
    """
    rows = triton.cdiv(rows, GATED_ROWS) * GATED_ROWS
    fitting = [
        tile
        for tile in ONE_TURN
        if count_tiles(rows, width, tile.height, tile.width) <= num_sms
        and rows * width >= _MIN_TURN * num_sms * tile.height * tile.width
    ]
    return min(fitting, key=lambda tile: tile.height + 2 * tile.width, default=None)


def choose_splits(num_tiles: int, depth: int, num_sms: int, tile: Tile, group_size: int = 0) -> int:
    """Into how many parts to cut the inputs, so that no more SMs idle than must. Bulk tiles keep enough bytes under way
    on half the SMs; with scales of groups, steps take longer, and few rows want more programs.
    """
    if tile.bulk and group_size and tile.block_m <= 16:
        return max(1, min(-(-num_sms // num_tiles), depth // _MIN_FEW_DEPTH, 3))
    if tile.bulk and group_size:
        return max(1, min(num_sms // num_tiles, depth // _MIN_GROUPED_DEPTH))
    if tile.bulk:
        return max(1, min((num_sms // num_tiles + 1) // 2, depth // _MIN_BULK_DEPTH))
    return max(1, min(num_sms // num_tiles, depth // _MIN_DEPTH))
